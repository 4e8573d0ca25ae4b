"""`python -m pipelines.look IMAGE... --out FOLDER`: what a trained ViT sees in your own images.

For each image a folder of PNGs: the image as the backbone gets it, its patches coloured by their principal components,
the attention of the CLS token (mean, and each head), with --like the nearest images of an embedded folder; and
sheet.png with all of it.
"""

import argparse
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dino
from dino import knn, look
from dino.augment import normalize
from dino.decode import content_id, image_pixels
from dino.files import whole_file
from dino.pretrained import Pretrained, Transform, read_image
from dino.vision_transformer import VisionTransformer
from pipelines import paths
from pipelines.evaluation.embedded import read_embedded
from pipelines.pictures.charts import Picture, pictures_figure
from pipelines.pictures.drawing import picture_png, png
from pipelines.processes.ending import heed, leave
from pipelines.processes.stage import positive, run_command

LARGER = 2  # than the evaluation crop: the default resolution, for finer maps
SIDE_PX = 448  # of a picture, at least
SHEET_DPI = 320
NEIGHBOURS = 6

Columns = dict[str, list[Picture]]  # heading -> a picture of each image


def look_at(
    images: Sequence[Path],
    out: Path,
    checkpoint: Path,
    *,
    px: int | None = None,
    like: Path | None = None,
    neighbours: int = NEIGHBOURS,
) -> None:
    """Write a folder of pictures for each image, and sheet.png.

    Args:
        images: Of any size and mode.
        out: The folder.
        checkpoint: Of the backbone.
        px: Short side in pixels at which the backbone sees the whole image; default: twice the evaluation crop.
        like: A file of `pipelines.embed`; its nearest images are shown too, compared by their evaluation crops.
        neighbours: How many.

    Raises:
        ValueError: an image or checkpoint that cannot be read, no ViT (and no `like`), features of another checkpoint.
    """
    model = dino.load(checkpoint)
    is_vit = isinstance(model.backbone, VisionTransformer)
    if not is_vit and like is None:
        arch = model.facts["arch"]
        raise ValueError(
            f"{checkpoint} is {arch['family']}'s {arch['name']}: attention and patches are shown of this project's "
            "ViTs only; its nearest images can be shown: --like FEATURES.parquet"
        )
    crops = [seen_whole(image, model, px or LARGER * model.transform.crop_px) for image in images]
    pictures = [large(look.seen_picture(crop, [0.0], [1.0])) for crop in crops]
    columns = {"image": [Picture(picture, path.name) for picture, path in zip(pictures, images, strict=True)]}
    if is_vit:
        columns |= maps(model, crops, columns["image"])
    if like is not None:
        columns |= nearest(model, images, like, checkpoint, neighbours)
    for index, folder in enumerate(distinct([path.stem for path in images])):
        for heading, column in columns.items():
            with whole_file(out / folder / f"{'-'.join(re.findall('[a-z0-9]+', heading.lower()))}.png") as aside:
                aside.write_bytes(picture_png(column[index].pixels))
    rows = list(zip(*columns.values(), strict=True))
    with whole_file(out / "sheet.png") as aside:
        aside.write_bytes(png(pictures_figure(rows, list(columns)), dpi=SHEET_DPI))
    print(f"look: {len(images):,} images, {len(columns)} pictures each, in {out}; all together: {out / 'sheet.png'}")


def seen_whole(image: Path, model: Pretrained, px: int) -> Tensor:
    """All of an image at the resolution of the backbone, float32 [C, H, W] of 0..1."""
    pixels_CHW = torch.from_numpy(image_pixels(read_image(image), model.transform.channels).copy())
    return look.whole_image(pixels_CHW, short_px=px, multiple=getattr(model.backbone, "patch_size", 1))


def maps(model: Pretrained, crops: Sequence[Tensor], images: Sequence[Picture]) -> Columns:
    """Patches by their components, on one basis for all images, and attention over the image."""
    backbone, transform = model.backbone, model.transform
    assert isinstance(backbone, VisionTransformer)
    inputs = [normalize(crop, transform.mean, transform.std)[None] for crop in crops]
    features = [look.patch_features(backbone, one)[0] for one in inputs]
    components = look.principal_components(torch.cat([one.flatten(0, 1) for one in features]))
    parts = components.split([one.shape[0] * one.shape[1] for one in features])
    columns: Columns = {"patches (PCA)": [], "attention": []}
    for image, one, part, grid in zip(images, inputs, parts, features, strict=True):
        height, width = image.pixels.shape[:2]
        values = look.enlarged(part.unflatten(0, grid.shape[:2]), height, width)
        columns["patches (PCA)"].append(Picture(look.colour_picture(values)))
        attention_ARS = look.attention_maps(backbone, one)[0]
        columns["attention"].append(Picture(look.overlaid(image.pixels, attention_ARS.mean(0))))
        for head, values_RS in enumerate(attention_ARS if len(attention_ARS) > 1 else (), 1):
            columns.setdefault(f"head {head}", []).append(Picture(look.overlaid(image.pixels, values_RS)))
    return columns


def nearest(model: Pretrained, images: Sequence[Path], like: Path, checkpoint: Path, neighbours: int) -> Columns:
    """The nearest images of an embedded folder, the image itself (by its bytes) left out.

    Raises:
        ValueError: features of another checkpoint, or of a folder that is gone.
    """
    known = read_embedded(like)
    if known.facts["checkpoint_md5"] != hashlib.md5(checkpoint.read_bytes(), usedforsecurity=False).hexdigest():
        raise ValueError(
            f"{like} holds features of another checkpoint (key {known.facts['key']}); embed the folder with "
            f"{checkpoint}"
        )
    folder = like.parent / known.facts["folder"]
    if not folder.is_dir():
        raise ValueError(f"{like} holds features of {folder}, which is not there; embed the folder where it is now")
    asked = min(neighbours + 1, len(known.rows_ND))
    similarities_QK, rows_QK = knn.nearest(known.rows_ND, model(images), asked)
    columns: Columns = {}
    for image, rows, similarities in zip(images, rows_QK.tolist(), similarities_QK.tolist(), strict=True):
        own = content_id(image.read_bytes())
        pairs = zip(rows, similarities, strict=True)
        found = [(known.paths[row], cosine) for row, cosine in pairs if known.ids[row] != own]
        for place in range(neighbours):
            name, cosine = found[place] if place < len(found) else ("", 0.0)
            picture = stored(folder / name, model.transform) if name else torch.full((3, 1, 1), 255, dtype=torch.uint8)
            caption = f"{cosine:.2f} {Path(name).name}" if name else ""
            columns.setdefault(f"nearest {place + 1}", []).append(Picture(large(look.image_picture(picture)), caption))
        print(f"{image}: " + ", ".join(f"{name} ({cosine:.2f})" for name, cosine in found[:neighbours]))
    return columns


def stored(image: Path, transform: Transform) -> Tensor:
    """An image of the folder, uint8 [C, H, W]; white where it cannot be read any more."""
    try:
        return torch.from_numpy(image_pixels(read_image(image), transform.channels).copy())
    except (OSError, ValueError):
        return torch.full((3, 1, 1), 255, dtype=torch.uint8)


def large(picture: np.ndarray) -> np.ndarray:
    """At least about SIDE_PX long, magnified by a whole number; larger ones shrunk to twice that."""
    return look.fitted(picture, max(SIDE_PX, min(max(picture.shape[:2]), 2 * SIDE_PX)))


def distinct(names: Sequence[str]) -> list[str]:
    """Names of folders, with a number where a name comes again."""
    found: list[str] = []
    for name in names:
        number, wanted = 2, name
        while wanted in found:
            wanted, number = f"{name}-{number}", number + 1
        found.append(wanted)
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.look", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="any size, any format that prepare reads")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the pictures")
    parser.add_argument("--checkpoint", type=Path, default=paths.TEACHER, help="of the backbone (%(default)s)")
    parser.add_argument("--px", type=positive, help="short side that the backbone sees (default: twice its crop)")
    parser.add_argument("--like", type=Path, metavar="FILE.parquet", help="of pipelines.embed: show its nearest images")
    parser.add_argument("--neighbours", type=positive, default=NEIGHBOURS, help="how many (%(default)s)")
    chosen = parser.parse_args()
    run_command("look", lambda: look_at(**vars(chosen)))


if __name__ == "__main__":
    heed(leave)
    main()
