"""What the scores of a training's snapshots say in plain words: "a later checkpoint is worse, why?" """

from collections.abc import Mapping, Sequence

from pipelines.evaluation.scores import percent

Scores = Mapping[str, float]  # of a snapshot: epoch, step, rank_me, feature_std, and with labels val_top1, _low, _high
FEWER_DIRECTIONS = 0.8  # of RankMe before: below, the features have lost directions


def in_words(scores: Sequence[Scores], chosen: int) -> str:
    """Whether later snapshots are worse, and if so what to do.

    Args:
        scores: Of each snapshot, in order.
        chosen: Epoch of the one that is the teacher.
    """
    if len(scores) == 1:
        return f"Epoch {scores[0]['epoch']} alone was kept (pretrain.snapshot_epochs): nothing to compare it with."
    if "val_top1" not in scores[0]:
        return _of_directions(scores)
    first, last = scores[0], scores[-1]
    best = max(scores, key=lambda found: (found["val_top1"], found["epoch"]))
    if best is last:
        rising = scores[-1]["val_top1_low"] > scores[-2]["val_top1_high"]
        more = " It was still rising: more pretrain.epochs may help." if rising else ""
        return (
            f"k-NN on val went from {_told(first)} to {_told(last)}, the highest: no later checkpoint is worse.{more}"
        )
    both = f"{_told(best)} against {_told(last)}, the last"
    if best["val_top1_low"] <= last["val_top1_high"]:
        return f"k-NN on val: {both}. The 95 % intervals overlap, so later checkpoints are not shown to be worse."
    cure = "" if chosen == best["epoch"] else " The setting select.checkpoint: best takes the better one."
    return f"Later checkpoints are worse: k-NN on val {both}, beyond the 95 % intervals. {_why(best, last)}{cure}"


def _told(found: Scores) -> str:
    return f"{percent(found['val_top1'])} % (epoch {found['epoch']})"


def _why(best: Scores, last: Scores) -> str:
    if last["rank_me"] < FEWER_DIRECTIONS * best["rank_me"]:
        return (
            f"The features lost directions (RankMe {best['rank_me']:.1f}, then {last['rank_me']:.1f}): lower "
            "pretrain.lr_at_256 or pretrain.weight_decay_final, or use more or harder local crops."
        )
    return "Fewer pretrain.epochs, a lower pretrain.lr_at_256 or a lower pretrain.weight_decay_final may help."


def _of_directions(scores: Sequence[Scores]) -> str:
    first, last = scores[0], scores[-1]
    most = max(scores, key=lambda found: found["rank_me"])
    text = (
        f"Without labels no k-NN says which epoch is best. Directions in use (RankMe) on val: {first['rank_me']:.1f} "
        f"(epoch {first['epoch']}), {last['rank_me']:.1f} (epoch {last['epoch']})"
    )
    if last["rank_me"] < FEWER_DIRECTIONS * most["rank_me"]:
        return f"{text}; {most['rank_me']:.1f} at epoch {most['epoch']}: features lost directions since."
    return f"{text}."
