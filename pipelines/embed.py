"""`python -m pipelines.embed FOLDER --out features.parquet`: features of all images of a folder by a trained backbone.

What is done is kept beside the output, in parts, until the output stands: the same command after a kill goes on and
leaves the same bytes. A part is named by its files (path, size, time of change), so a file that changed meanwhile is
embedded again.
"""

import argparse
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import dino
from dino.decode import THREADS_FROM_BYTES, content_id
from dino.distributed import World
from dino.files import whole_file
from dino.pretrained import Pretrained, Transform
from pipelines import paths
from pipelines.data.folders import find_images, printable, read_file
from pipelines.evaluation.embedded import read_embedded, read_facts, rows_table, write_embedded
from pipelines.processes.ending import heed, leave
from pipelines.processes.lock import hold
from pipelines.processes.progress import progress
from pipelines.processes.stage import positive, run_command

BATCH = 64  # files at once
PART_FILES = 512  # kept together: what a kill costs at most
BROKEN = b"broken"  # metadata of a part: [[path, why], ...]
BROKEN_LISTED = 10


class File(NamedTuple):
    """An image file as it was listed."""

    path: str  # relative to the folder, with /
    size: int  # bytes
    changed_ns: int  # when

    @staticmethod
    def of(folder: Path, path: str) -> "File":
        """As it is now; a link to nothing counts as empty."""
        try:
            found = (folder / path).stat()
        except OSError:
            return File(path, 0, 0)
        return File(path, found.st_size, found.st_mtime_ns)


class Seen(NamedTuple):
    """What became of one file: its id and crop, or why not."""

    file: File
    id: str = ""
    crop_CPP: Tensor | None = None
    why: str = ""


def embed_folder(
    folder: Path, out: Path, checkpoint: Path, *, device: torch.device, batch: int = BATCH, replace: bool = False
) -> None:
    """Write the features of every readable image of the folder; go on where an interrupted call ended.

    Args:
        folder: Searched with all folders below.
        out: The Parquet file; one that holds what was asked for is left alone.
        checkpoint: Of the backbone.
        device: Where the backbone computes.
        batch: Files at once.
        replace: Whether an `out` of another checkpoint or folder, or of this folder before it changed, may go.

    Raises:
        ValueError: no images, none readable, an output of something else, features that are not finite.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; give the folder that holds the images")
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file in it: --out {out / 'features.parquet'}")
    model = dino.load(checkpoint, device=str(device))
    found, other_files = find_images(folder)
    if not found:
        raise ValueError(f"no images in {folder}; known are PNG, JPEG, WEBP, BMP, TIFF, GIF")
    files = [File.of(folder, str(path)) for path in found]
    facts = {
        "key": model.facts["key"],
        "checkpoint_md5": hashlib.md5(checkpoint.read_bytes(), usedforsecurity=False).hexdigest(),
        "folder": Path(os.path.relpath(folder.resolve(), out.resolve().parent)).as_posix(),
        "resize_px": model.transform.resize_px,
        "crop_px": model.transform.crop_px,
        "channels": model.transform.channels,
        "listing": digest([(file.path, file.size) for file in files]),
    }
    if out.exists():
        before = read_facts(out)  # or refuse: what is not ours is never overwritten
        if not replace and is_done(out, before, facts, files):
            shutil.rmtree(f"{out}.parts", ignore_errors=True)  # left by a kill right after the output stood
            print(f"embed: {out} is up to date: {len(files):,} files of {folder}, key {facts['key']}")
            return
    if other_files:
        print(f"embed: files that are no images, left alone: {other_files:,}", flush=True)
    with parts_folder(out, facts) as parts:
        wanted = [files[first : first + PART_FILES] for first in range(0, len(files), PART_FILES)]
        compute_parts(parts, wanted, folder, model, batch)
        broken = [entry for part in wanted for entry in broken_of(part_file(parts, part))]
        if len(broken) == len(files):
            path, why = broken[0]
            raise ValueError(f"none of the {len(files):,} images in {folder} can be read; the first, {path}: {why}")
        tables = (read_part(parts, part).replace_schema_metadata(None) for part in wanted)
        write_embedded(out, tables, {**facts, "broken": broken})
        shutil.rmtree(parts)
    print(f"embed: {len(files) - len(broken):,} images of {folder} in {out}, key {facts['key']}", flush=True)
    if broken:
        print(f"embed: warning: {len(broken):,} of {len(files):,} images can't be read and are left out:")
        print("\n".join(f"  {path}: {why}" for path, why in broken[:BROKEN_LISTED]))
        if len(broken) > BROKEN_LISTED:
            print(f"  and {len(broken) - BROKEN_LISTED:,} more; all stand in the file's metadata")


def is_done(out: Path, before: dict[str, Any], facts: dict[str, Any], files: Sequence[File]) -> bool:
    """Whether the output, which comes from `before`, is what was asked for.

    Raises:
        ValueError: it is something else, with what and the cure.
    """
    cure = "name another --out, or add --replace"
    if before["checkpoint_md5"] != facts["checkpoint_md5"]:
        raise ValueError(
            f"{out} holds features of another checkpoint (key {before.get('key')}, now {facts['key']}); {cure}"
        )
    if any(before.get(name) != facts[name] for name in ("folder", "resize_px", "crop_px", "channels")):
        raise ValueError(f"{out} holds features of another folder ({before['folder']} from where it lies); {cure}")
    known = {*read_embedded(out).paths, *(path for path, _ in before["broken"])}
    written_ns = out.stat().st_mtime_ns
    now = {printable(file.path) for file in files}
    changed = sum(printable(file.path) in known and file.changed_ns > written_ns for file in files)
    if now == known and not changed and before["listing"] == facts["listing"]:
        return True
    counts = f"{len(now - known):,} files added, {len(known - now):,} removed, {changed:,} changed"
    raise ValueError(f"the folder is not as it was when {out} was written ({counts}); {cure}")


@contextmanager
def parts_folder(out: Path, facts: dict[str, Any]) -> Iterator[Path]:
    """The folder beside the output that keeps finished parts, for one process at a time.

    Raises:
        ValueError: it belongs to another checkpoint or folder, or another process works in it.
    """
    folder = out.with_name(f"{out.name}.parts")
    with hold(folder / "lock", f"writes {out}"):
        owner = {name: facts[name] for name in ("checkpoint_md5", "folder", "resize_px", "crop_px", "channels")}
        for half_written in folder.glob(".*.part.*"):  # by a process that was killed
            half_written.unlink()
        note = folder / "of.json"
        if note.is_file() and json.loads(note.read_text()) != owner:
            raise ValueError(
                f"{folder} keeps the interrupted work of another checkpoint or folder; finish that, name another "
                f"--out, or remove {folder}"
            )
        with whole_file(note) as aside:
            aside.write_text(json.dumps(owner))
        yield folder


def digest(content: Any) -> str:
    """16 hex digits of something that JSON can write."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def part_file(parts: Path, files: Sequence[File]) -> Path:
    """Where the part of these files is kept."""
    return parts / f"{digest(files)}.parquet"


def read_part(parts: Path, files: Sequence[File]) -> pa.Table:
    """The rows of a part, and the broken ones in its metadata."""
    return pq.read_table(part_file(parts, files), page_checksum_verification=True)


def broken_of(part: Path) -> list[list[str]]:
    """Path of each broken file of a part, and why."""
    found: list[list[str]] = json.loads(pq.read_schema(part).metadata[BROKEN])
    return found


def is_kept(parts: Path, files: Sequence[File]) -> bool:
    """Whether the part of these files is there, whole."""
    try:
        return BROKEN in read_part(parts, files).schema.metadata
    except (pa.ArrowException, OSError, TypeError):
        return False


def compute_parts(parts: Path, wanted: Sequence[Sequence[File]], folder: Path, model: Pretrained, batch: int) -> None:
    """Compute the parts that are not kept, and remove those of files that changed meanwhile."""
    todo = [part for part in wanted if not is_kept(parts, part)]
    stale = set(parts.glob("*.parquet")) - {part_file(parts, part) for part in wanted}
    for path in stale:
        path.unlink()
    if stale:
        print("embed: the folder changed since the interrupted run; what changed is embedded again", flush=True)
    kept, count = sum(map(len, wanted)) - sum(map(len, todo)), sum(map(len, todo))
    if kept:
        print(f"embed: going on after {kept:,} files", flush=True)
    with progress("embed:", count, "files") as advance, looked_at(folder, todo, model.transform, batch) as seen:
        for part in todo:
            with whole_file(part_file(parts, part)) as aside:
                table = embed_part(list_batches(seen, len(part), batch), model, advance)
                pq.write_table(table, aside, write_page_checksum=True)


def list_batches(seen: Iterator[Seen], count: int, batch: int) -> Iterator[list[Seen]]:
    """The next `count` files in batches: the same ones whether or not a run was interrupted before."""
    for first in range(0, count, batch):
        yield list(islice(seen, min(batch, count - first)))


def embed_part(batches: Iterator[list[Seen]], model: Pretrained, advance: Callable[[int], None]) -> pa.Table:
    """Rows of the readable files; the others in the metadata."""
    rows: list[Seen] = []
    broken: list[tuple[str, str]] = []
    features = []
    for found in batches:
        readable = [one for one in found if one.crop_CPP is not None]
        crops = [one.crop_CPP for one in readable if one.crop_CPP is not None]
        t = model.transform
        crops_NCPP = torch.stack(crops) if crops else torch.zeros(0, t.channels, t.crop_px, t.crop_px)
        features.append(model.features(crops_NCPP).numpy())
        if not np.isfinite(features[-1]).all():
            raise ValueError("the backbone gives features that are not finite; its training diverged: give another")
        rows += [one._replace(crop_CPP=None) for one in readable]  # memory: the pixels are done with
        broken += [(one.file.path, one.why) for one in found if one.crop_CPP is None]
        advance(len(found))
    names = [printable(one.file.path) for one in rows]
    table = rows_table([one.id for one in rows], names, np.concatenate(features))
    listed = [(printable(path), why) for path, why in broken]
    return table.replace_schema_metadata({BROKEN: json.dumps(listed)})


@contextmanager
def looked_at(
    folder: Path, parts: Sequence[Sequence[File]], transform: Transform, batch: int
) -> Iterator[Iterator[Seen]]:
    """All files of these parts, read and transformed in order, some batches ahead of whoever takes them."""
    files = [file for part in parts for file in part]
    large = sum(file.size for file in files) >= THREADS_FROM_BYTES * len(files)
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16) if large else 1)

    def ahead() -> Iterator[Seen]:
        waiting: deque[Future[Seen]] = deque()
        for file in files:
            waiting.append(pool.submit(look_at, folder, file, transform))
            if len(waiting) > 2 * batch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield ahead()
    finally:
        pool.shutdown(cancel_futures=True)


def look_at(folder: Path, file: File, transform: Transform) -> Seen:
    """One file."""
    try:
        data = read_file(folder / file.path)
        if File.of(folder, file.path) != file:
            return Seen(file, why="changed while the folder was read; run the command again")
        return Seen(file, content_id(data), transform(data))
    except OSError as problem:  # may not be read, or is gone
        return Seen(file, why=problem.strerror or type(problem).__name__)
    except ValueError as problem:
        return Seen(file, why=str(problem))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.embed", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("folder", type=Path, help="searched with all folders below; any format that prepare reads")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.parquet", help="id, path, features of each")
    parser.add_argument("--checkpoint", type=Path, default=paths.TEACHER, help="of the backbone (%(default)s)")
    parser.add_argument("--batch", type=positive, default=BATCH, help="images at once (%(default)s)")
    parser.add_argument("--replace", action="store_true", help="overwrite features of something else")
    chosen = parser.parse_args()
    run_command("embed", lambda: embed_folder(**vars(chosen), device=World.detect().device))


if __name__ == "__main__":
    heed(leave)  # what is done is kept: the same command goes on
    main()
