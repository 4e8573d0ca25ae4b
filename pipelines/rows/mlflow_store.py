"""MLflow's store: opened without races, and rows that are completed, never doubled.

Importing mlflow costs about two seconds, so this module is imported where a row is really written (tracking.py does it
in its thread). Everything goes through MlflowClient with an explicit URI: no global state, no active run, and a
failing evaluation can't mark the training's run as failed.
"""

import getpass
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException

from pipelines.rows import origin
from pipelines.rows.alone import alone
from pipelines.rows.dvc_source import DvcSource
from pipelines.rows.row import (
    CHILD_OF_TAG,
    EVALUATION_TAG,
    KEY_TAG,
    TEACHER_TAG,
    EvaluationContent,
    Lineage,
    RowContent,
)
from pipelines.rows.view import EXPERIMENT_TAGS, describe

# MLflow's own: seven retries of 120 s each. A result is safe in its JSON file, so a lost server may cost seconds only.
for _variable, _value in (
    ("MLFLOW_HTTP_REQUEST_TIMEOUT", "5"),
    ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1"),
    ("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1"),
):
    os.environ.setdefault(_variable, _value)
# A lost server is told once, in our words; creating tables and migrating is nobody's news.
logging.getLogger("mlflow").setLevel(logging.CRITICAL)
logging.getLogger("alembic").setLevel(logging.WARNING)
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)

MODEL_TAG = "dino.model_id"
EXTERNAL_TAG = "mlflow.model.isExternal"  # MLflow's: a record without anything to load
CURVES_TAG = "dino.curves_md5"
NOTE_TAG = "mlflow.note.content"
PICTURES = {"report/scores.png": "Scores", "report/attention.png": "Attention", "report/neighbours.png": "Neighbours"}
METRICS_A_BATCH, PARAMS_A_BATCH, TAGS_A_BATCH = 1000, 100, 100
# What trying again can't mend; everything else is a server or a database that is away.
FINAL = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "INVALID_STATE")


def can_be_tried_again(error: Exception) -> bool:
    """Whether the server or database may be back later; else what was sent is at fault."""
    if isinstance(error, MlflowException):
        return error.error_code not in FINAL
    return isinstance(error, OSError)


def _now_ms() -> int:
    return int(time.time() * 1000)


class Store:
    """The project's experiment at one tracking URI; a new database and experiment are made when first opened."""

    def __init__(self, uri: str, experiment: str) -> None:
        """Open `uri`.

        Raises:
            ValueError: the experiment was deleted.
        """
        self.uri = uri
        with alone:
            self.client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                self.experiment_id = self.client.create_experiment(experiment, artifact_location=_artifacts(uri))
                known: Mapping[str, str] = {}
            else:
                self.experiment_id, known = found.experiment_id, found.tags
                if found.lifecycle_stage != "active":
                    raise ValueError(
                        f"runtime.tracking.experiment: experiment {experiment!r} was deleted in MLflow; "
                        f"bring it back (mlflow experiments restore -x {found.experiment_id}) or choose another name"
                    )
            for name, value in EXPERIMENT_TAGS.items():
                if known.get(name) != value:
                    self.client.set_experiment_tag(self.experiment_id, name, value)

    def find(self, key: str) -> "Row | None":
        """THE row of a pretraining key."""
        return self._first(f"tags.`{KEY_TAG}` = '{key}'")

    def rows(self) -> "list[Row]":
        """All rows, the newest first."""
        found: list[Row] = []
        token = None
        while token != "":
            page = self.client.search_runs([self.experiment_id], order_by=["start_time DESC"], page_token=token)
            found += (Row(self, run) for run in page)
            token = page.token or ""
        return found

    def row(self, key: str, name: str) -> "Row":
        """THE row of a pretraining key, made if there is none."""
        with alone:
            return self.find(key) or self._new(name, {KEY_TAG: key})

    def child(self, parent: "Row", key: str, evaluation: EvaluationContent, name: str) -> "Row":
        """The row below `parent` of one other set of evaluation settings, made if there is none."""
        with alone:
            found = self._first(f"tags.`{CHILD_OF_TAG}` = '{key}' and tags.`{EVALUATION_TAG}` = '{evaluation.digest}'")
            return found or self._new(
                name,
                {
                    CHILD_OF_TAG: key,
                    EVALUATION_TAG: evaluation.digest,
                    "mlflow.parentRunId": parent.run_id,
                },
            )

    def _first(self, question: str) -> "Row | None":
        found = self.client.search_runs([self.experiment_id], question, order_by=["start_time ASC"], max_results=1)
        return Row(self, found[0]) if found else None

    def _new(self, name: str, tags: Mapping[str, str]) -> "Row":
        user = {"mlflow.user": os.environ.get("USER") or _user()}
        return Row(self, self.client.create_run(self.experiment_id, tags={**user, **tags}, run_name=name), new=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


def _artifacts(uri: str) -> str | None:
    """Folder of pictures and pages beside a SQLite database; a server has its own place."""
    if not uri.startswith("sqlite:///"):
        return None
    folder = Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"
    return folder.as_uri()


class Row:
    """One MLflow run. Whatever it already says is not said again, so every method may be called twice."""

    def __init__(self, store: Store, run: Run, *, new: bool = False) -> None:
        """A row as found, or (`new`) as just made."""
        self.store, self.client = store, store.client
        self.run_id: str = run.info.run_id
        self.name: str = run.info.run_name
        self._read(run)
        self._steps: dict[str, set[int]] | None = {} if new else None  # logged steps of each curve; None: not asked yet

    def _read(self, run: Run) -> None:
        self.status: str = run.info.status
        self.params: dict[str, str] = dict(run.data.params)
        self.tags: dict[str, str] = dict(run.data.tags)
        self.metrics: dict[str, float] = dict(run.data.metrics)
        self._inputs = {(i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs} if run.inputs else set()

    def refresh(self) -> None:
        """Read the row again: other processes write to it, and after an error we don't know what arrived."""
        self._read(self.client.get_run(self.run_id))
        self._steps = None

    def start(self) -> None:
        """Training goes on in this row."""
        if self.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
            self.status = "RUNNING"

    def end(self, status: str) -> None:
        """Training ended: FINISHED, FAILED or KILLED; said once, so that a finished row keeps its duration."""
        if self.status == "RUNNING":
            self.client.set_terminated(self.run_id, status=status)
            self.status = status

    def add_params(self, params: Mapping[str, str]) -> None:
        """Params that the row lacks; those that it has stay (MLflow's can't change)."""
        new = [Param(k, v) for k, v in params.items() if k not in self.params]
        for batch in _batches(new, PARAMS_A_BATCH):
            self.client.log_batch(self.run_id, params=batch)
            self.params |= {p.key: p.value for p in batch}

    def add_tags(self, tags: Mapping[str, str]) -> None:
        """Tags that differ from the row's."""
        new = [RunTag(k, v) for k, v in tags.items() if self.tags.get(k) != v]
        for batch in _batches(new, TAGS_A_BATCH):
            self.client.log_batch(self.run_id, tags=batch)
            self.tags |= {t.key: t.value for t in batch}

    def add_summaries(self, summaries: Mapping[str, float], *, step: int = 0) -> None:
        """Numbers that differ from the row's; also at the model record, if the row has one."""
        now, model = _now_ms(), self.tags.get(MODEL_TAG)
        new = [Metric(k, v, now, step, model_id=model) for k, v in summaries.items() if self.metrics.get(k) != v]
        for batch in _batches(new, METRICS_A_BATCH):
            self.client.log_batch(self.run_id, metrics=batch)
            self.metrics |= {m.key: m.value for m in batch}

    def add_points(self, points: Iterable[tuple[int, int, Mapping[str, float]]]) -> None:
        """Points (step, milliseconds since 1970, values) of curves; a step that a curve has already is left out."""
        new: list[Metric] = []
        taken: set[tuple[str, int]] = set()
        for step, when_ms, values in points:
            for name, value in values.items():
                if step not in self._logged(name) and (name, step) not in taken:
                    taken.add((name, step))
                    new.append(Metric(name, float(value), when_ms, step))
        for batch in _batches(new, METRICS_A_BATCH):
            self.client.log_batch(self.run_id, metrics=batch)
            for metric in batch:
                self._logged(metric.key).add(metric.step)
                self.metrics[metric.key] = metric.value

    def _logged(self, name: str) -> set[int]:
        if self._steps is None:
            self._read(self.client.get_run(self.run_id))
            self._steps = {}
        if name not in self._steps:
            known = name in self.metrics
            history = self.client.get_metric_history(self.run_id, name) if known else []
            self._steps[name] = {metric.step for metric in history}
        return self._steps[name]

    def add_files(self, files: Iterable[tuple[Path, str]]) -> None:
        """Files among the row's artifacts; a file of the same name is replaced."""
        for path, folder in files:
            self.client.log_artifact(self.run_id, str(path), folder or None)

    def add_origin(self, tags: Mapping[str, str], patches: Iterable[Path]) -> None:
        """Where the state that made the row comes from (pipelines/rows/origin.py)."""
        self.add_tags(tags)
        self.add_files((path, origin.FOLDER) for path in patches)

    def fetch_file(self, name: str, folder: Path) -> Path | None:
        """Bring one of the row's artifacts into `folder`; None if it has none of this name."""
        try:
            return Path(self.client.download_artifacts(self.run_id, name, str(folder)))
        except (MlflowException, OSError):
            return None

    def add_data(self, data: Iterable[Lineage]) -> None:
        """Data sets by DVC's md5."""
        new = [
            DatasetInput(
                Dataset(
                    name=one.name,
                    digest=one.md5,
                    source_type=DvcSource._get_source_type(),
                    source=DvcSource(one.path, one.md5).to_json(),
                    profile=json.dumps(one.profile) if one.profile else None,
                ),
                [InputTag("mlflow.data.context", one.context)],
            )
            for one in data
            if (one.name, one.md5) not in self._inputs
        ]
        if new:
            self.client.log_inputs(self.run_id, new)
            self._inputs |= {(one.dataset.name, one.dataset.digest) for one in new}

    def add_model(self, md5: str, name: str) -> None:
        """A record of the teacher by DVC's md5, without weights; once a row."""
        if MODEL_TAG in self.tags:
            return
        with alone:
            self._read(self.client.get_run(self.run_id))  # a sibling may have been faster
            if MODEL_TAG in self.tags:
                return
            model = self.client.create_logged_model(
                self.store.experiment_id,
                name=_model_name(name),
                source_run_id=self.run_id,
                tags={EXTERNAL_TAG: "true", TEACHER_TAG: md5},
                params={k: v for k, v in self.params.items() if k.startswith("pretrain.")},
                model_type="dino-backbone",
            )
            self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
            self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step=0)])
            self.add_tags({MODEL_TAG: model.model_id, TEACHER_TAG: md5})

    def complete(self, content: RowContent) -> None:
        """Everything that `content` knows and the row does not say yet."""
        with alone:  # k-NN and probe may both find that the row lacks its curves
            self.add_params(content.params)
            self.add_tags(content.tags)
            self.add_data(content.data)
            if content.teacher_md5:
                self.add_model(content.teacher_md5, content.name)
            if content.points_digest and self.tags.get(CURVES_TAG) != content.points_digest:
                now = _now_ms()
                self.add_points((step, now, values) for step, values in content.points)
                self.add_tags({CURVES_TAG: content.points_digest})
            self.add_summaries(content.summaries)
            self.add_files(content.files)
            self.tell()

    def tell(self) -> None:
        """Write the row's description anew from what it says by now."""
        with alone:  # k-NN and probe end at the same time: whoever comes second has read both
            self._read(self.client.get_run(self.run_id))
            shown = {entry.path for entry in self.client.list_artifacts(self.run_id, "report")}
            pictures = [
                (title, f"get-artifact?path={path}&run_uuid={self.run_id}")  # of the server whose page it is
                for path, title in PICTURES.items()
                if path in shown
            ]
            self.add_tags({NOTE_TAG: describe(self.params, self.metrics, self.tags, pictures)})


def add_evaluation(store: Store, row: Row, key: str, evaluation: EvaluationContent) -> Row:
    """Write an evaluation into its row: the training's own for the first settings, a child for any others."""
    with alone:
        row._read(store.client.get_run(row.run_id))
        if EVALUATION_TAG not in row.tags:
            row.add_tags({EVALUATION_TAG: evaluation.digest})
    if row.tags[EVALUATION_TAG] != evaluation.digest:
        parent = row
        differs = [f"{k}={v}" for k, v in evaluation.params.items() if parent.params.get(k) != v]
        row = store.child(parent, key, evaluation, ", ".join(differs)[:200] or evaluation.digest)
        row.add_params({k: v for k, v in parent.params.items() if k not in evaluation.params})
    row.add_params(evaluation.params)
    row.add_summaries(evaluation.summaries)
    row.add_tags(evaluation.tags)
    row.add_files(evaluation.files)
    row.add_points((step, _now_ms(), values) for step, values in evaluation.points)
    row.tell()
    if CHILD_OF_TAG in row.tags:
        row.end("FINISHED")
    return row


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _model_name(name: str) -> str:
    """MLflow refuses / : . % " ' in a model's name."""
    return "".join("-" if letter in "/:.%\"'" else letter for letter in name) or "teacher"
