"""A folder of JPEGs made into tables, and batches read from them: python -m benchmarks.prepare --images 400."""

import io
import os
import tempfile
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from pathlib import Path

import torch
from PIL import Image

from benchmarks.crops import smooth_pixels
from benchmarks.measure import by_turns, emit, ratios, summary
from benchmarks.options import device_of, parser
from benchmarks.peers import installed
from dino.images import ImageTable, write_image_table


def write_jpegs(folder: Path, images: int, side: int) -> list[Path]:
    """Files that differ from each other."""
    folder.mkdir(parents=True)
    files = []
    for number in range(images):
        pixels = smooth_pixels(1, side)[0].roll(number, dims=(0, 1, 2)[number % 3])
        pixels[:, 0, 0] = number % 256
        files.append(folder / f"{number:06}.jpg")
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(files[-1], quality=90)
    return files


def decode_all(files: list[Path]) -> int:
    """Pixels of every file as RGB, one after the other: the least that anybody who checks images does."""
    return sum(Image.open(io.BytesIO(file.read_bytes())).convert("RGB").width for file in files)


def whole_stage(folder: Path, short_px: int) -> Callable[[], object]:
    """Stage prepare on this folder, in a directory of its own."""
    from pipelines.data.examine import Limits
    from pipelines.stages.prepare import prepare

    limits = Limits(short_px=short_px, pixels=10**8, aspect=20)

    def call() -> None:
        with tempfile.TemporaryDirectory() as place, chdir(place), redirect_stdout(io.StringIO()):
            for name in ("data/prepared", "metrics", "plots"):
                Path(name).mkdir(parents=True)
            prepare(folder, val_fraction=0.1, test_fraction=0.2, limits=limits, seed=0)

    return call


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--images", type=int, default=400)
    options.add_argument("--source-px", type=int, default=512)
    options.add_argument("--batch", type=int, default=64)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        files = write_jpegs(root / "images", chosen.images, chosen.source_px)
        rows = [(f"{number:06}", file.read_bytes()) for number, file in enumerate(files)]
        write_image_table(root / "table.arrow", rows, channels=3, mean=[0.5] * 3, std=[0.25] * 3)
        table = ImageTable(root / "table.arrow")

        def read() -> None:
            for part in torch.arange(chosen.images).split(chosen.batch):
                table.batch(part.tolist())

        calls: dict[str, Callable[[], object]] = {"read_table": read, "decode": lambda: decode_all(files)}
        if installed("pydantic"):  # stage prepare needs the pipeline's libraries; the table does not
            calls["prepare"] = whole_stage(root / "images", chosen.source_px)
        seconds = by_turns(calls, rounds=chosen.steps, device=torch.device("cpu"), clock=chosen.clock)
    results = {
        f"{name}_images_per_s": summary([chosen.images / value for value in values]) for name, values in seconds.items()
    }
    results["peers"] = ratios(seconds, "prepare" if "prepare" in seconds else "read_table")
    emit("prepare", vars(chosen) | {"file_cores": os.cpu_count()}, device_of(chosen), results | {"n": chosen.steps})


if __name__ == "__main__":
    main()
