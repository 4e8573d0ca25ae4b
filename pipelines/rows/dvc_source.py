"""The source of a data set in MLflow: a file of the repository by DVC's md5."""

from pathlib import Path
from typing import Any, Self

from mlflow.data.dataset_source import DatasetSource
from mlflow.data.dataset_source_registry import register_dataset_source

from pipelines.rows.workspace import file_md5


class DvcSource(DatasetSource):
    """A data set by path and DVC's md5: `mlflow.data.get_source(run.inputs.dataset_inputs[0])` gives one.

    `load()` gives the file's path, if that very version lies there.
    """

    def __init__(self, path: str, md5: str) -> None:
        """A file of the repository and its md5 in dvc.lock."""
        self.path, self.md5 = path, md5

    @staticmethod
    def _get_source_type() -> str:
        return "dvc"

    def load(self) -> Path:
        """The file in the working directory.

        Raises:
            FileNotFoundError: it is missing, or another version lies there.
        """
        path = Path(self.path)
        if not path.is_file() or file_md5(path) != self.md5:
            raise FileNotFoundError(
                f"{path} with md5 {self.md5} does not lie here; check out the run's git commit, then: dvc pull {path}"
            )
        return path

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        return False  # made from dvc.lock, never guessed from a path

    @classmethod
    def _resolve(cls, raw_source: Any) -> Self:
        raise NotImplementedError("name the path and the md5: DvcSource(path, md5)")

    def to_dict(self) -> dict[str, Any]:
        """What MLflow stores."""
        return {"path": self.path, "md5": self.md5}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> Self:
        """Read back what MLflow stored."""
        return cls(source_dict["path"], source_dict["md5"])


register_dataset_source(DvcSource)  # type: ignore[arg-type]  # it takes classes; mlflow annotates instances
