"""MLflow's model registry: versions of one registered model, and which of them is `champion`.

One version a checkpoint, told apart by DVC's md5 of the teacher; it holds code (served.py beside this file) and no
weights. What a version scored, when it was champion, after whom and why stands in its tags.
"""

import warnings
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow import MlflowClient, pyfunc
from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from pipelines import paths
from pipelines.registered.version import BEFORE_TAG, ROLLED_BACK_TAG, SINCE_TAG, UNTIL_TAG, WHY_TAG, Version, tags_of
from pipelines.rows import workspace
from pipelines.rows.alone import alone
from pipelines.rows.mlflow_store import EXTERNAL_TAG, MODEL_TAG, NOTE_TAG, Row
from pipelines.rows.row import TEACHER_TAG
from pipelines.rows.view import REGISTERED_TAG

CODE = Path(__file__).with_name("served.py")
PACKAGES = (  # that served.py and dino import
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "pillow",
    "pyarrow",
    "safetensors",
    "dvc",
    "mlflow",
)
CHAMPION = "champion"
DESCRIPTION = (
    "Features of images by DINO backbones. `champion` is the best on val, moved by `python -m pipelines.promote`. Code "
    "only: the weights come by DVC's md5. `mlflow.pyfunc.load_model('models:/NAME@champion').predict(images)`"
)


def version_of(found: ModelVersion) -> Version:
    """From MLflow's own."""
    registered = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    name = (found.description or "").partition("\n")[0]
    return Version(str(found.version), name, dict(found.tags), registered)


def moment() -> str:
    """This moment as tags tell it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Registry:
    """The versions of one registered model."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        """The model need not be there yet."""
        self.client, self.model = client, model

    def versions(self) -> list[Version]:
        """All of them, the newest first."""
        found = self.client.search_model_versions(f"name = '{self.model}'", order_by=["version_number DESC"])
        return [version_of(one) for one in found]

    def champion(self) -> Version | None:
        """The version that the alias names."""
        try:
            return version_of(self.client.get_model_version_by_alias(self.model, CHAMPION))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model; no alias
                return None
            raise

    def register(self, row: Row, found: workspace.Workspace) -> Version:
        """The version of an evaluated checkpoint, made if there is none, with the scores of its latest evaluation."""
        md5, tags = row.tags[TEACHER_TAG], tags_of(found)
        with alone:
            known = self.client.search_model_versions(f"name = '{self.model}' and tags.`{TEACHER_TAG}` = '{md5}'")
            version = version_of(known[0]) if known else self._new(row, md5, tags)
            for name, text in tags.items():
                if version.tags.get(name) != text:
                    self._tag(version.number, name, text)
            if REGISTERED_TAG not in row.tags:
                row.add_tags({REGISTERED_TAG: f"{self.model}/{version.number}"})
                row.tell()
        return version_of(self.client.get_model_version(self.model, version.number))

    def crown(self, version: Version, why: str) -> None:
        """Make it the champion; it remembers the one before."""
        with alone:
            before = self.champion()
            for name, text in ((BEFORE_TAG, before.number if before else ""), (WHY_TAG, why)):
                self._tag(version.number, name, text)
            self._move(before, version)

    def roll_back(self) -> tuple[Version, Version]:
        """Make the champion before this one champion again.

        Returns:
            The one that was, and the one that is now.

        Raises:
            ValueError: there is none before it.
        """
        with alone:
            now = self.champion()
            if now is None:
                raise ValueError(f"{self.model} has no champion; `python -m pipelines.promote` makes one")
            before = self._before(now)
            if before is None:
                raise ValueError(
                    f"version {now.number} of {self.model} stays champion: it knows of none before it that was not "
                    "rolled back; an alias is set by hand in MLflow's pages (make ui, Model registry)"
                )
            self._move(now, before)
            self._tag(now.number, ROLLED_BACK_TAG, moment())
            return now, before

    def _before(self, version: Version) -> Version | None:
        """The nearest champion before this one that was not rolled back itself."""
        known = {one.number: one for one in self.versions()}
        seen = {version.number}
        found: Version | None = version
        while found and (found is version or ROLLED_BACK_TAG in found.tags):
            found = known.get(found.tags.get(BEFORE_TAG, ""))
            if found and found.number in seen:
                return None
            seen |= {found.number} if found else set()
        return found

    def _move(self, before: Version | None, version: Version) -> None:
        self.client.set_registered_model_alias(self.model, CHAMPION, version.number)
        self._tag(version.number, SINCE_TAG, moment())
        if UNTIL_TAG in version.tags:
            self.client.delete_model_version_tag(self.model, version.number, UNTIL_TAG)
        if before:
            self._tag(before.number, UNTIL_TAG, moment())

    def _new(self, row: Row, md5: str, tags: dict[str, str]) -> Version:
        try:
            self.client.create_registered_model(self.model, description=DESCRIPTION)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model = self.client.get_logged_model(row.tags[MODEL_TAG])
        _upload_code(self.client, model, md5)
        about = f"{row.name}\n\n{row.tags.get(NOTE_TAG, '')}"
        tags = {TEACHER_TAG: md5} | tags
        made = self.client.create_model_version(
            self.model, model.artifact_location, row.run_id, tags, None, about, model_id=model.model_id
        )
        return version_of(made)

    def _tag(self, number: str, name: str, text: str) -> None:
        self.client.set_model_version_tag(self.model, number, name, text)


def _upload_code(client: MlflowClient, model: LoggedModel, md5: str) -> None:
    """Make the record of a model loadable."""
    dino = find_spec("dino")
    assert dino and dino.origin
    requirements = [f"{package}=={metadata.version(package)}" for package in PACKAGES]
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow's advice on signatures
        pyfunc.save_model(
            path=f"{folder}/model",
            python_model=str(CODE),
            code_paths=[str(Path(dino.origin).parent)],
            model_config={"md5": md5, "repository": str(paths.real_root())},
            pip_requirements=requirements,
            mlflow_model=Model(run_id=model.source_run_id, model_id=model.model_id),
        )
        client.log_model_artifacts(model.model_id, f"{folder}/model")
    client.set_logged_model_tags(model.model_id, {EXTERNAL_TAG: "false"})
