"""Test images of the report: each with its nearest training images, and what the backbone looks at in it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dino import look
from dino.augment import eval_images
from dino.checkpoint import load_backbone
from dino.images import ImageTable
from dino.knn import nearest
from dino.vision_transformer import VisionTransformer
from pipelines import paths
from pipelines.evaluation.feature_file import read_features
from pipelines.evaluation.labelled import Labels
from pipelines.pictures.charts import Picture

SIDE_PX = 112  # of a picture on the page
HEADS_UP_TO = 6  # attention heads shown
QUERY_RULE = "Not hand-picked: the first of each class by id, then the second."
QUERY_RULE_UNLABELLED = "Not hand-picked: test images at even distances in the order of their ids."


@dataclass(frozen=True)
class Classes:
    """Classes in the order of their labels, and the class of each image that has one."""

    names: Sequence[str]
    of: Mapping[tuple[str, str], str]  # split, id -> name

    @staticmethod
    def read() -> "Classes":
        """From labels.parquet."""
        labels = Labels.read()
        names, rows = labels.names, labels.table.dropna(subset="label")
        of = zip(rows["split"], rows["id"], rows["label"], strict=True)
        return Classes([names[label] for label in sorted(names)], {(split, i): names[label] for split, i, label in of})

    def counts(self) -> dict[str, list[int]]:
        """Images of each class in train, val and test."""
        counts = Counter((name, split) for (split, _), name in self.of.items())
        return {name: [counts[name, split] for split in paths.IMAGES] for name in self.names}


def choose_queries(classes: Classes, count: int) -> list[int]:
    """Rows of test images to show, not hand-picked: QUERY_RULE, with labels or without."""
    ids = ImageTable(paths.TEST_IMAGES).ids
    names = [classes.of.get(("test", image_id)) for image_id in ids]
    if not any(names):
        return np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)).tolist()
    order = {name: place for place, name in enumerate(classes.names)}
    seen: dict[str, int] = {}
    ranked = []
    for row, name in enumerate(names):
        if name is not None:
            seen[name] = seen.get(name, -1) + 1
            ranked.append((seen[name], order[name], row))
    return [row for _, _, row in sorted(ranked)[:count]]


def neighbour_rows(classes: Classes, queries: Sequence[int], neighbours: int) -> list[list[Picture]]:
    """Each query, then the training images nearest to it by the trained backbone's features, nearest first."""
    features = read_features("trained")
    test, train = (ImageTable(paths.IMAGES[split]) for split in ("test", "train"))
    bank, asked = (features.rows_ND[torch.from_numpy(features.splits == split)] for split in ("train", "test"))
    _, found_QK = nearest(bank, asked[list(queries)], min(neighbours, len(bank)))
    rows = []
    for query, found in zip(queries, found_QK.tolist(), strict=True):
        own = classes.of.get(("test", test.ids[query]), "")
        names = [classes.of.get(("train", train.ids[row]), "") for row in found]
        rows.append([
            *_pictures(test, [query], [own], [None]),
            *_pictures(train, found, names, [name == own if name and own else None for name in names]),
        ])  # fmt: skip
    return rows


def _pictures(
    table: ImageTable, rows: Sequence[int], names: Sequence[str], right: Sequence[bool | None]
) -> list[Picture]:
    pixels_BCHW, sizes_B2 = table.batch(rows)
    cut = [image[:, :h, :w] for image, (h, w) in zip(pixels_BCHW, sizes_B2.tolist(), strict=True)]
    return [
        Picture(look.fitted(look.image_picture(image), SIDE_PX), name, fits)
        for image, name, fits in zip(cut, names, right, strict=True)
    ]


def look_rows(
    classes: Classes, queries: Sequence[int], *, resize_px: int, crop_px: int
) -> tuple[list[str], list[list[Picture]]]:
    """Headings, and a row a query: the image as the backbone gets it; of a ViT PCA of its patches, and attention."""
    backbone, facts = load_backbone(paths.TEACHER)
    table = ImageTable(paths.TEST_IMAGES)
    mean, std = facts["mean"], facts["std"]
    images = eval_images(table.batch(queries), resize_px=resize_px, crop_px=crop_px, mean=mean, std=std)
    columns = [[look.seen_picture(image, mean, std) for image in images]]
    headings = ["image"]
    if isinstance(backbone, VisionTransformer):
        attention_BARS = look.attention_maps(backbone, images)
        columns.append([look.colour_picture(values) for values in look.patch_components(backbone, images)])
        columns.append([look.heat_picture(values) for values in attention_BARS.mean(1)])
        headings += ["patches (PCA)", "attention"]
        if (heads := min(attention_BARS.shape[1], HEADS_UP_TO)) > 1:
            columns += [[look.heat_picture(values) for values in attention_BARS[:, head]] for head in range(heads)]
            headings += [f"head {head + 1}" for head in range(heads)]
    names = [classes.of.get(("test", table.ids[query]), "") for query in queries]
    return headings, [
        [Picture(look.fitted(p, SIDE_PX), "" if i else name) for i, p in enumerate(row)]
        for name, *row in zip(names, *columns, strict=True)
    ]
