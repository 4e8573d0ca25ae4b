"""The pretraining stage as a process that dies: killed, told to end, resumed, its outs are those of a quiet run."""

import copy
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
import yaml
from tiny import SETTINGS, digits, write_table
from told import ended
from toy import wait_until

from dino.checkpoint import load_backbone
from dino.training_state import load_state
from dino.weights import untrained_backbone
from pipelines import params
from pipelines.processes.ending import SIGNALS
from pipelines.processes.lock import hold
from pipelines.stages import pretrain
from pipelines.training.intent import key_here
from pipelines.training.resumable import Resumable

PROJECT = Path(__file__).parents[2]
OUTS = [
    *("models/snapshots/epoch_0001.safetensors", "models/snapshots/epoch_0002.safetensors"),
    *("models/training_state.safetensors", "metrics/pretrain.json"),
    *("plots/pretrain.csv", "plots/crops.png"),
]
IMAGES, BATCH, EPOCHS = 160, 4, 2
STEPS_PER_EPOCH = IMAGES // BATCH
STEPS = EPOCHS * STEPS_PER_EPOCH
EXIT_REQUEUE = 75
THREADS = torch.get_num_threads()  # here, and so in every process whose bytes are compared


class Workplace:
    """A directory with params.yaml and a prepared table: all that the stage needs."""

    def __init__(self, root: Path, save_steps: int = 1, **changes: Any) -> None:
        self.root, self.save_steps = root, save_steps
        write_table(root / "data/prepared/train.arrow", digits(IMAGES))
        self.set(**changes)

    def set(self, **changes: Any) -> None:
        content = yaml.safe_load((PROJECT / "params.yaml").read_text())
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
        content["pretrain"] |= settings | {"epochs": EPOCHS, "batch": BATCH, "depth": 1} | changes
        content["runtime"]["tracking"]["enabled"] = False
        content["runtime"]["pretrain"] |= {"save_minutes": None, "save_steps": self.save_steps}
        content["runtime"]["wait_for_lock_minutes"] = 0
        (self.root / "params.yaml").write_text(yaml.safe_dump(content))

    def run_here(self, terminal: TextIO | None = None, *, heeds: bool = False) -> tuple[int, str, str]:
        """The stage in this process: exit code, output, and errors.

        Args:
            terminal: gets the errors.
            heeds: signals, which else stay pytest's own.
        """
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(terminal or err):
            patch.chdir(self.root)
            if not heeds:
                patch.setattr(pretrain, "StopRequest", lambda: lambda: False)
            for name in ("DINO_ROOT", "DINO_TRACEBACK", "WORLD_SIZE", "RANK"):
                patch.delenv(name, raising=False)
            patch.setenv("DINO_DEVICE", "cpu")
            return ended("pretrain", pretrain.main), out.getvalue(), err.getvalue()

    def start(self, hash_seed: int = 0, threads: int = 1, *launcher: str) -> subprocess.Popen[str]:
        """The stage as DVC would run it, in a process group of its own."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DINO_")}
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "pipelines.stages.pretrain"],
            cwd=self.root,
            env=environment
            | {"PYTHONPATH": str(PROJECT), "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": str(threads)}
            | {"DINO_DEVICE": "cpu", "PYTHONWARNINGS": "default"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, hash_seed: int = 0, threads: int = 1, *launcher: str) -> tuple[int, str, str]:
        process = self.start(hash_seed, threads, *launcher)
        out, err = process.communicate(timeout=600)
        return process.returncode, out, err

    def saved_step(self) -> int:
        """Steps of the newest saved state that is whole; 0 if there is none."""
        steps = [0]
        folder = self.root / ".work/pretrain"  # a kill between the two renames of a save leaves only `previous`
        for path in [*folder.glob("*/state.safetensors"), *folder.glob("*/previous.safetensors")]:
            try:
                steps.append(load_state(path)[0].step)
            except ValueError:  # just being renamed
                continue
        return max(steps)

    def md5s(self) -> dict[str, str]:
        return {out: hashlib.md5((self.root / out).read_bytes()).hexdigest() for out in OUTS}

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.root / "metrics/pretrain.json").read_text())


def wait_for(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    """Return when it is true; fail if the process ends before, or after minutes."""
    until = time.monotonic() + 300
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.03)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Handlers are afterwards what they were."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(process: subprocess.Popen[str], number: int) -> tuple[str, str]:
    os.killpg(process.pid, number)
    return process.communicate(timeout=300)


@pytest.fixture(scope="module")
def quiet_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """A training that nobody interrupts."""
    place = Workplace(tmp_path_factory.mktemp("quiet"), save_steps=1000)
    code, out, err = place.run_here()
    assert (code, err) == (0, "")
    assert f"{IMAGES} images, {EPOCHS} epochs, {STEPS} steps of {BATCH} on cpu in fp32, key " in out
    assert "resuming" not in out
    yield place


def test_killed_in_mid_epoch_elsewhere_and_run_again_it_leaves_the_same_bytes(
    quiet_run: Workplace, tmp_path: Path
) -> None:
    place = Workplace(tmp_path / "another" / "directory")
    process = place.start(2, THREADS)
    wait_for(process, lambda: place.saved_step() > STEPS_PER_EPOCH)  # the first snapshot is made by then
    end(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    killed_at = place.saved_step()
    assert 0 < killed_at < STEPS and killed_at % STEPS_PER_EPOCH, "not in mid-epoch"
    assert not any((place.root / out).exists() for out in OUTS)
    place.save_steps = 1000
    place.set()
    code, out, _ = place.run_here()
    assert code == 0 and f"resuming after step {killed_at}" in out
    assert place.md5s() == quiet_run.md5s()
    assert place.metrics()["bit_exact"] is True


def test_told_to_end_it_saves_says_how_to_go_on_and_asks_to_be_run_again(quiet_run: Workplace, tmp_path: Path) -> None:
    """Then it goes on with other threads, which is told and recorded."""
    place = Workplace(tmp_path)

    def tell() -> None:
        wait_until(lambda: place.saved_step() >= 3)
        os.kill(os.getpid(), signal.SIGTERM)

    with signals_kept():
        teller = threading.Thread(target=tell)
        teller.start()
        torch.set_num_threads(THREADS + 1)
        code, _, err = place.run_here(heeds=True)
        torch.set_num_threads(THREADS)
        teller.join()  # before the signals are pytest's again
    stopped_at = place.saved_step()
    assert code == EXIT_REQUEUE
    said = f"stopped after step {stopped_at} of {STEPS}; its state is saved, run the same command again to go on"
    assert err == f"pretrain: {said}\n"
    place.save_steps = 1000
    place.set()
    code, out, err = place.run_here()
    assert code == 0 and f"resuming after step {stopped_at}" in out
    assert f"resuming in another environment (threads {THREADS + 1} -> {THREADS})" in err and "bit_exact: false" in err
    assert place.metrics()["bit_exact"] is False
    assert place.metrics()["key"] == quiet_run.metrics()["key"]
    assert place.metrics()["loss"] == pytest.approx(quiet_run.metrics()["loss"], rel=0.05)


@pytest.mark.acceptance  # test_ending.py says so of a process that needs no torch
def test_its_parents_death_makes_it_save_even_when_both_were_told_to_end(tmp_path: Path) -> None:
    """A group gets TERM: the parent dies at once, which must not count as a second order to the trainer."""
    place = Workplace(tmp_path)
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'pipelines.stages.pretrain'])"
    process = place.start(0, 1, "-c", parent)
    wait_for(process, lambda: place.saved_step() >= 3)
    _, err = end(process, signal.SIGTERM)  # read to its end: when the trainer has closed it
    assert process.returncode == -signal.SIGTERM
    assert f"pretrain: stopped after step {place.saved_step()} of {STEPS}; its state is saved" in err


def test_the_results_say_what_made_them(quiet_run: Workplace) -> None:
    backbone, facts = load_backbone(quiet_run.root / "models/snapshots/epoch_0002.safetensors")
    table = (quiet_run.root / "data/prepared/train.arrow").read_bytes()
    metrics = quiet_run.metrics()
    assert (facts["epoch"], facts["step"]) == (EPOCHS, STEPS)
    assert facts["data_md5"] == hashlib.md5(table).hexdigest()
    assert facts["key"] == metrics["key"] and facts["params"]["precision"] == metrics["precision"] == "fp32"
    assert facts["params"]["epochs"] == metrics["epochs"] == EPOCHS
    assert (metrics["steps"], metrics["images_seen"]) == (STEPS, STEPS * BATCH)
    assert metrics["parameters"] == sum(p.numel() for p in backbone.parameters())
    state, state_facts = load_state(quiet_run.root / "models/training_state.safetensors")
    assert state.step == STEPS and state_facts["key"] == facts["key"]
    for name, tensor in backbone.state_dict().items():
        assert state.tensors[f"teacher.backbone.{name}"].equal(tensor)
    untrained = untrained_backbone(facts).state_dict()
    assert any(not untrained[name].equal(tensor) for name, tensor in backbone.state_dict().items())
    rows = (quiet_run.root / "plots/pretrain.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,loss,kl,") and rows[-1].startswith(f"{STEPS},{EPOCHS}.0,")
    assert len(rows) == 1 + len(state.curve)


def test_a_snapshot_that_was_lost_meanwhile_is_told_and_left_out(quiet_run: Workplace, tmp_path: Path) -> None:
    """The last one is not lost: the final state holds the same weights."""
    place = copy.copy(quiet_run)
    place.root = root = Path(shutil.copytree(quiet_run.root, tmp_path / "copy"))
    shutil.rmtree(root / "models")
    (folder,) = (root / ".work/pretrain").iterdir()
    (folder / "epoch_0001.safetensors").write_bytes(b"")
    (folder / "epoch_0002.safetensors").unlink()
    code, _, err = place.run_here()
    assert code == 0 and f"the snapshot of epoch 1 is lost ({folder / 'epoch_0001.safetensors'} is no checkpoint" in err
    assert [path.name for path in (root / "models/snapshots").iterdir()] == ["epoch_0002.safetensors"]
    last = "models/snapshots/epoch_0002.safetensors"
    assert (root / last).read_bytes() == (quiet_run.root / last).read_bytes()
    assert json.loads((root / "metrics/pretrain.json").read_text())["snapshots_lost"] == [1]
    assert quiet_run.metrics()["snapshots_lost"] == []


def test_a_second_trainer_of_the_same_setting_is_refused(quiet_run: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quiet_run.root)
    before = quiet_run.md5s()
    with Resumable(quiet_run.metrics()["key"], {}) as held:
        code, _, message = quiet_run.run_here()
    assert code == 1 and f"pretrain failed: process {os.getpid()} on " in message
    assert f"trains this very setting (its state lies in {held.folder})" in message
    assert quiet_run.md5s() == before


def test_a_second_process_of_the_stage_is_refused_though_it_trains_another_setting(quiet_run: Workplace) -> None:
    """As where DVC was killed, its trainer still saves, and the next `dvc repro` comes with changed params."""
    before = quiet_run.md5s()
    with hold(quiet_run.root / ".work/running/pretrain", "runs"):
        quiet_run.set(lr_at_256=0.06)
        code, _, message = quiet_run.run_here()
        quiet_run.set()
    assert code == 1 and f"pretrain failed: process {os.getpid()} on " in message
    assert "runs stage pretrain here; wait for it or stop it" in message
    assert quiet_run.md5s() == before


def test_a_changed_setting_has_its_own_key_and_the_changed_back_one_its_old(
    quiet_run: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(quiet_run.root)
    monkeypatch.setenv("DINO_DEVICE", "cpu")

    def key() -> str:
        return key_here(params.load(quiet_run.root / "params.yaml").pretrain)

    trained = quiet_run.metrics()["key"]
    assert key() == trained
    quiet_run.set(lr_at_256=0.06)
    assert key() != trained
    assert not (quiet_run.root / ".work/pretrain" / key()).exists()
    quiet_run.set()
    assert key() == trained


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"batch": 200}, ["pretrain.batch is 200", "160 training images", "choose at most 160"]),
        ({"epochs": 0}, ["params.yaml has 1 problem", "pretrain.epochs is 0: choose 1 or more"]),
        ({"warmup_epochs": 3}, ["pretrain.warmup_epochs is 3", "longer than the run of 2 epochs", "choose fewer"]),
        ({"teacher_temp_warmup_epochs": 3}, ["pretrain.teacher_temp_warmup_epochs is 3", "run of 2 epochs"]),
        ({"global_px": 13}, ["pretrain.global_px is 13", "patch_size (4)", "choose 12 or 16"]),
        ({"local_px": 7}, ["pretrain.local_px is 7", "patch_size (4)", "choose 4 or 8"]),
        ({"ema_momentum": 1.01}, ["pretrain.ema_momentum is 1.01: choose a share from 0 to 1"]),
        ({"center_momentum": -0.1}, ["pretrain.center_momentum is -0.1: choose a share from 0 to 1"]),
        ({"micro_batches": 3}, ["pretrain.batch (4)", "micro_batches (3)", "choose a divisor"]),
    ],
)
def test_a_users_error_is_one_clear_message(change: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    place = Workplace(tmp_path, **change)
    code, _, message = place.run_here()
    assert code == 1 and "pretrain failed: " in message and "Traceback" not in message
    for part in parts:
        assert part in message
    assert not any((place.root / out).exists() for out in OUTS)


@pytest.mark.acceptance
def test_a_batch_that_the_ranks_do_not_divide_is_one_clear_message(tmp_path: Path) -> None:
    place = Workplace(tmp_path, batch=5)
    code, _, err = place.run(0, 1, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert code != 0 and not any((place.root / out).exists() for out in OUTS)
    assert "pretrain.batch (5) does not divide among 2 processes" in err and "choose a multiple of 2" in err


def test_a_missing_table_is_one_clear_message(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    (tmp_path / "data/prepared/train.arrow").unlink()
    code, _, message = place.run_here()
    assert code == 1 and "no image table at data/prepared/train.arrow; prepare the data first" in message


@pytest.mark.acceptance
def test_two_ranks_under_torchrun_train_and_resume_as_one_stage(quiet_run: Workplace, tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = place.start(0, 1, *torchrun)
    wait_for(process, lambda: place.saved_step() >= 3)
    _, err = end(process, signal.SIGTERM)
    stopped_at = place.saved_step()
    assert f"stopped after step {stopped_at} of {STEPS}; its state is saved" in err
    code, out, err = place.run(0, 1, *torchrun)
    assert code == 0, err
    assert out.count("key ") == 1 and f"resuming after step {stopped_at}" in out
    assert place.metrics()["bit_exact"] is True and place.metrics()["key"] == quiet_run.metrics()["key"]
    assert place.metrics()["loss"] == pytest.approx(quiet_run.metrics()["loss"], rel=0.05)
