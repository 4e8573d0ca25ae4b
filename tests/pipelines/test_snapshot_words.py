"""Laws of what is said about snapshots: worse, better or neither follows from the intervals."""

import pytest

from pipelines.evaluation.snapshot_words import in_words

WORSE = "Later checkpoints are worse"


def scores(*top1: float, half: float = 0.01, rank_me: tuple[float, ...] = ()) -> list[dict[str, float]]:
    """Epochs 1, 2, ... with these accuracies."""
    return [
        {
            "epoch": epoch, "step": 10 * epoch, "feature_std": 0.1,
            "rank_me": rank_me[epoch - 1] if rank_me else 9.0,
            "val_top1": value, "val_top1_low": value - half, "val_top1_high": value + half,
        }
        for epoch, value in enumerate(top1, 1)
    ]  # fmt: skip


def unlabelled(*rank_me: float) -> list[dict[str, float]]:
    found = scores(*[0.5] * len(rank_me), rank_me=rank_me)
    return [{name: value for name, value in s.items() if not name.startswith("val_")} for s in found]


@pytest.mark.parametrize(
    ("top1", "said"),
    [
        ((0.5, 0.6, 0.61), "k-NN on val went from 50.0 % (epoch 1) to 61.0 % (epoch 3), the highest: no later"),
        ((0.5, 0.62, 0.61), "62.0 % (epoch 2) against 61.0 % (epoch 3), the last. The 95 % intervals overlap"),
        ((0.5, 0.64, 0.61), f"{WORSE}: k-NN on val 64.0 % (epoch 2) against 61.0 % (epoch 3), the last, beyond"),
        ((0.6, 0.6), "to 60.0 % (epoch 2), the highest"),  # of equals the later
    ],
)
def test_later_is_worse_only_beyond_the_intervals(top1: tuple[float, ...], said: str) -> None:
    words = in_words(scores(*top1), len(top1))
    assert said in words
    assert (WORSE in words) == (WORSE in said)


def test_a_rise_that_goes_on_asks_for_more_epochs() -> None:
    assert "still rising: more pretrain.epochs" in in_words(scores(0.5, 0.6), 2)
    assert "still rising" not in in_words(scores(0.5, 0.6, 0.61), 3)


def test_the_cure_names_lost_directions_and_the_setting_that_takes_the_better_one() -> None:
    lost = in_words(scores(0.5, 0.7, 0.6, rank_me=(5, 20, 15.9)), 3)
    assert "lost directions (RankMe 20.0, then 15.9): lower pretrain.lr_at_256" in lost
    assert lost.endswith("select.checkpoint: best takes the better one.")
    kept = in_words(scores(0.5, 0.7, 0.6, rank_me=(5, 20, 16.1)), 2)
    assert "lost directions" not in kept and "Fewer pretrain.epochs" in kept
    assert "select.checkpoint" not in kept  # it is the teacher already


def test_without_labels_directions_are_told() -> None:
    assert "(RankMe) on val: 5.0 (epoch 1), 9.0 (epoch 2)." in in_words(unlabelled(5, 9), 2)
    assert "9.0 at epoch 2: features lost directions since" in in_words(unlabelled(5, 9, 7), 3)


def test_one_snapshot_has_nothing_to_be_compared_with() -> None:
    assert in_words(scores(0.5), 1).startswith("Epoch 1 alone was kept")
