"""One door for metrics: JSON first, then MLflow. JSON files and dvc.lock are the truth; MLflow is a view.

A stage calls `pretraining` or `evaluation`; neither raises nor waits for a server that is away. Rows are sent from a
thread that imports mlflow itself, so that a stage pays nothing for it while it computes.
"""

import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dino.files import whole_file
from pipelines import paths
from pipelines.rows import baseline, origin, row, workspace

if TYPE_CHECKING:  # mlflow costs two seconds: the thread imports it
    from pipelines.rows.mlflow_store import Row, Store

GATHER_SECONDS = 2.0  # points of curves are sent together, this often
RETRY_SECONDS = 30.0  # a server that is away is asked again, this often
CLOSE_SECONDS = 60.0  # the longest that a stage's end waits for what is not sent yet
LONGEST_WHY = 200  # characters of a database's or a server's words
POINTS_KEPT = 100_000  # while a server is away
REBUILD = "`python -m pipelines.sync` writes the row from the files"


def write_metrics(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write `values` as JSON that depends on them only: sorted keys, indent 2, floats as they are.

    The file appears whole: written aside, flushed to the disk, renamed. Parent folders are created.

    Raises:
        ValueError: a number is NaN or infinite; the message names its place.
        TypeError: a value or a key that JSON does not know.
    """
    if place := _not_finite(values):
        raise ValueError(
            f"{path}: {place} is not a finite number, so it is no result; "
            "find where it arises (a diverged training?), or leave it out"
        )
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with whole_file(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def _not_finite(value: Any, place: str = "") -> str:
    """Place of the first NaN or infinity inside `value` ("trained.val_by_k.5"), or ""."""
    if isinstance(value, float) and not math.isfinite(value):
        return place or "the value"
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for key, item in inner:
        if found := _not_finite(item, f"{place}.{key}" if place else str(key)):
            return found
    return ""


def tracking_uri(configured: str | None) -> str:
    """Where rows go: runtime.tracking.uri, else MLFLOW_TRACKING_URI, else SQLite at the repository's real root."""
    return configured or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.real_root() / 'mlflow.db'}"


def without_secrets(text: str) -> str:
    """`text` as people may read it: no user and password in any address."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def open_store(params: Any) -> "Store":
    """The store that `params.runtime.tracking` names; created if it is new. Imports mlflow."""
    from pipelines.rows.mlflow_store import Store

    chosen = row.plain(params)["runtime"]["tracking"]
    return Store(tracking_uri(chosen["uri"]), chosen["experiment"])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Tracker:
    """Writes one row of MLflow from a thread of its own: no call waits for a server, none raises for one.

    What can't be sent is kept and tried again. What is still unsent when the stage ends is given up after a bounded
    time. Either is told once, with the command that brings it to MLflow later.
    """

    def __init__(self, open_row: "Callable[[], Row] | None", where: str) -> None:
        """`open_row` connects, inside the thread (None: tracking is off); `where` names the store to people."""
        self._open_row, self._where = open_row, where
        self._jobs: deque[Callable[[Row], object]] = deque()
        self._points: list[tuple[int, int, dict[str, float]]] = []
        self._change = threading.Condition()
        self._row: Row | None = None
        self._closing = self._away = self._told = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        if open_row is not None:
            self._thread.start()

    @classmethod
    def for_key(cls, key: str, params: Any, *, name: str = "") -> Self:
        """Tracker of THE row of a pretraining key, found by its tag or made; off as params or the rank say."""
        chosen = row.plain(params)["runtime"]["tracking"]
        if not chosen["enabled"] or int(os.environ.get("RANK", "0")) != 0:
            return cls(None, "")

        def open_row() -> "Row":
            return open_store(params).row(key, name or key)

        return cls(open_row, without_secrets(tracking_uri(chosen["uri"])))

    @property
    def off(self) -> bool:
        """Whether this tracker writes nothing at all."""
        return self._open_row is None

    def log_curve_points(self, points: Iterable[row.Point]) -> None:
        """Points (step, {name: value}) of curves; a step that the row has already is not logged again."""
        if self.off:
            return
        now = int(time.time() * 1000)
        with self._change:
            for step, values in points:
                self._points.append((step, now, {name: value for name, value in values.items() if name != "step"}))
            del self._points[:-POINTS_KEPT]
            self._change.notify()

    def tag(self, tags: Mapping[str, Any]) -> None:
        """Facts in words: device, precision, whether a resumed run is still bit-exact."""
        words = row.texts(tags)
        self.submit(lambda r: r.add_tags(words))

    def dataset(self, name: str, path: str | Path, md5: str, *, context: str = "pretraining") -> None:
        """A data set by DVC's md5."""
        lineage = [row.Lineage(name, str(path), md5, context)]
        self.submit(lambda r: r.add_data(lineage))

    def submit(self, job: "Callable[[Row], object]") -> None:
        """Have the thread do `job` with the row; it is done again from its start if the server is lost meanwhile."""
        if self.off:
            return
        with self._change:
            self._jobs.append(job)
            self._change.notify()

    def close(self) -> None:
        """Send what is left, in CLOSE_SECONDS at most; the last thing to call."""
        if self.off:
            return
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._tell(f"no answer within {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._jobs or self._points)
                if self._closing and not self._jobs and not self._points:
                    return
                if not self._closing and (self._away or not self._jobs):
                    pause = RETRY_SECONDS if self._away else GATHER_SECONDS
                    self._change.wait_for(lambda: self._closing, timeout=pause)
            try:
                self._send()
            except Exception as error:  # a view of results must never end the training that makes them
                if not self._go_on_after(error):
                    return

    def _send(self) -> None:
        if self._row is None:
            assert self._open_row is not None
            self._row = self._open_row()
        elif self._away:
            self._row.refresh()  # what was sent last may have arrived
        with self._change:
            points, self._points = self._points, []
        try:
            self._row.add_points(points)
        except Exception:
            with self._change:
                self._points = (points + self._points)[-POINTS_KEPT:]
            raise
        while self._jobs:
            self._jobs[0](self._row)
            self._jobs.popleft()
        if self._away:
            self._away = False
            _say("MLflow answers again; the row is up to date.")

    def _go_on_after(self, error: Exception) -> bool:
        """Tell once what happened; whether to go on sending."""
        why = first_line(error)
        self._tell(why if len(why) <= LONGEST_WHY else f"{why[:LONGEST_WHY]}...")
        from pipelines.rows.mlflow_store import can_be_tried_again

        if can_be_tried_again(error):
            self._away = True
            return not self._closing
        if self._row is None:
            return False
        with self._change:  # what the store refuses once it refuses always
            if self._jobs:
                self._jobs.popleft()
            else:
                self._points.clear()
        return True

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            _say(
                f"MLflow ({self._where}) is not up to date: {why}. No result is lost, the pipeline goes on; {REBUILD}."
            )


def first_line(error: Exception) -> str:
    """An error of MLflow, the network or ours as one line without secrets."""
    lines = str(error).strip().split("\n")
    telling = next((line for line in lines if "Error) " in line), lines[0])  # of a database, behind SQLAlchemy's words
    return without_secrets(telling) or type(error).__name__


@contextmanager
def pretraining(params: Any, key: str, *, resolved: Mapping[str, Any] | None = None) -> Iterator[Tracker]:
    """A training's row: RUNNING inside the block, then FINISHED, FAILED or KILLED. Resuming finds the same row.

    Args:
        params: All of params.yaml (pipelines.params.Params).
        key: KEY of this pretraining's intent.
        resolved: Its settings as they stand in the checkpoint (precision chosen, sizes filled in);
            `params.pretrain` if not given.
    """
    settings = row.plain(params)
    chosen = dict(resolved or settings["pretrain"])
    name = row.run_name(chosen, baseline.differences(settings))
    tracker = Tracker.for_key(key, params, name=name)
    if tracker.off:
        yield tracker
        return
    earlier: list[float] = []  # seconds of the sessions that this one resumes

    @cache
    def content() -> row.RowContent:
        lock, folder = workspace.Lock(), str(settings["data"]["folder"])
        whence, patches = origin.here()
        return row.RowContent(
            key=key,
            name=name,
            params=row.flat_params("pretrain", chosen) | row.flat_params("data", settings["data"]),
            tags=row.circumstances() | whence | row.md5_tags(lock.outs("fetch", "prepare")),
            data=workspace.data_lineage(lock, folder, workspace.read_json(paths.DATA_METRICS).get("images")),
            files=row.files_in("pictures", [paths.SAMPLES_PICTURE]) + row.files_in(origin.FOLDER, patches),
        )

    def begin(r: "Row") -> None:
        r.start()
        if not earlier:
            earlier.append(r.metrics.get("seconds/pretrain", 0.0))
        r.complete(content())

    tracker.submit(begin)
    started, status = time.monotonic(), "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        spent = time.monotonic() - started

        def end(r: "Row") -> None:
            r.add_summaries({"seconds/pretrain": sum(earlier) + spent})
            r.end(status)

        if status == "FINISHED" and (found := _found_in_workspace(key, settings, workspace.a_snapshot())):
            whole = found.content
            tracker.submit(lambda r: r.complete(whole))
        tracker.submit(end)
        tracker.close()


def _found_in_workspace(
    key: str, settings: Mapping[str, Any], checkpoint: Path = paths.TEACHER
) -> workspace.Workspace | None:
    """What the working directory holds of this key; None while its checkpoint is not there."""
    try:
        found = workspace.gather(settings, checkpoint)
    except Exception:  # a view of results must never end the stage that has made them
        return None
    return found if found.content.key == key else None


def evaluation(
    key: str,
    stage: str,
    metrics: Mapping[str, Any],
    *,
    points: Sequence[row.Point] = (),
    pictures: Sequence[str | Path] = (),
    params: Any = None,
) -> None:
    """Write metrics/STAGE.json, then the numbers into the row of `key`.

    The settings (embed, knn, probe, linear) of the first evaluation are the row's own; other settings of the same
    checkpoint become a row below it.

    Args:
        key: The checkpoint's key.
        stage: knn, probe or linear.
        metrics: What the JSON file shall hold.
        points: Of curves, by the step of the training.
        pictures: Files to show beside the numbers.
        params: All of params.yaml; read from the working directory if not given.

    Raises:
        ValueError: a number in `metrics` is not finite.
    """
    path = workspace.EVALUATIONS[stage]
    write_metrics(path, metrics)
    settings = row.plain(_params_here() if params is None else params)
    numbers, words = row.summarise(stage, metrics)
    content = row.EvaluationContent(
        digest=row.evaluation_digest(settings),
        params=row.evaluation_params(settings),
        summaries=numbers,
        tags=words,
        files=[(path, "metrics"), *row.files_in("pictures", pictures)],
        points=list(points),
    )
    _into_row(key, settings, content)


def report(
    key: str, *, pages: Sequence[str | Path] = (), pictures: Sequence[str | Path] = (), params: Any = None
) -> None:
    """Complete the row of `key` from all that the working directory holds, add the report, register the checkpoint."""
    settings = row.plain(_params_here() if params is None else params)
    content = row.EvaluationContent(
        digest=row.evaluation_digest(settings),
        params=row.evaluation_params(settings),
        files=row.files_in("report", [*pages, *pictures]),
    )
    _into_row(key, settings, content, whole=True)


def _into_row(key: str, settings: Mapping[str, Any], content: row.EvaluationContent, *, whole: bool = False) -> None:
    found = _found_in_workspace(key, settings)
    tracker = Tracker.for_key(key, settings, name=found.content.name if found else "")

    def add(r: "Row") -> None:
        from pipelines.rows.mlflow_store import add_evaluation

        if found:
            r.complete(found.content)
        target = add_evaluation(r.store, r, key, content)
        if origin.COMMIT_TAG not in target.tags:  # other settings of the evaluation: a row that no training began
            target.add_origin(*origin.here())
        if whole and found and found.evaluation:
            from pipelines.registered.registry import Registry

            add_evaluation(r.store, r, key, found.evaluation)
            Registry(r.client, settings["runtime"]["promote"]["model"]).register(r, found)

    tracker.submit(add)
    tracker.close()


def _params_here() -> Any:
    from pipelines.params import load

    return load()
