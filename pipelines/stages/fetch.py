"""The named data set's files below data/raw, checked; an empty folder when data.folder is one's own.

What was downloaded is kept in .work/downloads, as DVC empties data/raw before each run: a set is downloaded once.
A file that was put there by hand is taken too.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pipelines import paths
from pipelines.data.archives import CIFAR10, STL10, fetch_archive
from pipelines.data.datasets import NAMED, set_name
from pipelines.data.digits import write_digits
from pipelines.data.fashion_mnist import fetch_fashion_mnist
from pipelines.params import Params
from pipelines.processes.stage import run_stage

FETCH: dict[str, Callable[[Path, Path], None]] = {  # name -> function of (folder to fill, folder of downloads)
    "fashion-mnist": fetch_fashion_mnist,
    "cifar10": partial(fetch_archive, archive=CIFAR10),
    "stl10": partial(fetch_archive, archive=STL10),
    "digits": write_digits,
}
assert FETCH.keys() == NAMED.keys()


def main(params: Params) -> None:
    """Fetch the set that data.folder names."""
    fetch(Path(params.data.folder))


def fetch(folder: Path) -> None:
    """Fill data/raw with the set that `folder` names, and with no other; leave it empty for a folder elsewhere.

    Raises:
        ValueError: the set can't be had, there is no set of this name, or no such folder.
    """
    name = set_name(folder)
    if name is None and not folder.is_dir():  # said here, as DVC's own word is only "No such file"
        raise ValueError(
            f"data.folder is {str(folder)!r}, and there is no such folder (looked for {folder.resolve()}); "
            "correct it in params.yaml"
        )
    paths.RAW.mkdir(parents=True, exist_ok=True)
    for other in NAMED.keys() - {name}:
        shutil.rmtree(paths.RAW / other, ignore_errors=True)
    if name is None:
        print(f"fetch: nothing to fetch; {folder} is a folder of your own", flush=True)
        return
    with whole_folder(paths.RAW / name) as aside:
        FETCH[name](aside, paths.work_dir() / "downloads" / name)
    count = sum(path.is_file() for path in (paths.RAW / name).rglob("*"))
    print(f"fetch: {name}: {count:,} files in {paths.RAW / name}, checked", flush=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder aside, which replaces `path` when the block ends well, and else is removed."""
    aside = path.with_name(f".{path.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        shutil.rmtree(path, ignore_errors=True)
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


if __name__ == "__main__":
    run_stage("fetch", main)
