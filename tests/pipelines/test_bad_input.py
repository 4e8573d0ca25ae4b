"""Bad input at every door: whatever a file holds, a stage succeeds or fails with one clear error, and loses nothing.

The files are those that select, embed, knn, probe, linear and report read. Fuzzed by hypothesis, with a fixed seed.
"""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from results_folder import make_results
from test_evaluate import prepared, small  # noqa: F401 (prepared: a fixture)
from told import ended, tree

from dino.checkpoint import load_tensors, save_tensors
from pipelines import params, paths
from pipelines.stages import embed, knn, linear, probe, report, select

FEATURES = [str(paths.features_file(kind)) for kind in ("trained", "untrained", "pixels")]
TABLES = [str(path) for path in paths.IMAGES.values()]
METRICS = [f"metrics/{name}.json" for name in ("data", "pretrain", "select", "knn", "probe", "linear")]
SNAPSHOT = str(paths.SNAPSHOTS / "epoch_0002.safetensors")
READS = {
    "select": [*TABLES[:2], SNAPSHOT, str(paths.LABELS)],
    "embed": [*TABLES, str(paths.TEACHER), "params.yaml"],
    "knn": [*FEATURES, str(paths.LABELS), "params.yaml"],
    "probe": [*FEATURES, str(paths.LABELS)],
    "linear": [*TABLES, str(paths.TEACHER), str(paths.LABELS)],
    "report": [*METRICS, "plots/pretrain.csv", "plots/knn_predictions.csv", str(paths.TEACHER), FEATURES[0],
               str(paths.LABELS), TABLES[0], TABLES[2]],
}  # fmt: skip
MAINS: dict[str, Callable[[Any], None]] = {
    "select": select.main, "embed": embed.main, "knn": knn.main, "probe": probe.main, "linear": linear.main,
    "report": report.main
}  # fmt: skip
CURE = re.compile(
    r"`dvc |`git |prepare the data again|choose|did you mean|remove it|add it|should be|line \d+|run from"
)


@pytest.fixture(scope="module")
def whole(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """Folders as a stage finds them: one for embed, knn, probe and linear, one for select, one for report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(prepared)
        fitting = small(params.load(), probe={"epochs": 1}, linear={"epochs": 1}).model_dump(mode="json")
    (prepared / "params.yaml").write_text(yaml.safe_dump(fitting))
    trained = shutil.copytree(prepared, tmp_path_factory.mktemp("trained"), dirs_exist_ok=True)
    save_tensors(trained / SNAPSHOT, *with_epoch(*load_tensors(trained / paths.TEACHER)))
    (trained / paths.TEACHER).unlink()
    reported = make_results(tmp_path_factory.mktemp("results"))
    return {
        "select": trained,
        "embed": prepared,
        "knn": prepared,
        "probe": prepared,
        "linear": prepared,
        "report": reported,
    }


def with_epoch(weights: dict[str, Any], facts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return weights, facts | {"epoch": 2, "step": 14}


@pytest.fixture
def run(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Spoil a file in a copy of the folder and run the stage; its error, or "" where it succeeds."""
    for name in ("DINO_ROOT", "DINO_TRACEBACK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DINO_DEVICE", "cpu")

    def run(stage: str, file: str, spoil: Callable[[Path], object]) -> str:
        root = tmp_path / "copy"
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole[stage], root)
        monkeypatch.chdir(root)
        spoil(root / file)
        before = tree(root)
        code = ended(stage, MAINS[stage])
        said = capsys.readouterr().err
        if code == 0:
            return ""
        assert code == 1 and said.count(f"{stage} failed: ") == 1 and "Traceback" not in said, said
        words = said.partition(f"{stage} failed: ")[2].partition("\n(set DINO_TRACEBACK")[0]
        assert len(words) < 2500, words
        named = str(paths.SNAPSHOTS) if file == SNAPSHOT else file
        assert named in words or "params.yaml" in words or re.search(r"(knn|probe|embed)\.\w+", words), words
        assert CURE.search(words), words
        assert tree(root) == before, "a failing stage wrote"
        return words

    return run


# What is surely wrong


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


def words(path: Path) -> None:
    path.write_text("<html>404 not found</html>\n")


def pickled(path: Path) -> None:
    """A pickle that would leave a trace."""
    path.write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


OPTIONAL = {("report", f"metrics/{name}.json") for name in ("knn", "probe", "linear")}
OPTIONAL.add(("report", "plots/knn_predictions.csv"))
PLAIN_TEXT = {".csv", ".yaml", ".json"}


@pytest.mark.parametrize("spoil", [cut, empty, noise, words, pickled, gone, a_folder], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stage", READS)
def test_a_file_that_is_none_is_told_with_its_cure(stage: str, spoil: Any, run: Callable[..., str]) -> None:
    for file in READS[stage]:
        if (stage, file) in OPTIONAL and spoil in (gone, a_folder):
            continue  # an evaluation that was not made
        if file.endswith(".csv") and spoil is cut:
            continue  # fewer lines are whole lines but for the last
        assert run(stage, file, spoil), f"{stage} took {file}"
        assert not Path("ran").exists()


def test_the_folders_themselves_are_good(run: Callable[..., str]) -> None:
    assert [run(stage, READS[stage][0], lambda path: None) for stage in READS] == [""] * len(READS)


# Foreign and mixed


def retyped(column: str, values: pa.Array, **metadata: str) -> Callable[[Path], None]:
    """Rewrite a column of a Parquet file, and entries of its metadata."""

    def spoil(path: Path) -> None:
        table = pq.read_table(path)
        if column:
            table = table.set_column(table.schema.get_field_index(column), column, pa.array(values(table)))
        if metadata:
            known = json.loads(table.schema.metadata[b"dino"]) | metadata
            table = table.replace_schema_metadata({"dino": json.dumps(known)})
        pq.write_table(table, path)

    return spoil


def numbers(table: pa.Table) -> Any:
    return [0.5] * len(table)


def no_numbers(table: pa.Table) -> pa.Array:
    return pa.array([[float("nan")] * 16] * len(table), table.schema.field("features").type)


def one_missing(name: str) -> Callable[[pa.Table], Any]:
    return lambda table: pa.array([None, *table.column(name).to_pylist()[1:]], table.schema.field(name).type)


@pytest.mark.parametrize(
    ("file", "spoil", "said"),
    [
        (FEATURES[0], retyped("features", numbers), "features are of type double"),
        (FEATURES[0], retyped("features", lambda t: [[float("nan")] * 16] * len(t)), "features are of type list"),
        (FEATURES[0], retyped("features", no_numbers), "not all features are finite"),
        (FEATURES[0], retyped("features", one_missing("features")), "Expected all lists to be of size=16"),
        (FEATURES[0], retyped("id", one_missing("id")), "a value is missing"),
        (FEATURES[0], retyped("id", numbers), "split and id are of type string, double"),
        (FEATURES[0], retyped("id", lambda t: ["a"] * len(t)), "an image stands there twice"),
        (FEATURES[0], retyped("", None, key="other"), "with the key other, features/untrained.parquet from 0123456789"),
        (FEATURES[0], retyped("", None, kind="pixels"), "it holds the features 'pixels' under another name"),
        (FEATURES[2], retyped("split", lambda t: ["elsewhere"] * len(t)), "hold different images"),
        (str(paths.LABELS), retyped("label", numbers), "columns of other types: label: double"),
        (str(paths.LABELS), retyped("label", lambda t: ["cat"] * len(t)), "columns of other types: label: string"),
        (str(paths.LABELS), retyped("label", lambda t: [-1] * len(t)), "a label is below 0"),
        (str(paths.LABELS), retyped("id", lambda t: ["a"] * len(t)), "an image stands there twice"),
        (str(paths.LABELS), retyped("split", one_missing("split")), "an image has no split or no id"),
    ],
)  # fmt: skip
def test_features_and_labels_that_do_not_fit_are_told(
    file: str, spoil: Callable[[Path], None], said: str, run: Callable[..., str]
) -> None:
    for stage in ("knn", "probe"):
        assert said in run(stage, file, spoil)


# Fuzz

fuzz = settings(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
DOORS = [(stage, file) for stage, files in READS.items() for file in files]
CHEAP = [(stage, file) for stage, file in DOORS if stage != "report"]  # which takes a second and more
damages = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
    st.tuples(st.just("byte"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("hole"), st.floats(0, 1, exclude_max=True), st.integers(1, 4000)),
    st.tuples(st.just("twice"), st.floats(0, 1), st.integers(1, 4000)),
)


def damaged(path: Path, damage: tuple[str, float, int]) -> None:
    how, share, number = damage
    data = bytearray(path.read_bytes())
    place = int(share * len(data))
    if how == "cut":
        del data[place:]
    elif how == "byte":
        data[place] ^= number
    elif how == "hole":
        data[place : place + number] = bytes(len(data[place : place + number]))
    else:
        data[place:place] = data[place : place + number]
    path.write_bytes(data)


@given(door=st.sampled_from(CHEAP), damage=damages)
@example(door=("probe", str(paths.LABELS)), damage=("byte", 0.25, 128))  # an id that is no UTF-8
@settings(fuzz, max_examples=20)
def test_damaged_bytes(door: tuple[str, str], damage: Any, run: Callable[..., str]) -> None:
    run(*door, lambda path: damaged(path, damage))


@pytest.mark.acceptance
@given(door=st.sampled_from(DOORS), damage=damages)
@settings(fuzz, max_examples=400)
def test_damaged_bytes_at_length(door: tuple[str, str], damage: Any, run: Callable[..., str]) -> None:
    run(*door, lambda path: damaged(path, damage))


scalars = st.none() | st.booleans() | st.integers(-3, 10**20) | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5
)


def edited(path: Path, steps: list[int], value: Any, drop: bool) -> None:
    """Walk into a JSON file by these choices, and change or drop what is there."""
    content = json.loads(path.read_text())
    place = content
    for step in steps:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = keys[step % len(keys)]
        if not place[key] or not isinstance(place[key], dict | list):
            break
        place, keys = place[key], None
    keys = list(place) if isinstance(place, dict) else range(len(place))
    key = keys[steps[-1] % len(keys)]
    if drop:
        del place[key]
    else:
        place[key] = copy.deepcopy(value)
    path.write_text(json.dumps(content))


changes = {
    "file": st.sampled_from(METRICS),
    "steps": st.lists(st.integers(0, 30), min_size=1, max_size=4),
    "value": values,
    "drop": st.booleans(),
}


@given(**changes)
@example(file="metrics/pretrain.json", steps=[7], value=None, drop=False)  # images_seen: null, which broke the page
@settings(fuzz, phases=[Phase.explicit])
def test_metrics_of_any_content(file: str, steps: list[int], value: Any, drop: bool, run: Callable[..., str]) -> None:
    run("report", file, lambda path: edited(path, steps, value, drop))


@pytest.mark.acceptance
@given(**changes)
@settings(fuzz, max_examples=200)
def test_metrics_of_any_content_at_length(
    file: str, steps: list[int], value: Any, drop: bool, run: Callable[..., str]
) -> None:
    run("report", file, lambda path: edited(path, steps, value, drop))
