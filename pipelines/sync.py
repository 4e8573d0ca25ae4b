"""`python -m pipelines.sync`: write what DVC holds here into MLflow, row and registered checkpoint; twice is once.

For whoever pulled results (`dvc pull`), restored them from the cache, or trained while the server was away.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import paths
from pipelines.rows import origin, row, workspace
from pipelines.rows.tracking import first_line, open_store, tracking_uri, without_secrets

if TYPE_CHECKING:  # mlflow costs two seconds
    from pipelines.rows.mlflow_store import Row, Store


def sync(params: object) -> str:
    """Complete the row of models/teacher.safetensors from files alone; a line that says what was done.

    Raises:
        OSError, ValueError: no teacher here, or one that this project did not write.
    """
    found = workspace.gather(row.plain(params))
    for why in found.left_out:
        print(why, file=sys.stderr)
    from pipelines.registered.registry import Registry

    store = open_store(params)
    target, new = written(store, found)
    if found.evaluation:
        Registry(store.client, row.plain(params)["runtime"]["promote"]["model"]).register(target, found)
    uri = without_secrets(tracking_uri(row.plain(params)["runtime"]["tracking"]["uri"]))
    return f"Row {target.name!r} {'written' if new else 'completed'} in {uri}; `make ui` shows it."


def written(store: "Store", found: workspace.Workspace) -> "tuple[Row, bool]":
    """The row of what was found, made or completed; and whether it is new."""
    from pipelines.rows.mlflow_store import add_evaluation

    known = store.find(found.content.key)
    target = known or store.row(found.content.key, found.content.name)
    if known is None:
        target.add_tags({"dino.rebuilt": "from files, without host, duration and throughput"})
    target.complete(found.content)
    judged = add_evaluation(store, target, found.content.key, found.evaluation) if found.evaluation else target
    if "DVC_EXP_NAME" in os.environ:  # a finished experiment names itself, whoever computed parts of it before
        judged.add_origin(*origin.here())
    elif origin.COMMIT_TAG not in judged.tags:
        judged.add_origin(*whence())
    if paths.PRETRAIN_METRICS.is_file():  # the training ended, whoever was not told
        target.end("FINISHED")
    return target, known is None


def whence() -> tuple[dict[str, str], list[Path]]:
    """Where the results that dvc.lock names come from: the commit that it stands in, else the state as it lies here."""
    lock = str(workspace.LOCK)
    as_committed = origin.git("diff", "--quiet", "HEAD", "--", lock) is not None
    if as_committed and (commit := origin.words("log", "-1", "--format=%H", "--", lock)):
        return {origin.COMMIT_TAG: commit, "git.dirty": "false"}, []
    return origin.here()


def main() -> int:
    """Run the command; 1 and one line where there is nothing to sync or no server."""
    from pipelines.params import load

    try:
        print(sync(load()))
    except Exception as error:  # mlflow's errors, the network's, ours: the user needs the line, not the trace
        print(f"sync: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
