"""What becomes champion of MLflow's model registry, and what does not, in words."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import evidence
import pytest

from dino import health
from pipelines import paths, promote, sync
from pipelines.registered.registry import Registry
from pipelines.registered.version import Version
from pipelines.rows import tracking, workspace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # mlflow's own


def consider(home: Path, key: str, val: float, **settings: Any) -> promote.Decision:
    """A checkpoint of its own seed that scored `val`, with its interval of two points to each side."""
    evidence.lay(home, key=key, seed=int(key[1:]), knn=val)
    return promote.consider({**evidence.SETTINGS, **settings})


def registry() -> Registry:
    return promote.open_registry(evidence.SETTINGS)


def test_better_checkpoints_become_champion_and_every_step_can_be_taken_back(home: Path) -> None:
    first = consider(home, "k1", 0.8)
    assert (first.moved, first.version, first.champion) == (True, "1", None)
    assert first.words == (
        "Version 1 of dino is champion now: k-NN on val 80.0 (78.0-82.0), the first, with nothing to be compared with."
    )
    again = consider(home, "k1", 0.8)
    assert (again.moved, again.words) == (False, "Version 1 is the champion already.")
    better = consider(home, "k2", 0.9)
    assert better.moved and better.champion is not None
    assert (better.champion["knn/val_top1"], better.candidate["knn/val_top1"]) == (0.8, 0.9)
    close = consider(home, "k3", 0.91)
    assert not close.moved and "version 2 stays champion" in close.words and "may be luck" in close.words
    assert consider(home, "k4", 0.95).version == "4"

    champion = registry().champion()
    assert champion and champion.number == "4" and champion.tags["champion.before"] == "2"
    assert "ahead by 5.0 points" in champion.tags["champion.why"]
    assert [one.number for one in registry().versions()] == ["4", "3", "2", "1"]
    assert {one.number for one in registry().versions() if "champion.until" in one.tags} == {"1", "2"}

    assert [one.number for one in registry().roll_back()] == ["4", "2"]
    refused = consider(home, "k4", 0.95)
    assert not refused.moved and "version 2 stays champion: it was rolled back at 20" in refused.words
    assert consider(home, "k5", 0.96).moved
    assert [one.number for one in registry().roll_back()] == ["5", "2"]
    assert [one.number for one in registry().roll_back()] == ["2", "1"]
    with pytest.raises(ValueError, match="version 1 of dino stays champion: it knows of none before it"):
        registry().roll_back()


def test_a_checkpoint_is_registered_once_by_whoever_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 120.0)
    evidence.lay(home)
    tracking.report("k1", pages=["report/index.html"], params=evidence.SETTINGS)
    sync.sync(evidence.SETTINGS)
    promote.consider(evidence.SETTINGS)
    (version,) = registry().versions()
    assert version.tags["dvc.models/teacher.safetensors"] == workspace.file_md5(home / paths.TEACHER)
    assert (version.name, version.tags["health"], version.tags["dino.key"]) == (
        "vit_tiny/4 64x3 5 epochs", "healthy", "k1")  # fmt: skip
    assert version.scores["probe/test_top1_high"] == pytest.approx(0.83)
    assert not [name for name in version.scores if "untrained" in name or "snapshot" in name]


def test_what_was_not_evaluated_is_not_registered(home: Path) -> None:
    evidence.lay(home)
    for path in workspace.EVALUATIONS.values():
        (home / path).unlink(missing_ok=True)
    decision = promote.consider(evidence.SETTINGS)
    assert (decision.moved, decision.version) == (False, None)
    assert "no evaluation lies beside it; `dvc repro` makes them" in decision.words
    assert registry().champion() is None and registry().versions() == []


@pytest.mark.parametrize("switch", ["tracking", "promote"])
def test_switched_off_it_says_so_and_touches_nothing(home: Path, switch: str) -> None:
    runtime = evidence.SETTINGS["runtime"]
    off = {**evidence.SETTINGS, "runtime": {**runtime, switch: {**runtime[switch], "enabled": False}}}
    decision = promote.consider(off)  # nothing lies here
    assert not decision.moved and f"runtime.{switch}.enabled" in decision.words


def test_the_command_lists_and_rolls_back_or_says_in_one_line_why_not(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["promote", *options])
        return promote.main(), "".join(capsys.readouterr())

    evidence.lay(home)
    assert said("--rollback")[1].startswith("promote: dino has no champion; `python -m pipelines.promote` makes one")
    assert said("--list") == (0, "No checkpoint is registered as dino; `python -m pipelines.promote` does it.\n")
    consider(home, "k1", 0.8)
    consider(home, "k2", 0.9)
    code, text = said("--rollback")
    assert (code, text) == (0, "Version 1 is champion again, version 2 is not promoted any more.\n")
    code, text = said("--rollback")
    assert code == 1 and text.startswith("promote: version 1 of dino stays champion") and text.count("\n") == 1
    code, text = said("--list")
    _head, second, first, _note = text.splitlines()
    assert second.split()[:3] == ["2", "rolled", "back"] and "90.0 (88.0-92.0)" in second
    assert first.split()[:3] == ["1", "champion", "since"] and "vit_tiny/4 64x3 5 epochs" in first


# The rule


def scored(val: float, half: float = 0.01, *, state: str = "healthy", test: float = 0.5, **tags: str) -> Version:
    numbers = {"knn/val_top1": val, "knn/val_top1_low": val - half, "knn/val_top1_high": val + half}
    numbers |= {"knn/test_top1": test, "knn/test_top1_low": test, "knn/test_top1_high": test}
    words = {name: repr(value) for name, value in numbers.items()}
    return Version("1", "", {**words, "health": state, **tags}, datetime.now(UTC))


@pytest.mark.parametrize(
    ("candidate", "moved", "why"),
    [
        (scored(0.83), True, "83.0 (82.0-84.0) against 80.0, ahead by 3.0 points and beyond the 95 % interval"),
        (scored(0.83, state="warming up"), True, "ahead"),
        (scored(0.83, 0.04), False, "may be luck"),
        (scored(0.83, 0.03), False, "may be luck"),
        (scored(0.81, 0.001), False, "ahead by 2 points (runtime.promote.margin)"),
        (scored(0.78, test=0.99), False, "margin"),
        (scored(0.99, state=""), False, "went wrong"),
        (scored(0.99, **{"champion.rolled_back": "yesterday"}), False, "it was rolled back at yesterday"),
        (scored(0.99, **{"dino.evaluation": "x"}), True, "(the champion's, with other settings of evaluation)"),
        (scored(0.99, **{"dvc.data/prepared/val.arrow": "x"}), True, "(the champion's, on other images or labels)"),
        (Version("1", "", {"health": "healthy"}, datetime.now(UTC)), False, "no k-NN on val"),
    ],
)
def test_val_beyond_margin_and_interval_decides(candidate: Version, moved: bool, why: str) -> None:
    found = promote.judge(candidate, scored(0.8), score="knn", margin=0.02)
    assert found[0] == moved and why in found[1], found


@pytest.mark.parametrize("score", [0.1, 0.79999, 0.8, 0.82, 0.9])
def test_the_test_split_has_no_say(score: float) -> None:
    def decided(candidate_test: float, champion_test: float) -> tuple[bool, str]:
        champion = scored(0.8, test=champion_test)
        return promote.judge(scored(score, test=candidate_test), champion, score="knn", margin=0.01)

    assert decided(0.0, 1.0) == decided(1.0, 0.0)


def test_no_training_that_the_doctor_warns_of_is_promoted_not_even_as_the_first() -> None:
    states = [value for value in vars(health).values() if isinstance(value, health.State)]
    assert len(states) >= 6
    for state in states:
        for champion in (None, scored(0.5)):
            moved, why = promote.judge(scored(0.9, state=state.name), champion, score="knn", margin=0.0)
            assert moved != state.is_bad
            assert not state.is_bad or state.name in why


def test_a_champion_without_the_score_stays(home: Path) -> None:
    bare = Version("1", "", {"health": "healthy"}, datetime.now(UTC))
    moved, why = promote.judge(scored(0.9), bare, score="knn", margin=0.0)
    assert not moved and "the champion has no k-NN on val to be compared with" in why
