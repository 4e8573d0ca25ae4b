"""The paper's linear evaluation: learning rate chosen on val, that classifier tested once.

One pass over the images serves both backbones, the trained and the untrained, and all learning rates.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from dino.checkpoint import load_backbone
from dino.distributed import World
from dino.features import features_of
from dino.files import whole_file
from dino.images import ImageTable
from dino.linear import Crops, evaluation_features, linear_features, train_linear
from dino.regression import Classifiers
from dino.vision_transformer import VisionTransformer
from dino.weights import untrained_backbone
from pipelines import paths
from pipelines.evaluation.evaluate import Judged, Score, best, evaluate, evaluation_device, warn
from pipelines.evaluation.labelled import Labels
from pipelines.evaluation.view_check import check_view
from pipelines.params import Linear, Params
from pipelines.processes.progress import progress
from pipelines.processes.stage import run_stage

KINDS = ("trained", "untrained")  # raw pixels are judged by `probe`
CURE = "put smaller ones into linear.lrs_at_256"


class Images(NamedTuple):
    """The labelled images of a split."""

    table: ImageTable
    rows_N: Tensor  # int64
    labels_N: Tensor  # int64, where the classifiers are trained


Epoch = dict[float, Score | None]  # score on val of each learning rate that did not diverge


def main(params: Params) -> None:
    """Evaluate both backbones."""
    with World.start() as world:
        linear(params, world)


def linear(params: Params, world: World) -> None:
    """Write metrics/linear.json and plots/linear.csv.

    Raises:
        ValueError: files that are missing or do not fit each other, more blocks than the network has, every learning
            rate diverged.
    """
    trained, facts = load_backbone(paths.TEACHER)
    check_view(params.embed, trained, facts, channels=ImageTable(paths.TRAIN_IMAGES).channels)
    networks = [network.to(world.device) for network in (trained, untrained_backbone(facts))]
    curves: dict[str, list[Epoch]] = {kind: [] for kind in KINDS}

    def judge(labels: Labels) -> dict[str, Judged]:
        return judge_linear(params, world, networks, facts, labels, curves)

    protocol = in_words(trained, params.linear)
    _, judged = evaluate("linear", params, world, judge, key=facts["key"], protocol=protocol)
    if world.is_main:
        write_curves(judged, curves)


def in_words(backbone: nn.Module, linear: Linear) -> str:
    """The protocol as it is followed."""
    if isinstance(backbone, VisionTransformer):
        blocks = f"the last {linear.blocks} blocks" if linear.blocks > 1 else "the last block"
        seen = f"CLS of {blocks}{' and the mean patch token' if linear.patch_average else ''}"
    else:
        seen = "pooled output (linear.blocks and linear.patch_average have no meaning for this network)"
    return (
        f"the paper's linear evaluation: frozen backbone, {seen}, not normalised; random crops and flips of train; "
        f"SGD, momentum {linear.momentum:g}, no weight decay, batch {linear.batch}, {linear.epochs} epoch"
        f"{'s' * (linear.epochs > 1)}, cosine to 0; lr chosen on val after the last epoch, that classifier tested "
        "once, not refitted on train + val"
    )


def judge_linear(
    params: Params,
    world: World,
    networks: Sequence[nn.Module],
    facts: Mapping[str, Any],
    labels: Labels,
    curves: Mapping[str, list[Epoch]],
) -> dict[str, Judged]:
    """Train on train, add each epoch's scores on val to `curves`, predict test by the learning rate best on val."""
    asked, sizes, device = params.linear, params.embed, evaluation_device(world)
    train, val, test = (labelled_images(labels, split, device) for split in paths.IMAGES)
    normalised = {"mean": facts["mean"], "std": facts["std"]}
    seen = [linear_features(network, blocks=asked.blocks, patch_average=asked.patch_average) for network in networks]
    view = {"resize_px": sizes.resize_px, "crop_px": sizes.crop_px} | normalised
    extractors = [evaluation_features(features, **view) for features in seen]

    def features_on(images: Images) -> list[Tensor]:
        rows, batch = images.rows_N.tolist(), params.runtime.embed.batch
        found = features_of(extractors, images.table, rows, batch=batch, world=world)
        return [finite(features_MD).to(device) for features_MD in found]

    on_val = features_on(val)
    classifiers: list[Classifiers] = []
    total = asked.epochs * len(train.rows_N)
    with progress("linear", total) if world.is_main else nullcontext(lambda more, note="": None) as advance:
        for classifiers in train_linear(
            seen,
            *train,
            crops=Crops(sizes.crop_px, asked.scale, asked.ratio, asked.flip),
            lrs_at_256=asked.lrs_at_256,
            epochs=asked.epochs,
            batch=asked.batch,
            momentum=asked.momentum,
            seed=asked.seed,
            world=world,
            advance=advance,
            **normalised,
        ):
            for kind, trained_S, features_MD in zip(KINDS, classifiers, on_val, strict=True):
                right = trained_S.right(features_MD, val.labels_N)
                scores = [None if count is None else Score(count, len(val.labels_N)) for count in right]
                curves[kind].append(dict(zip(asked.lrs_at_256, scores, strict=True)))
            advance(0, note_of(curves))
    return {
        kind: conclude(kind, asked.lrs_at_256, curves[kind][-1], trained_S, features_MD, test.labels_N)
        for kind, trained_S, features_MD in zip(KINDS, classifiers, features_on(test), strict=True)
    }


def labelled_images(labels: Labels, split: str, device: torch.device) -> Images:
    """The labelled images of a split.

    Raises:
        ValueError: the labels are those of other images.
    """
    table = ImageTable(paths.IMAGES[split])
    labelled = [(row, label) for row, label in enumerate(labels.of_images(split, table.ids)) if label is not None]
    rows_N, labels_N = torch.tensor(labelled, dtype=torch.int64).unbind(1)
    return Images(table, rows_N, labels_N.to(device))


def finite(features_MD: Tensor) -> Tensor:
    """The same.

    Raises:
        ValueError: some are not finite.
    """
    if not features_MD.isfinite().all():
        raise ValueError(
            f"{paths.TEACHER} gives features that are not finite; its training diverged: lower pretrain.lr_at_256 or "
            "lengthen pretrain.warmup_epochs"
        )
    return features_MD


def note_of(curves: Mapping[str, list[Epoch]]) -> str:
    """How the trained backbone stands on val, for the progress line."""
    scores = [score for score in curves["trained"][-1].values() if score]
    top1 = f"{100 * max(scores).metrics()['top1']:.1f} %" if scores else "diverged"
    return f"val {top1} after epoch {len(curves['trained'])}"


def conclude(
    kind: str,
    lrs: Sequence[float],
    last: Epoch,
    classifiers: Classifiers,
    features_MD: Tensor,
    labels_M: Tensor,
) -> Judged:
    """Choose on val, predict test, warn of what diverged and of a choice at the edge of what was tried.

    Raises:
        ValueError: every learning rate diverged.
    """
    kept = {lr: score for lr, score in last.items() if score is not None}
    diverged = [f"lr_at_256 {lr:g}" for lr in lrs if lr not in kept]
    warn("linear", [f"{kind}: {lr} diverged, which loses" for lr in diverged])
    if not kept:
        raise ValueError(f"linear classifiers of the {kind} backbone diverged with every learning rate; {CURE}")
    lr = best(kept)
    if len(lrs) > 1 and lr in (min(lrs), max(lrs)):
        end = "smallest" if lr == min(lrs) else "largest"
        warn("linear", [f"{kind}: lr_at_256 {lr:g} is the {end} of linear.lrs_at_256: one beyond it may do better"])
    predicted_M = classifiers.predict(features_MD)[lrs.index(lr)]
    tried = {"lr_at_256": {f"{tried:g}": score for tried, score in kept.items()}}
    return Judged({"lr_at_256": lr}, kept[lr], tried, predicted_M.cpu(), labels_M.cpu(), diverged)


def write_curves(judged: Mapping[str, Judged], curves: Mapping[str, Sequence[Epoch]]) -> None:
    """Write plots/linear.csv: top-1 on val after each epoch, with its interval, by the chosen learning rate.

    A header alone where nothing was judged.
    """
    columns: dict[str, list[float]] = {"epoch": list(range(1, 1 + max(map(len, curves.values()))))}
    for kind in KINDS:
        scores = [epoch[judged[kind].chosen["lr_at_256"]] for epoch in curves[kind]]
        shares = [score.metrics() for score in scores if score is not None]
        for end in ("", "_low", "_high"):
            columns[kind + end] = [share[f"top1{end}"] for share in shares]
    with whole_file(paths.LINEAR_CURVE) as aside:
        pd.DataFrame(columns).to_csv(aside, index=False, lineterminator="\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage("linear", main, shared=True)
