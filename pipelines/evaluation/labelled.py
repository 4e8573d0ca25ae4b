"""Labels joined to features by split and id; images without a label are left out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipelines import paths
from pipelines.evaluation.feature_file import Features
from pipelines.reading import reading

IMAGE = ["split", "id"]
TYPES = {"split": "string", "id": "string", "label": "int64", "name": "string"}


class LabelledRows(NamedTuple):
    """Features and labels of the labelled images of one or more splits, in table order."""

    features_ND: Tensor  # float32
    labels_N: Tensor  # int64

    def to(self, device: torch.device) -> "LabelledRows":
        """The same on another device."""
        return LabelledRows(self.features_ND.to(device), self.labels_N.to(device))

    def followed_by(self, other: "LabelledRows") -> "LabelledRows":
        """Both, these first."""
        return LabelledRows(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Labels:
    """labels.parquet: split, id, label (NA: none), name, a row an image."""

    table: pd.DataFrame

    @staticmethod
    def read() -> "Labels":
        """Read it.

        Raises:
            ValueError: there is no such file, or it is damaged.
        """
        with reading(paths.LABELS, "prepare"):
            types = {field.name: str(field.type) for field in pq.read_schema(paths.LABELS)}
            if wrong := [f"{name}: {types.get(name)}" for name, right in TYPES.items() if types.get(name) != right]:
                raise TypeError(f"columns of other types: {', '.join(wrong)}")
            pq.read_table(paths.LABELS, columns=[*TYPES]).validate(full=True)  # pandas looks at texts later
            table = pd.read_parquet(paths.LABELS, columns=[*TYPES], dtype_backend="numpy_nullable")
            if table[IMAGE].isna().any(axis=None):
                raise ValueError("an image has no split or no id")
            if table.duplicated(IMAGE).any():
                raise ValueError("an image stands there twice")
            if (table["label"] < 0).any():
                raise ValueError("a label is below 0")
        return Labels(table)

    @property
    def names(self) -> Mapping[int, str]:
        """Name of each label."""
        labelled = self.table.dropna(subset="label").drop_duplicates("label")
        named = labelled["name"].fillna(labelled["label"].astype(str))
        return {int(label): str(name) for label, name in zip(labelled["label"], named, strict=True)}

    def of(self, split: str) -> dict[str, int | None]:
        """Label of each image of a split by id; None where it has none."""
        rows = self.table[self.table["split"] == split]
        return {
            image_id: None if pd.isna(label) else int(label)
            for image_id, label in zip(rows["id"], rows["label"], strict=True)
        }

    def of_images(self, split: str, ids: Sequence[str]) -> list[int | None]:
        """Label of each of these images of a split; None where it has none.

        Raises:
            ValueError: an image is not in the file.
        """
        known = self.of(split)
        if lacking := [image_id for image_id in ids if image_id not in known]:
            raise ValueError(
                f"{paths.IMAGES[split]} and {paths.LABELS} hold different images, such as {lacking[0]}; "
                "`dvc repro prepare` makes both anew"
            )
        return [known[image_id] for image_id in ids]

    def why_not(self, splits: Iterable[str] = tuple(paths.IMAGES)) -> str:
        """Why nothing can be evaluated on these splits with these labels; empty if it can."""
        labelled = self.table["label"].notna().groupby(self.table["split"]).sum()
        counts = {split: int(labelled.get(split, 0)) for split in splits}
        if not any(counts.values()):
            return "the images have no labels"
        lacking = [split for split, count in counts.items() if not count]
        return f"no image of the {' or the '.join(lacking)} split has a label" if lacking else ""

    def join(self, features: Features) -> dict[str, LabelledRows]:
        """Labelled rows of each split.

        Raises:
            ValueError: the two files hold different images.
        """
        rows = pd.DataFrame({"split": features.splits, "id": features.ids, "row": range(len(features.ids))})
        both = rows.merge(self.table, how="outer", on=IMAGE, validate="one_to_one", indicator="found")
        alone = both[both["found"] != "both"]
        if len(alone):
            example = alone.iloc[0]
            raise ValueError(
                f"{features.path} and {paths.LABELS} hold different images: {len(alone):,} are in one of them only, "
                f"such as {example['id']} ({example['split']}); `dvc repro embed` makes the features anew"
            )
        known = both.dropna(subset="label").sort_values("row")
        joined = {}
        for split in paths.IMAGES:
            part = known[known["split"] == split]
            row_N = torch.from_numpy(part["row"].to_numpy(dtype="int64", copy=True))
            label_N = torch.from_numpy(part["label"].to_numpy(dtype="int64", copy=True))
            joined[split] = LabelledRows(features.rows_ND[row_N], label_N)
        return joined
