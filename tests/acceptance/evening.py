"""A scripted evening, told line by line: `python tests/acceptance/evening.py` (some minutes, nothing is left behind).

An own folder of images; ticks by the clock, one of which does nothing; a changed folder that is trained on by itself; a
training that is cancelled and goes on; a sweep of four; a promotion and a refusal; and the champion's bytes once more
from its row. Each chapter ends with what it proves; where that does not hold, the evening ends with an AssertionError.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_settings import TINY  # noqa: E402

from pipelines.processes.runner import close, start_warded  # noqa: E402
from pipelines.processes.scratch import copy_repository  # noqa: E402

PATIENCE_SECONDS = 400.0  # for one thing to happen; some 60 on an idle machine
EVERY = "30s"
IMAGES, MORE = 900, 90
# A narrow network, so that there is something to improve on; so many epochs, that there is time to cancel.
NARROW = {
    "embed_dim": 12,
    "depth": 1,
    "epochs": 40,
    "snapshot_epochs": 40,
    "batch": 32,
    "lr_at_256": 5.0e-5,
    "teacher_temp_start": 0.03,
    "teacher_temp": 0.03,
}
Tell = Callable[[str], None]
Answer = dict[str, Any]


class Evening:
    """A repository with a folder of images, the environment of whoever works in it, and where lines for people go."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        """Lay both below `folder`."""
        self.folder, self.root, self.photos, self.tell = folder, folder / "dino", folder / "photos", tell
        settings = {
            **TINY,
            "data": {"folder": str(self.photos), "val_fraction": 0.25},
            "pretrain": TINY["pretrain"] | NARROW,
            "linear": TINY["linear"] | {"epochs": 1, "blocks": 1},
        }
        copy_repository(self.root, settings, root=ROOT)
        add_images(self.photos, 0, IMAGES)
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("DINO_", "MLFLOW_", "DVC_", "PREFECT_"))}
        self.environment = outside | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PREFECT_HOME": str(folder / "prefect"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "DINO_PROGRESS_SECONDS": "1",
            "GIT_AUTHOR_NAME": "evening", "GIT_AUTHOR_EMAIL": "evening@localhost",
            "GIT_COMMITTER_NAME": "evening", "GIT_COMMITTER_EMAIL": "evening@localhost",
        }  # fmt: skip

    def chapter(self, title: str) -> None:
        """A headline."""
        self.tell("")
        self.tell(f"── {title}")

    def shown(self, text: str, *, only: str = "") -> None:
        """Lines of a command for people; those that match `only`."""
        for line in text.splitlines():
            if line.strip() and re.search(only, line):
                self.tell(f"    {line.rstrip()}")

    def run(self, command: str, *, only: str | None = "") -> str:
        """Run a command as typed; tell it, and its lines that match `only` (None: none).

        Raises:
            AssertionError: it failed; with its words.
        """
        self.tell(f"$ {command}")
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.root, env=self.environment, text=True, timeout=540,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        if only is not None:
            self.shown(done.stdout, only=only)
        assert done.returncode == 0, f"{command} failed ({done.returncode}):\n{done.stdout}"
        return done.stdout

    def teacher_md5(self) -> str:
        """Of the checkpoint that lies here."""
        return self.run("md5sum models/teacher.safetensors").split()[0]


def add_images(folder: Path, first: int, last: int) -> None:
    """Scikit-learn's digits from number `first` to `last`, a folder a class."""
    from sklearn.datasets import load_digits  # here: it takes a second, and most who import this file only list tests

    digits = load_digits()
    for number in range(first, last):
        path = folder / str(digits.target[number]) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[number] * 15.9).astype("uint8")).save(path)


class Ticks:
    """A served schedule, and what Prefect's server says of its runs."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def ask(self, question: str, body: Mapping[str, Any]) -> Any:
        found = re.search(r"pages: (http://\S+?)/deployments", self.log.read_text())
        assert found, self.log.read_text()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{found[1]}/api/{question}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def begun(self) -> list[Answer]:
        """Runs that have begun to work, latest first."""
        states = {"type": {"any_": ["RUNNING", "CANCELLING", "COMPLETED", "FAILED", "CRASHED", "CANCELLED"]}}
        runs = self.ask("flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 50, "flow_runs": {"state": states}})
        return [run for run in runs if run["start_time"]]

    def after(self, known: Answer | None, *, state: str) -> Answer:
        """The first run in this state that began after a known one."""
        since = known["start_time"] if known else ""

        def found() -> Answer | None:
            runs = [run for run in self.begun() if run["start_time"] > since]
            failed = [run for run in runs if run["state"]["type"] in ("FAILED", "CRASHED")]
            assert not failed, f"{failed[0]['state']}\n{self.log.read_text()[-4000:]}"
            return next((run for run in reversed(runs) if run["state"]["type"] == state), None)

        return until(found, f"a tick in state {state}", self.log)

    def state_of(self, run: Answer) -> Answer:
        (now,) = self.ask("flow_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
        return dict(now["state"])

    def says(self, pattern: str, *, since: int = 0) -> str:
        """The first line of the log, from its byte `since` on, that matches; once there is one."""

        def found() -> str:
            lines = self.log.read_bytes()[since:].decode(errors="replace").splitlines()
            return next((line for line in lines if re.search(pattern, line)), "")

        return until(found, f"a line {pattern!r}", self.log)

    def length(self) -> int:
        return self.log.stat().st_size


def until(found: Callable[[], Any], what: str, log: Path) -> Any:
    """What `found` gives, once it is something.

    Raises:
        AssertionError: it was nothing for PATIENCE_SECONDS.
    """
    patience = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            if answer := found():
                return answer
        except OSError:  # a server that starts, or is busy
            pass
        words = log.read_text(errors="replace")[-4000:] if log.exists() else ""
        assert time.monotonic() < patience, f"no {what} within {PATIENCE_SECONDS:.0f} s:\n{words}"
        time.sleep(0.3)


@contextmanager
def served(evening: Evening) -> Iterator[Ticks]:
    """`python -m pipelines.serve`, and its end."""
    command = [sys.executable, "-m", "pipelines.serve", "--every", EVERY]
    evening.tell(f"$ python -m pipelines.serve --every {EVERY}")
    log = evening.folder / "serve.log"
    code = "import os, sys; os.chdir(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"
    with log.open("wb") as words:
        inside = [sys.executable, "-c", code, str(evening.root), *command]
        process = start_warded(inside, grace_seconds=30, env=evening.environment, stdout=words.fileno())
    try:
        ticks = Ticks(log)
        evening.shown(ticks.says("pages: http"))
        yield ticks
    finally:
        close(process)
        process.wait()
        evening.tell("(the schedule is ended)")


def evening(folder: Path, tell: Tell) -> None:
    """All of it.

    Raises:
        AssertionError: something did not happen as it should.
    """
    began = time.monotonic()
    here = Evening(folder, tell)
    tell(f"A repository and {IMAGES} images of one's own in {folder}")
    with served(here) as ticks:
        first = the_first_tick(here, ticks)
        idle = a_tick_that_does_nothing(here, ticks, first)
        cancelled, changed = a_changed_folder_is_cancelled_in_training(here, ticks, idle)
        the_next_tick_goes_on(here, ticks, cancelled, changed)
    here.chapter("A sweep of four")
    here.run("git add dvc.lock metrics && git commit --quiet --message 'An evening'")
    best, worst = a_sweep_of_four(here)
    md5 = a_promotion_and_a_refusal(here, best, worst)
    a_trace_back(here, best, md5)
    here.chapter("Nothing is left running")
    assert not left(folder), left(folder)
    tell(f"    no process of this evening; {(time.monotonic() - began) / 60:.1f} minutes")


def the_first_tick(here: Evening, ticks: Ticks) -> Answer:
    """All stages, and the first champion."""
    here.chapter("The first tick trains, evaluates and registers")
    run = ticks.after(None, state="COMPLETED")
    here.shown(run["state"]["message"])
    assert "is champion now" in run["state"]["message"], run["state"]
    return run


def a_tick_that_does_nothing(here: Evening, ticks: Ticks, before: Answer) -> Answer:
    """Seconds, and it says so."""
    here.chapter("A tick that does nothing")
    run = ticks.after(before, state="COMPLETED")
    here.shown(f"{run['name']}: {run['state']['name']}. {run['state']['message']}")
    assert run["state"]["name"] == "Unchanged" and "Nothing changed: " in run["state"]["message"], run["state"]
    return run


def a_changed_folder_is_cancelled_in_training(here: Evening, ticks: Ticks, before: Answer) -> tuple[Answer, str]:
    """The run that was cancelled, and the teacher's md5 before."""
    here.chapter("A changed image folder retrains by itself")
    md5 = here.teacher_md5()
    add_images(here.photos, IMAGES, IMAGES + MORE)
    here.tell(f"{MORE} more images lie in {here.photos} now; nobody starts anything")
    since = ticks.length()
    here.shown(ticks.says(r"pretrain \| [\d,]+ of [\d,]+ images, .* left", since=since))
    run = next(run for run in ticks.begun() if run["state"]["type"] == "RUNNING")
    here.shown(f"{run['name']} is training on the changed folder")

    here.chapter("A cancel that resumes")
    here.run(f"PREFECT_API_URL={api(ticks)} prefect flow-run cancel {run['id']}", only=r"\w+ ")
    here.shown(ticks.says(r"pretrain .*state is saved", since=since))
    until(lambda: ticks.state_of(run)["type"] == "CANCELLED", "cancelled run", ticks.log)
    here.shown(f"{run['name']}: Cancelled")
    return run, md5


def the_next_tick_goes_on(here: Evening, ticks: Ticks, cancelled: Answer, md5: str) -> None:
    """It resumes where the trainer saved, and ends with another teacher."""
    line = ticks.says(r"resuming after step [\d,]+")
    here.shown(line)
    assert not re.search(r"after step 0\b", line)
    run = ticks.after(cancelled, state="COMPLETED")
    here.shown(f"{run['name']}: {run['state']['message']}")
    assert run["state"]["name"] != "Unchanged", run["state"]
    assert here.teacher_md5() != md5, "the changed folder left the teacher as it was"


def api(ticks: Ticks) -> str:
    found = re.search(r"pages: (http://\S+?)/deployments", ticks.log.read_text())
    assert found
    return f"{found[1]}/api"


def a_sweep_of_four(here: Evening) -> tuple[str, str]:
    """Names of the experiments that are best and worst on val."""
    table = here.folder / "sweep.csv"
    said = here.run(
        "python -m pipelines.sweep pretrain.embed_dim=12,48 pretrain.lr_at_256=5.0e-5,5.0e-4 pretrain.epochs=10 "
        f"--jobs 2 --name four --out {shlex.quote(str(table))}",
        only=r"^(?!.*epochs=10: (?!started|done))",  # without each stage's progress
    )
    import pandas as pd

    runs = pd.read_csv(table)
    assert len(runs) == 4 and set(runs["state"]) == {"done"}, said
    scores = runs.set_index("experiment")["knn/val_top1"].sort_values()
    experiments = here.run("dvc exp list --name-only", only=None)
    assert all(name in experiments for name in scores.index)
    return str(scores.index[-1]), str(scores.index[0])


def a_promotion_and_a_refusal(here: Evening, best: str, worst: str) -> str:
    """The champion's md5."""
    here.chapter("A promotion")
    here.run(f"dvc exp apply {best}", only=None)
    said = here.run("python -m pipelines.promote")
    assert "is champion now" in said, said
    md5 = here.teacher_md5()
    here.chapter("A refusal")
    here.run(f"dvc exp apply {worst}", only=None)
    said = here.run("python -m pipelines.promote")
    assert "is not promoted" in said and "stays champion" in said, said
    return md5


def a_trace_back(here: Evening, experiment: str, md5: str) -> None:
    """The champion's row, trained once more in a clone."""
    here.chapter("A trace back to identical bytes")
    back = here.folder / "back"
    here.run(f"python -m pipelines.trace {experiment} --anew --into {back} > ../back.sh; cat ../back.sh")
    said = here.run("sh -e ../back.sh", only=r"Running stage|: OK$|: FAILED")
    assert "Running stage 'pretrain'" in said, "nothing was trained anew"
    found = subprocess.run(["md5sum", back / "models/teacher.safetensors"], capture_output=True, text=True).stdout
    here.shown(found)
    assert found.split()[0] == md5, f"the champion was {md5}"


def left(folder: Path) -> list[str]:
    """Processes that work below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(process.cwd()).startswith(str(folder)) or str(folder) in " ".join(process.cmdline()):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        except psutil.Error:
            continue
    return found


def main() -> int:
    """Run the evening in a folder of its own, which goes away if all went well."""
    folder = Path(tempfile.mkdtemp(prefix="dino-evening-"))
    try:
        evening(folder, lambda line: print(f"{datetime.now():%H:%M:%S}  {line}" if line else "", flush=True))
    except (AssertionError, subprocess.SubprocessError) as error:
        print(f"{error}\nThe folder is kept: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
