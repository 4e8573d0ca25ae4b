"""A registered checkpoint, as plain data, and the tags of MLflow's that say it. Knows no MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pipelines import paths
from pipelines.evaluation.scores import EVALUATIONS, Top1
from pipelines.rows import workspace
from pipelines.rows.row import EVALUATION_TAG, KEY_TAG

JUDGED_ON = tuple(f"dvc.{path}" for path in (paths.VAL_IMAGES, paths.LABELS))
HEALTH_TAG, DATA_TAG = "health", "dino.data_md5"
SINCE_TAG, UNTIL_TAG = "champion.since", "champion.until"  # of the latest time that it was
BEFORE_TAG, WHY_TAG = "champion.before", "champion.why"  # number of the one that it followed, or ""; the deciding words
ROLLED_BACK_TAG = "champion.rolled_back"  # when; such a version is not promoted again
TITLES = {path.stem: name for name, path in EVALUATIONS.items()}  # {"knn": "k-NN", ...}


@dataclass(frozen=True)
class Version:
    """A registered checkpoint.

    Attributes:
        number: MLflow's, counted from 1.
        name: What its training is called in the list of runs.
        tags: Words, and scores as text.
        registered: When, UTC.
    """

    number: str
    name: str
    tags: Mapping[str, str]
    registered: datetime

    @property
    def scores(self) -> dict[str, float]:
        """Scores and their intervals by their names in MLflow (`knn/val_top1`, `knn/val_top1_low`)."""
        return {name: float(text) for name, text in self.tags.items() if is_score(name)}

    def top1(self, stage: str, split: str) -> Top1 | None:
        """What it came to, if it was evaluated so."""
        found = self.scores
        return Top1.read(found, f"{stage}/{split}_") if f"{stage}/{split}_top1" in found else None


def is_score(name: str) -> bool:
    """Whether a number of a row is a score of the trained backbone, or an end of its interval."""
    stage, _, rest = name.partition("/")
    return stage in TITLES and rest.startswith(("val_top1", "test_top1"))


def tags_of(found: workspace.Workspace) -> dict[str, str]:
    """What a version says of an evaluated checkpoint."""
    assert found.evaluation
    tags = {KEY_TAG: found.content.key, EVALUATION_TAG: found.evaluation.digest}
    tags |= {name: text for name, text in found.content.tags.items() if name in (HEALTH_TAG, DATA_TAG, *JUDGED_ON)}
    return tags | {name: repr(value) for name, value in found.evaluation.summaries.items() if is_score(name)}
