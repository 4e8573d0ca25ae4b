"""`python -m pipelines.promote`: register the checkpoint that lies here, and make it champion if it is better.

Better is decided on val: ahead of the champion by `runtime.promote.margin`, and the champion's score outside the
candidate's 95 % interval. Test has no say. A training that collapsed or diverged is never promoted.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines import row, scores, sync, workspace
from pipelines.scores import percent
from pipelines.tracking import open_store, without_secrets

FIT = ("healthy", "warming up")  # what the doctor calls a training that did not go wrong
TITLES = {path.stem: name for name, path in scores.EVALUATIONS.items()}  # {"knn": "k-NN", ...}


@dataclass(frozen=True)
class Decision:
    """Whether a checkpoint became champion, and why.

    Attributes:
        moved: It did.
        words: One sentence for people.
        version: Its number in the registry; None where it was not registered.
        champion: Scores of the champion before, by their names in MLflow (`knn/val_top1`, `knn/val_top1_low`, ...).
        candidate: Its own.
    """

    moved: bool
    words: str
    version: str | None = None
    champion: Mapping[str, float] | None = None
    candidate: Mapping[str, float] = field(default_factory=dict)


def consider(params: Any) -> Decision:
    """Register the checkpoint of the working directory if it was evaluated, and promote it if it is better.

    Args:
        params: All of params.yaml (pipelines.params.Params).

    Raises:
        OSError, ValueError: no teacher here, one that this project did not write, or no server.
    """
    settings = row.plain(params)["runtime"]
    rule = settings["promote"]
    if not settings["tracking"]["enabled"]:
        return Decision(False, "Nothing promoted: MLflow is off (runtime.tracking.enabled), and its registry with it.")
    if not rule["enabled"]:
        return Decision(False, "Nothing promoted: runtime.promote.enabled is false.")
    found = workspace.gather(row.plain(params))
    if found.evaluation is None:
        why = "; ".join(found.left_out) or "no evaluation lies beside it; `dvc repro` makes them"
        return Decision(False, f"Nothing promoted: the checkpoint is not evaluated ({why}).")
    from pipelines.registry import Registry

    store = open_store(params)
    target, _ = sync.written(store, found)
    numbers = {name: value for name, value in found.evaluation.summaries.items() if is_score(name)}
    registry = Registry(store.client, rule["model"])
    version = registry.register(target, {name: repr(value) for name, value in numbers.items()} | words_of(found))
    champion = registry.champion()
    if champion and champion.number == version.number:
        return Decision(False, f"Version {version.number} is the champion already.", version.number, numbers, numbers)
    before = champion.scores if champion else None
    state = version.tags.get("health", "")
    better, why = judge(numbers, before, state=state, score=rule["score"], margin=rule["margin"])
    if better:
        words = f"Version {version.number} of {rule['model']} is champion now: {why}."
        registry.crown(version, why)
    else:
        kept = f"version {champion.number} stays champion" if champion else "there is no champion yet"
        words = f"Version {version.number} of {rule['model']} is not promoted, {kept}: {why}."
    return Decision(better, words, version.number, before, numbers)


def is_score(name: str) -> bool:
    """Whether a number of a row is a score of the trained backbone, or an end of its interval."""
    stage, _, rest = name.partition("/")
    return stage in TITLES and rest.startswith(("val_top1", "test_top1"))


def words_of(found: workspace.Workspace) -> dict[str, str]:
    """What a version says besides its scores."""
    tags = {name: found.content.tags[name] for name in ("health", "dino.data_md5") if name in found.content.tags}
    assert found.evaluation
    return tags | {"dino.key": found.content.key, "dino.evaluation": found.evaluation.digest}


def judge(
    candidate: Mapping[str, float], champion: Mapping[str, float] | None, *, state: str, score: str, margin: float
) -> tuple[bool, str]:
    """Whether a candidate takes the champion's place, and why, as half a sentence.

    Args:
        candidate, champion: scores by their names in MLflow; no champion: None.
        state: what the doctor calls the candidate's training.
        score: knn, probe or linear.
        margin: share of 1 that it must be ahead.
    """
    title, name = f"{TITLES[score]} on val", f"{score}/val_top1"
    if state not in FIT:
        return False, f"its training went wrong ({state or 'no health state'}; docs/health.md has the cures)"
    if name not in candidate:
        return False, f"it has no {title} (runtime.promote.score), without labels there is none"
    share, low, high = (candidate[f"{name}{end}"] for end in ("", "_low", "_high"))
    told = f"{title} {percent(share)} % ({percent(low)}-{percent(high)})"
    if champion is None:
        return True, f"{told}, the first, with nothing to be compared with"
    if name not in champion:
        return False, f"the champion has no {title} to compare with; set the alias by hand, or runtime.promote.score"
    old = champion[name]
    against = f"{told} against {percent(old)} %"
    if share - old < margin:
        return False, f"{against}; it must be ahead by {100 * margin:g} points (runtime.promote.margin)"
    if low <= old:
        return False, f"{against}; it is ahead, but its 95 % interval does not exclude the old score: it may be luck"
    return True, f"{against}, ahead by {percent(share - old)} points and beyond the 95 % interval"


def main() -> int:
    """Run the command; a refusal is no failure."""
    from pipelines.params import load

    parser = argparse.ArgumentParser(prog="python -m pipelines.promote", description=__doc__)
    parser.parse_args()
    try:
        print(consider(load()).words)
    except Exception as error:  # mlflow's errors, the network's, ours: the user needs the line, not the trace
        print(f"promote: {without_secrets(str(error).strip().splitlines()[0])}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
