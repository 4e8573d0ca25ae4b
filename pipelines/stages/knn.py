"""Weighted k-NN on stored features: k chosen on val, tested once with train and val as the bank."""

from collections.abc import Mapping

import pandas as pd
from torch import Tensor

from dino.distributed import World
from dino.files import whole_file
from dino.knn import knn_predict
from pipelines import paths
from pipelines.evaluation.evaluate import Judged, Score, best, evaluate, judge_features
from pipelines.evaluation.feature_file import read_key
from pipelines.evaluation.labelled import LabelledRows, Labels
from pipelines.params import Params
from pipelines.processes.stage import run_stage


def main(params: Params) -> None:
    """Evaluate every kind of features."""
    with World.start() as world:
        knn(params, world)


def knn(params: Params, world: World) -> None:
    """Write metrics/knn.json and plots/knn_predictions.csv.

    Raises:
        ValueError: a k larger than the bank, or files that are missing or do not fit each other.
    """
    settings = params.knn
    protocol = (
        f"weighted k-NN on L2-normalised features, vote exp(cosine / {settings.temperature:g}); k chosen on val with "
        "the bank train, tested once with the bank train + val"
    )

    def judge(labels: Labels) -> dict[str, Judged]:
        return judge_features(
            labels, world, lambda kind, rows: judge_knn(rows, settings.neighbours, settings.temperature, world)
        )

    labels, judged = evaluate("knn", params, world, judge, key=read_key("trained"), protocol=protocol)
    if world.is_main:
        write_predictions(labels, judged)


def judge_knn(rows: Mapping[str, LabelledRows], neighbours: list[int], temperature: float, world: World) -> Judged:
    """Choose k on val, predict test with it; each rank takes its share of the queries."""

    def predict(bank: LabelledRows, queries: LabelledRows, ks: list[int]) -> dict[int, Tensor]:
        mine = world.rows(len(queries.labels_N))
        found = knn_predict(*bank, queries.features_ND[mine.start : mine.stop], neighbours=ks, temperature=temperature)
        return {k: world.gather_rows(labels_N) for k, labels_N in found.items()}

    val, test = rows["val"], rows["test"]
    by_k = {k: Score.of(found, val.labels_N) for k, found in predict(rows["train"], val, neighbours).items()}
    k = best(by_k)
    predicted_M = predict(rows["train"].followed_by(val), test, [k])[k]
    tried = {"k": {str(k): score for k, score in by_k.items()}}
    return Judged({"k": k}, by_k[k], tried, predicted_M.cpu(), test.labels_N.cpu())


def write_predictions(labels: Labels, judged: Mapping[str, Judged]) -> None:
    """Write plots/knn_predictions.csv: actual and predicted class of each test image, by the trained backbone.

    A header alone where nothing was judged.
    """
    names = labels.names
    result = judged.get("trained")
    columns = {
        "actual": [] if result is None else [names[label] for label in result.actual_M.tolist()],
        "predicted": [] if result is None else [names[label] for label in result.predicted_M.tolist()],
    }
    with whole_file(paths.KNN_PREDICTIONS) as aside:
        pd.DataFrame(columns).to_csv(aside, index=False, lineterminator="\n", encoding="utf-8")


if __name__ == "__main__":
    run_stage("knn", main, shared=True)
