"""`python -m pipelines.promote [--list | --rollback]`: register the checkpoint here; make it champion if it is better.

Better is decided on val: ahead of the champion by `runtime.promote.margin`, and the champion's score outside the
candidate's 95 % interval. Test has no say. A training that collapsed or diverged is never promoted, nor is a
checkpoint that was rolled back.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines import sync
from pipelines.evaluation.scores import percent
from pipelines.registered.version import HEALTH_TAG, JUDGED_ON, ROLLED_BACK_TAG, TITLES, Version
from pipelines.registered.version_table import show
from pipelines.rows import row, workspace
from pipelines.rows.alone import alone
from pipelines.rows.row import EVALUATION_TAG
from pipelines.rows.tracking import first_line, open_store

if TYPE_CHECKING:  # mlflow costs two seconds
    from pipelines.registered.registry import Registry

FIT = ("healthy", "warming up")  # what the doctor calls a training that did not go wrong


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
    registry = open_registry(params)
    target, _ = sync.written(open_store(params), found)
    version = registry.register(target, found)
    with alone:  # whoever else considers now waits, and meets the new champion
        return _decide(registry, version, score=rule["score"], margin=rule["margin"])


def _decide(registry: "Registry", version: Version, *, score: str, margin: float) -> Decision:
    champion = registry.champion()
    if champion and champion.number == version.number:
        same = version.scores
        return Decision(False, f"Version {version.number} is the champion already.", version.number, same, same)
    before = champion.scores if champion else None
    better, why = judge(version, champion, score=score, margin=margin)
    if better:
        registry.crown(version, why)
        words = f"Version {version.number} of {registry.model} is champion now: {why}."
    else:
        kept = f"version {champion.number} stays champion" if champion else "there is no champion yet"
        words = f"Version {version.number} of {registry.model} is not promoted, {kept}: {why}."
    return Decision(better, words, version.number, before, version.scores)


def open_registry(params: Any) -> "Registry":
    """The registry that `params.runtime` names; imports mlflow."""
    from pipelines.registered.registry import Registry

    return Registry(open_store(params).client, row.plain(params)["runtime"]["promote"]["model"])


def judge(candidate: Version, champion: Version | None, *, score: str, margin: float) -> tuple[bool, str]:
    """Whether a candidate takes the champion's place, and why, as half a sentence.

    Args:
        candidate, champion: registered checkpoints; champion None: there is none.
        score: knn, probe or linear.
        margin: share of 1 that it must be ahead.
    """
    title = f"{TITLES[score]} on val"
    state = candidate.tags.get(HEALTH_TAG, "no health state")
    if state not in FIT:
        return False, f"its training went wrong ({state}; docs/health.md has the cures)"
    if when := candidate.tags.get(ROLLED_BACK_TAG):
        return False, f"it was rolled back at {when}"
    new = candidate.top1(score, "val")
    if new is None:
        return False, f"it has no {title} (runtime.promote.score); without labels there is none"
    if champion is None:
        return True, f"{title} {new}, the first, with nothing to be compared with"
    old = champion.top1(score, "val")
    if old is None:
        return False, f"the champion has no {title} to be compared with; choose another runtime.promote.score"
    told = f"{title} {new} against {percent(old.share)}{unlike(candidate, champion)}"
    if new.share - old.share < margin:
        return False, f"{told}; it must be ahead by {100 * margin:g} points (runtime.promote.margin)"
    if new.low <= old.share:
        return False, f"{told}; it is ahead, but its 95 % interval does not exclude the old score: it may be luck"
    return True, f"{told}, ahead by {percent(new.share - old.share)} points and beyond the 95 % interval"


def unlike(candidate: Version, champion: Version) -> str:
    """What a reader should know of a comparison that is not quite one."""
    notes = []
    if any(champion.tags.get(name) != candidate.tags.get(name) for name in JUDGED_ON):
        notes.append("on other images or labels")
    if champion.tags.get(EVALUATION_TAG) != candidate.tags.get(EVALUATION_TAG):
        notes.append("with other settings of evaluation")
    return f" (the champion's, {' and '.join(notes)})" if notes else ""


def main() -> int:
    """Run the command; a refusal is no failure."""
    from pipelines.params import load

    parser = argparse.ArgumentParser(prog="python -m pipelines.promote", description=__doc__)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="all registered checkpoints, and which were champion")
    action.add_argument("--rollback", action="store_true", help="make the champion before this one champion again")
    chosen = parser.parse_args()
    try:
        params = load()
        if chosen.list:
            registry = open_registry(params)
            if versions := registry.versions():
                show(versions, registry.champion(), params.runtime.promote.score)
            else:
                print(f"No checkpoint is registered as {registry.model}; `python -m pipelines.promote` does it.")
        elif chosen.rollback:
            was, now = open_registry(params).roll_back()
            print(f"Version {now.number} is champion again, version {was.number} is not promoted any more.")
        else:
            print(consider(params).words)
    except Exception as error:  # mlflow's errors, the network's, ours: the user needs the line, not the trace
        print(f"promote: {first_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
