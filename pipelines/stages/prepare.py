"""Images checked and written as one Arrow table a split; labels, apart; counts as metrics; a sheet to look at."""

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dino.files import lacks_room, no_room, whole_file
from dino.images import write_image_table
from pipelines import paths
from pipelines.data.datasets import NAMED, set_name
from pipelines.data.examine import Examined, Limits, examine
from pipelines.data.findings import (
    Row,
    brightness_warnings,
    broken_warnings,
    data_metrics,
    duplicate_warnings,
    sheet,
)
from pipelines.data.folders import read_folder
from pipelines.data.imageset import SPLITS, ImageSet
from pipelines.data.splits import assign, find_duplicates, number_duplicates
from pipelines.params import Params
from pipelines.processes.progress import progress
from pipelines.processes.stage import run_stage
from pipelines.rows.tracking import write_metrics

LABELS = pa.schema(
    [
        ("id", pa.string()),
        ("split", pa.string()),
        ("label", pa.int64()),  # null: none, like name
        ("name", pa.string()),
        ("source", pa.string()),
    ]
)


def main(params: Params) -> None:
    """Prepare the images of data.folder."""
    data = params.data
    prepare(
        Path(data.folder),
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        limits=Limits(data.max_short_px, data.max_pixels, data.max_aspect),
        seed=data.seed,
    )


def prepare(folder: Path, *, val_fraction: float, test_fraction: float, limits: Limits, seed: int) -> None:
    """Write the three image tables, labels, metrics and the sheet of samples.

    Raises:
        ValueError: the folder is missing, empty or mostly broken, or has too few images for three splits.
    """
    name = set_name(folder)
    images = NAMED[name](folder) if name else read_folder(folder)
    say(f"{len(images.entries):,} images in {folder}: {images.layout}")
    with spool_for(paths.TRAIN_IMAGES) as spool:
        with progress("prepare: read", len(images.entries)) as advance:
            examined = examine(images, limits=limits, spool=spool, advance=advance)
        warn([*broken_warnings(examined, folder), *brightness_warnings(examined)])
        entries, ids, duplicates = without_duplicates(images, examined)
        warn(duplicate_warnings(duplicates, images.official))
        splits = assign(
            ids,
            [images.entries[entry].split for entry in entries],
            [images.entries[entry].label for entry in entries],
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
        )
        tables = sorted_tables(images, entries, ids, splits)
        if empty := [split for split, rows in tables.items() if not rows]:
            raise ValueError(
                f"data.folder is '{folder}', whose {len(entries):,} different images leave none for {empty[0]}; "
                "add images, or change data.val_fraction and data.test_fraction"
            )
        channels = 1 if examined.grey_N[entries].all() else 3
        mean, std = examined.mean_std([row.entry for row in tables["train"]], channels)
        with progress("prepare: write", len(entries)) as advance:
            for split, rows in tables.items():
                write_image_table(
                    paths.IMAGES[split],
                    read_rows(examined, rows, advance),
                    channels=channels,
                    mean=mean,
                    std=std,
                    max_pixels=limits.pixels,
                    needs_bytes=int(examined.stored_bytes_N[[row.entry for row in rows]].sum()),
                )
        with whole_file(paths.SAMPLES_PICTURE) as aside:
            aside.write_bytes(sheet(tables, images, examined, limits.pixels))
    write_labels(paths.LABELS, [row for rows in tables.values() for row in rows])
    facts = data_metrics(tables, images, examined, duplicates)
    write_metrics(paths.DATA_METRICS, facts | {"channels": channels, "mean": mean, "std": std})
    say(f"{', '.join(f'{len(rows):,} {split}' for split, rows in tables.items())}, {channels} channel(s)")


@contextmanager
def spool_for(path: Path) -> Iterator[io.FileIO]:
    """A file without a name (it can't be left behind) beside `path`, for images on their way there.

    Raises:
        OSError: the disk is full; the message says what was needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent, buffering=0) as spool:
        try:
            yield spool
        except OSError as error:
            if not lacks_room(error):
                raise
            needs_bytes = os.fstat(spool.fileno()).st_size
            os.ftruncate(spool.fileno(), 0)
            raise OSError(no_room(path, needs_bytes)) from error


def without_duplicates(images: ImageSet, examined: Examined) -> tuple[list[int], list[str], dict[str, int]]:
    """Entries that were read, with unique ids: each image once; of a published set, every image.

    Returns:
        Indices of the entries, their ids, and counts of the duplicates by kind.
    """
    entries = [entry for entry in range(len(images.entries)) if entry not in examined.broken]
    ids = [examined.ids[entry] for entry in entries]
    kept, counts = find_duplicates(ids, [images.entries[entry].split for entry in entries])
    labels: dict[str, set[int]] = {}
    for entry, image_id in zip(entries, ids, strict=True):
        label = images.entries[entry].label
        if label is not None:
            labels.setdefault(image_id, set()).add(label)
    counts["label_conflicts"] = sum(len(found) > 1 for found in labels.values())
    if images.official:
        return entries, number_duplicates(ids), counts
    return [entries[k] for k in kept], [ids[k] for k in kept], counts


def sorted_tables(
    images: ImageSet, entries: Sequence[int], ids: Sequence[str], splits: Sequence[str]
) -> dict[str, list[Row]]:
    """Rows of each split, sorted by id."""
    tables: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for entry, image_id, split in zip(entries, ids, splits, strict=True):
        source, _, label = images.entries[entry]
        name = None if label is None or images.classes is None else images.classes[label]
        tables[split].append(Row(split, image_id, entry, label, name, source))
    for rows in tables.values():
        rows.sort(key=lambda row: row.id)
    return tables


def read_rows(examined: Examined, rows: Sequence[Row], advance: Callable[[int], None]) -> Iterator[tuple[str, bytes]]:
    """Id and stored bytes of each row, as they are read."""
    for row in rows:
        yield row.id, examined.read(row.entry)
        advance(1)


def write_labels(path: Path, rows: Sequence[Row]) -> None:
    """Write labels.parquet: a row for every image, in the order of the tables train, val, test."""
    columns = {name: [getattr(row, name) for row in rows] for name in LABELS.names}
    with whole_file(path) as aside:
        pq.write_table(pa.table(columns, schema=LABELS), aside)


def say(line: str) -> None:
    """One line of output."""
    print(f"prepare: {line}", flush=True)


def warn(lines: Sequence[str]) -> None:
    """Warnings, a line each."""
    for line in lines:
        say(f"warning: {line}")


if __name__ == "__main__":
    run_stage("prepare", main)
