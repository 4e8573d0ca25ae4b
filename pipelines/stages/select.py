"""Stage select: which snapshot of the training is the teacher, and how each of them does on the validation images.

Without labels each snapshot has label-free scores only. The test split is not read.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from dino.checkpoint import load_backbone, load_tensors, save_tensors
from dino.distributed import World
from dino.draws import epoch_order
from dino.features import backbone_features, features_of
from dino.files import whole_file
from dino.images import ImageTable
from dino.intervals import wilson_interval
from dino.knn import knn_predict
from dino.snapshots import snapshots_in
from dino.vital_signs import signs_of_features
from pipelines import paths
from pipelines.evaluation.labelled import Labels
from pipelines.evaluation.snapshot_words import Scores, in_words
from pipelines.params import Params, Select
from pipelines.processes.progress import progress
from pipelines.processes.stage import run_stage
from pipelines.rows import tracking

TOGETHER = 4  # snapshots in memory at once: each image is decoded once for so many of them
COLUMNS = ("step", "epoch", "val_top1", "val_top1_low", "val_top1_high", "rank_me", "feature_std")


class Seen(NamedTuple):
    """Images of a table that snapshots are judged by."""

    table: ImageTable
    rows: list[int]
    labels_N: Tensor  # int64; NO_LABEL where an image has none


NO_LABEL = -1


def main(params: Params) -> None:
    """Judge every snapshot, write the chosen one as the teacher."""
    with World.start() as world:
        select(params, world)


def select(params: Params, world: World) -> None:
    """Write models/teacher.safetensors, metrics/select.json and plots/select.csv.

    Raises:
        ValueError: no snapshots, an epoch that was not kept, `best` without labels, fewer labelled training images than
            neighbours, or sizes that do not fit the network.
    """
    chosen, files, labels = params.select, snapshots_in(paths.SNAPSHOTS), Labels.read()
    why_no_knn = labels.why_not(("train", "val"))
    refuse_impossible(chosen.checkpoint, [*files], why_no_knn)
    bank = seen_images("train", labels, 0 if why_no_knn else chosen.bank_images, chosen.seed, labelled=True)
    val = seen_images("val", labels, chosen.val_images, chosen.seed, labelled=False)
    if not why_no_knn and chosen.neighbours > len(bank.rows):
        raise ValueError(
            f"select.neighbours is {chosen.neighbours}, but the bank has {len(bank.rows)} labelled training images: "
            f"choose at most {len(bank.rows)}"
        )
    scores = list(judge(params, files, bank, val, world))
    if not world.is_main:
        return
    epoch = choose(chosen.checkpoint, scores)
    tensors, facts = load_tensors(files[epoch])
    size = {"resize_px": params.embed.resize_px, "crop_px": params.embed.crop_px}  # for who uses the teacher elsewhere
    selected = {"checkpoint": chosen.checkpoint, "among": [*files]}
    save_tensors(paths.TEACHER, tensors, {**facts, "selected": selected, "evaluation": size})
    write_curves(scores)
    metrics = {
        "checkpoint": str(chosen.checkpoint),
        **next(found for found in scores if found["epoch"] == epoch),
        "scores_by_epoch": {str(found["epoch"]): found for found in scores},
        "bank_images": len(bank.rows),
        "val_images": len(val.rows),
        "words": in_words(scores, epoch),
        **({"without_knn": why_no_knn} if why_no_knn else {}),
    }
    points = [(int(found["step"]), {f"snapshot/{name}": found[name] for name in COLUMNS[2:] if name in found})
              for found in scores]  # fmt: skip
    tracking.evaluation(facts["key"], "select", metrics, points=points, params=params)
    print(
        f"select: epoch {epoch} of {[*files][-1]} is the teacher ({chosen.checkpoint}). {metrics['words']}", flush=True
    )


def refuse_impossible(checkpoint: str | int, epochs: Sequence[int], why_no_knn: str) -> None:
    """Refuse a choice that cannot be made."""
    if checkpoint == "best" and why_no_knn:
        raise ValueError(
            f"select.checkpoint is best, but {why_no_knn}: choose last or an epoch ({', '.join(map(str, epochs))}), "
            "or give labels (images in folders named by their class)"
        )
    if isinstance(checkpoint, int) and checkpoint not in epochs:
        raise ValueError(
            f"select.checkpoint is {checkpoint}, an epoch whose teacher was not kept: choose one of "
            f"{', '.join(map(str, epochs))}, or last, or best (pretrain.snapshot_epochs says which are kept)"
        )


def choose(checkpoint: str | int, scores: Sequence[Scores]) -> int:
    """Epoch of the teacher; of equally good ones the later."""
    if checkpoint == "best":
        return int(max(scores, key=lambda found: (found["val_top1"], found["epoch"]))["epoch"])
    return int(scores[-1]["epoch"]) if checkpoint == "last" else int(checkpoint)


def seen_images(split: str, labels: Labels, most: int, seed: int, *, labelled: bool) -> Seen:
    """At most so many images of a split, chosen by the seed, in the table's order; with `labelled` of those with one.

    Raises:
        ValueError: no such table, or labels of other images.
    """
    table = ImageTable(paths.IMAGES[split])
    label = labels.of_images(split, table.ids)
    order = epoch_order(seed, 0, len(table)).tolist()
    rows = sorted([row for row in order if not labelled or label[row] is not None][:most])
    return Seen(table, rows, torch.tensor([NO_LABEL if label[row] is None else label[row] for row in rows]))


def judge(params: Params, files: dict[int, Any], bank: Seen, val: Seen, world: World) -> Iterator[Scores]:
    """Scores of each snapshot, in order; on other ranks than the main one nothing, but they share the work."""
    epochs = [*files]
    total = math.ceil(len(epochs) / TOGETHER) * (len(bank.rows) + len(val.rows))  # decoded once for so many
    with progress("select:", total) if world.is_main else nullcontext(lambda more, note="": None) as advance:
        for first in range(0, len(epochs), TOGETHER):
            together = epochs[first : first + TOGETHER]
            networks = [load_backbone(files[epoch]) for epoch in together]
            extractors = [
                backbone_features(
                    network.to(world.device),
                    resize_px=params.embed.resize_px,
                    crop_px=params.embed.crop_px,
                    mean=facts["mean"],
                    std=facts["std"],
                )
                for network, facts in networks
            ]

            of_bank, of_val = (
                features_of(
                    extractors,
                    seen.table,
                    seen.rows,
                    batch=params.runtime.embed.batch,
                    world=world,
                    advance=advance,
                )
                for seen in (bank, val)
            )
            for epoch, (_, facts), bank_ND, val_MD in zip(together, networks, of_bank, of_val, strict=True):
                if world.is_main:
                    yield {
                        "epoch": epoch,
                        "step": facts["step"],
                        **label_free(val_MD),
                        **(
                            knn_scores(params.select, bank_ND, bank.labels_N, val_MD, val.labels_N) if bank.rows else {}
                        ),
                    }


def label_free(features_ND: Tensor) -> dict[str, float]:
    """What features tell without labels: directions in use (RankMe) and spread on the unit sphere."""
    return {name: float(value) for name, value in signs_of_features(features_ND).items()}


def knn_scores(
    chosen: Select, bank_ND: Tensor, bank_labels_N: Tensor, val_MD: Tensor, val_labels_M: Tensor
) -> dict[str, float]:
    """Top-1 on the labelled validation images, with Wilson's 95 % interval."""
    known_M = val_labels_M != NO_LABEL
    k = chosen.neighbours
    predicted = knn_predict(bank_ND, bank_labels_N, val_MD[known_M], neighbours=[k], temperature=chosen.temperature)[k]
    right, count = int((predicted == val_labels_M[known_M]).sum()), int(known_M.sum())
    low, high = wilson_interval(right, count)
    return {"val_top1": right / count, "val_top1_low": low, "val_top1_high": high}


def write_curves(scores: Sequence[Scores]) -> None:
    """Scores against the step, as DVC's plots read them; without labels the columns of k-NN are empty."""
    with whole_file(paths.SELECT_CURVES) as aside:
        pd.DataFrame(scores, columns=COLUMNS).to_csv(aside, index=False, lineterminator="\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage("select", main, shared=True)
