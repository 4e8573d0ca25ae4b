"""What a tick tells of a new result: whether it became champion, a table against the last one, its row in MLflow."""

from collections.abc import Mapping
from typing import Any

from pipelines import paths
from pipelines.evaluation.scores import percent
from pipelines.promote import Decision, consider
from pipelines.rows import row, workspace
from pipelines.rows.tracking import open_store, tracking_uri, without_secrets

MEMORY = "considered"  # in .work/: the results that promotion was asked about last


def is_news() -> bool:
    """Whether promotion was not asked about these results yet."""
    memory = paths.work_dir() / MEMORY
    return _results() != (memory.read_text() if memory.is_file() else "")


def _results() -> str:
    """What dvc.lock holds, as one number."""
    return workspace.file_md5(workspace.LOCK)


def decide(params: Any) -> Decision:
    """Consider the results that lie here for promotion, and remember that it was done.

    Raises:
        Exception: MLflow's, the network's, ours (`pipelines.promote.consider`).
    """
    decision = consider(params)
    memory = paths.work_dir() / MEMORY
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(_results())
    return decision


def comparison(decision: Decision) -> list[dict[str, str]]:
    """A row a score: the champion before, this run, and their difference in points; intervals in brackets."""
    before = decision.champion or {}
    names = [name for name in sorted({*before, *decision.candidate}) if name.endswith("top1")]
    return [
        {
            "score, top-1 %": name.replace("/", ", ").removesuffix("_top1"),
            "champion before": _score(before, name),
            "this run": _score(decision.candidate, name),
            "difference": f"{100 * (decision.candidate[name] - before[name]):+.1f}"
            if name in before and name in decision.candidate
            else "",
        }
        for name in names
    ]


def _score(scores: Mapping[str, float], name: str) -> str:
    if name not in scores:
        return ""
    low, high = scores.get(f"{name}_low"), scores.get(f"{name}_high")
    interval = f" ({percent(low)}-{percent(high)})" if low is not None and high is not None else ""
    return f"{percent(scores[name])}{interval}"


def row_address(params: Any) -> str | None:
    """Where MLflow shows the row of the training that lies here; None if it lies in a file, or there is none."""
    settings = row.plain(params)["runtime"]["tracking"]
    uri = tracking_uri(settings["uri"])
    if not settings["enabled"] or not uri.startswith("http"):
        return None
    store = open_store(params)
    known = store.find(workspace.read_json(paths.PRETRAIN_METRICS).get("key", ""))
    if known is None:
        return None
    return f"{without_secrets(uri).rstrip('/')}/#/experiments/{store.experiment_id}/runs/{known.run_id}"
