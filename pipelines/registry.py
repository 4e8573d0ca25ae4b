"""MLflow's model registry: versions of one registered model, and which of them is `champion`.

One version a checkpoint, told apart by DVC's md5 of the teacher. What a version scored, when it was champion, after
whom and why stands in its tags.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipelines import paths
from pipelines.mlflow_store import MODEL_TAG, Row

CHAMPION = "champion"
MD5_TAG = f"dvc.{paths.TEACHER}"
SINCE_TAG, UNTIL_TAG = "champion.since", "champion.until"  # of the latest time that it was
BEFORE_TAG, WHY_TAG = "champion.before", "champion.why"  # the champion's number that it followed; the deciding words
ROLLED_BACK_TAG = "champion.rolled_back"  # when; such a version is not promoted again


@dataclass(frozen=True)
class Version:
    """A registered checkpoint.

    Attributes:
        number: MLflow's, counted from 1.
        tags: Words, and scores as text.
        registered: When, UTC.
    """

    number: str
    tags: Mapping[str, str]
    registered: datetime

    @property
    def scores(self) -> dict[str, float]:
        """Its numbers by their names in MLflow (`knn/val_top1`)."""
        return {name: float(text) for name, text in self.tags.items() if "/" in name and not name.startswith("dvc.")}

    @staticmethod
    def of(found: ModelVersion) -> "Version":
        """From MLflow's own."""
        registered = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
        return Version(str(found.version), dict(found.tags), registered)


def now() -> str:
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
        return [Version.of(one) for one in found]

    def champion(self) -> Version | None:
        """The version that the alias names."""
        try:
            return Version.of(self.client.get_model_version_by_alias(self.model, CHAMPION))
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no model; no alias
                return None
            raise

    def register(self, row: Row, tags: Mapping[str, str]) -> Version:
        """The version of the row's checkpoint, made if there is none, with these tags."""
        md5 = row.tags[MD5_TAG]
        question = f"name = '{self.model}' and tags.`{MD5_TAG}` = '{md5}'"
        found = self.client.search_model_versions(question)
        version = Version.of(found[0]) if found else self._new(row)
        for name, text in {MD5_TAG: md5, **tags}.items():
            if version.tags.get(name) != text:
                self._tag(version.number, name, text)
        return Version.of(self.client.get_model_version(self.model, version.number))

    def crown(self, version: Version, why: str) -> None:
        """Make it the champion; it remembers the one before."""
        before = self.champion()
        for name, text in ((SINCE_TAG, now()), (BEFORE_TAG, before.number if before else ""), (WHY_TAG, why)):
            self._tag(version.number, name, text)
        self.client.set_registered_model_alias(self.model, CHAMPION, version.number)
        if before:
            self._tag(before.number, UNTIL_TAG, now())

    def _new(self, row: Row) -> Version:
        try:
            self.client.create_registered_model(self.model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model = self.client.get_logged_model(row.tags[MODEL_TAG])
        return Version.of(
            self.client.create_model_version(
                self.model, model.artifact_location, run_id=row.run_id, model_id=model.model_id
            )
        )

    def _tag(self, number: str, name: str, text: str) -> None:
        self.client.set_model_version_tag(self.model, number, name, text)
