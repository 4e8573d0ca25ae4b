"""Features of the trained backbone, of the same network untrained, and raw pixels, for every image of every split.

One pass over the images: each is decoded once for all three.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import torch

from dino.checkpoint import load_backbone
from dino.distributed import World
from dino.features import backbone_features, feature_batches, pixel_features
from dino.images import ImageTable
from dino.weights import untrained_backbone
from pipelines import paths
from pipelines.evaluation.feature_file import GROUP_ROWS, Write, feature_writer
from pipelines.evaluation.view_check import check_view
from pipelines.params import Embed, Params
from pipelines.processes.progress import progress
from pipelines.processes.shortage import MemoryShortError, in_short, lacks_memory
from pipelines.processes.stage import run_stage

PIXEL_NUMBERS = 4096  # of an image; beyond it the pixels' probe and k-NN outgrow memory and patience


def main(params: Params) -> None:
    """Embed all images."""
    batch = params.runtime.embed.batch
    with World.start() as world:
        try:
            embed(params.embed, batch=batch, world=world)
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error) or batch == 1:
                raise
            raise MemoryShortError(
                f"out of memory ({in_short(error)}) with {batch} images at once: set runtime.embed.batch to "
                f"{batch // 2}, which changes speed only"
            ) from error


def embed(sizes: Embed, *, batch: int, world: World) -> None:
    """Write features/{trained,untrained,pixels}.parquet.

    Raises:
        ValueError: sizes that do not fit the network or the images, images of other channels than the network's,
            features that are not finite.
    """
    trained, facts = load_backbone(paths.TEACHER)
    tables = {split: ImageTable(path) for split, path in paths.IMAGES.items()}
    check_view(sizes, trained, facts, channels=tables["train"].channels)
    check_pixels(sizes.pixels_px, facts["channels"])
    networks = {"trained": trained, "untrained": untrained_backbone(facts)}
    view = {"resize_px": sizes.resize_px, "crop_px": sizes.crop_px}
    extractors = {
        kind: backbone_features(network.to(world.device), **view, mean=facts["mean"], std=facts["std"])
        for kind, network in networks.items()
    }
    # the same part of the image, shrunk
    resize_px = round(sizes.resize_px * sizes.pixels_px / sizes.crop_px)
    extractors["pixels"] = pixel_features(resize_px=max(resize_px, sizes.pixels_px), crop_px=sizes.pixels_px)
    total = sum(map(len, tables.values()))
    with ExitStack() as open_files:
        writers = {}
        if world.is_main:
            for kind in extractors:
                key = facts["key"] if kind in networks else None
                file = feature_writer(paths.features_file(kind), kind=kind, key=key)
                writers[kind] = open_files.enter_context(file)
        advance = open_files.enter_context(progress("embed", total)) if world.is_main else ignore
        for split, table in tables.items():
            for first in range(0, len(table), GROUP_ROWS):
                rows = range(first, min(first + GROUP_ROWS, len(table)))
                parts = []
                for found in feature_batches(list(extractors.values()), table, rows, batch=batch, world=world):
                    parts.append(found)
                    advance(len(found[0]))
                for kind, features in zip(extractors, zip(*parts, strict=True), strict=True):
                    write_group(writers, kind, split, table.ids[first : rows.stop], torch.cat(features))
    world.barrier()  # no rank goes on before the files are there
    if world.is_main:
        print(f"embed: {total:,} images, {facts['arch']['embed_dim']} features each", flush=True)


def ignore(more: int) -> None:
    """Tell nobody: another rank does."""


def write_group(writers: Mapping[str, Write], kind: str, split: str, ids: list[str], features_ND: torch.Tensor) -> None:
    """Write one row group, on the rank that writes.

    Raises:
        ValueError: features that are not finite.
    """
    if not features_ND.isfinite().all():
        raise ValueError(
            f"{paths.TEACHER}: the {kind} network gives features that are not finite; its training diverged: "
            "lower pretrain.lr_at_256 or lengthen pretrain.warmup_epochs"
        )
    if kind in writers:
        writers[kind](split, ids, features_ND.numpy())


def check_pixels(pixels_px: int, channels: int) -> None:
    """Refuse a raw-pixels baseline that outgrows memory and patience."""
    numbers = channels * pixels_px**2
    if numbers > PIXEL_NUMBERS:
        most = int((PIXEL_NUMBERS / channels) ** 0.5)
        raise ValueError(
            f"embed.pixels_px ({pixels_px}) makes {numbers:,} numbers an image of the raw-pixels baseline; "
            f"choose at most {most}"
        )


if __name__ == "__main__":
    run_stage("embed", main, shared=True)
