"""Probes on stored features: settings chosen on val, the chosen one refitted on train + val, tested once."""

from collections.abc import Mapping
from functools import partial
from itertools import product

from dino.distributed import World
from dino.probe import Setting, train_probes
from pipelines.evaluation.evaluate import Judged, Score, best, evaluate, judge_features, warn
from pipelines.evaluation.feature_file import read_key
from pipelines.evaluation.labelled import LabelledRows, Labels
from pipelines.params import Params, Probe
from pipelines.processes.stage import run_stage

PROTOCOL = (
    "probe on stored features without augmentation (not the paper's protocol): softmax regression by SGD, steps "
    "scaled along the features' principal axes; lr and damping chosen on val, refitted on train + val, tested once"
)


def main(params: Params) -> None:
    """Evaluate every kind of features."""
    with World.start() as world:

        def judge(labels: Labels) -> dict[str, Judged]:
            return judge_features(labels, world, lambda kind, rows: judge_probe(kind, rows, params.probe))

        evaluate("probe", params, world, judge, key=read_key("trained"), protocol=PROTOCOL)


def judge_probe(kind: str, rows: Mapping[str, LabelledRows], asked: Probe) -> Judged:
    """Train all settings on train, choose on val, refit that one on train + val, predict test.

    Raises:
        ValueError: every setting diverged.
    """
    fit = partial(train_probes, epochs=asked.epochs, batch=asked.batch, momentum=asked.momentum, seed=asked.seed)
    settings = [Setting(lr, damping) for damping, lr in product(asked.dampings, asked.lrs)]
    val = rows["val"]
    right = fit(*rows["train"], settings=settings).right(*val)
    finite = {
        setting: Score(count, len(val.labels_N))
        for setting, count in zip(settings, right, strict=True)
        if count is not None
    }
    diverged = [f"lr {s.lr:g} damping {s.damping:g}" for s in settings if s not in finite]
    warn("probe", [f"{kind}: {setting} diverged, which loses" for setting in diverged])
    cure = "put smaller ones into probe.lrs"
    if not finite:
        raise ValueError(f"probes of the {kind} features diverged with every setting; {cure}")
    setting = best(finite)
    final = fit(*rows["train"].followed_by(val), settings=[setting])
    if final.diverged.any():
        raise ValueError(f"the probe of the {kind} features diverged with lr {setting.lr:g} on train + val; {cure}")
    by_lr = {
        f"{lr:g}": max(score for tried, score in finite.items() if tried.lr == lr)
        for lr in asked.lrs
        if any(tried.lr == lr for tried in finite)
    }
    test = rows["test"]
    return Judged(
        setting._asdict(),
        finite[setting],
        {"lr": by_lr},
        final.predict(test.features_ND)[0].cpu(),
        test.labels_N.cpu(),
        diverged,
    )


if __name__ == "__main__":
    run_stage("probe", main)
