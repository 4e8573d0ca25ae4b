"""Which class is taken for which: the confusion matrix of plots/knn_predictions.csv."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from pipelines import paths
from pipelines.reading import reading


class Error(NamedTuple):
    """Images of one class taken for another; share: of that class's images."""

    actual: str
    predicted: str
    images: int
    of: int
    share: float


@dataclass(frozen=True)
class Confusion:
    """Test images by actual class (rows) and predicted class (columns), int64 [classes, classes]."""

    names: Sequence[str]
    counts: np.ndarray

    @staticmethod
    def read(names: Sequence[str]) -> "Confusion | None":
        """From the k-NN's predictions; None where there are none (no labels).

        Args:
            names: Classes in their order; those that no test image has, or is taken for, are left out.
        """
        if not paths.KNN_PREDICTIONS.is_file():
            return None
        # A class may be named "nan" or "NA": every word is a name.
        with reading(paths.KNN_PREDICTIONS, "knn"):
            table = pd.read_csv(paths.KNN_PREDICTIONS, dtype=str, keep_default_na=False)
            found = {*table["actual"], *table["predicted"]}
            if table.empty:
                return None
            order = [name for name in names if name in found]
            order += sorted(found.difference(order))
            crossed = pd.crosstab(table["actual"], table["predicted"]).reindex(index=order, columns=order, fill_value=0)
            return Confusion(order, crossed.to_numpy())

    @property
    def shares(self) -> np.ndarray:
        """Of each actual class, the share given to each class; 0 for a class without test images."""
        totals = self.counts.sum(axis=1, keepdims=True)
        return self.counts / np.maximum(totals, 1)

    def worst(self, count: int) -> list[Error]:
        """The most frequent errors, by share of the actual class; equals in the classes' order."""
        wrong = self.shares * ~np.eye(len(self.names), dtype=bool)
        places = np.argsort(-wrong, axis=None, kind="stable")[:count]
        rows, columns = np.unravel_index(places, wrong.shape)
        return [
            Error(self.names[row], self.names[column], int(self.counts[row, column]), int(self.counts[row].sum()),
                  float(wrong[row, column]))
            for row, column in zip(rows, columns, strict=True)
            if wrong[row, column] > 0
        ]  # fmt: skip
