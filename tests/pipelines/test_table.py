"""Laws of the table that `make run` ends with: every number, whole, wherever it is printed; and at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from results_folder import KNN, LINEAR, NO_LABELS, PROBE, REPOSITORY, make_results

SECONDS = {"fetch": 3.14, "prepare": 18.84, "pretrain": 1287.6, "knn": 12.0}
STAGES = ["fetch", "prepare", "pretrain", "select", "embed", "knn", "probe", "linear", "report"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_results(tmp_path_factory.mktemp("results"))
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    (root / ".work").mkdir()
    (root / ".work/seconds.json").write_text(json.dumps(SECONDS))
    (root / "report").mkdir()
    (root / "report/index.html").write_text("page")
    return root


def table(root: Path, **environment: str) -> str:
    """What `python -m pipelines.table` prints into a pipe."""
    known = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.table"],
        cwd=root,
        env=known | {"PYTHONPATH": str(REPOSITORY), "DINO_ROOT": str(root)} | environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    return ended.stdout


def all_numbers() -> list[str]:
    scores = [found[kind] for found in (KNN, PROBE, LINEAR) for kind in found if kind != "protocol"]
    names = ("test_top1", "test_top1_low", "test_top1_high")
    texts = [[f"{100 * score[name]:.1f}" for name in names] for score in scores]
    return [f"{test} ({low}-{high})" for test, low, high in texts]


@pytest.mark.parametrize(
    "environment",
    [{}, {"COLUMNS": "200"}, {"COLUMNS": "79"}, {"COLUMNS": "60"}, {"COLUMNS": "32"}, {"PYTHONIOENCODING": "ascii"}],
)
def test_every_number_stands_whole_at_any_width(folder: Path, environment: dict[str, str]):
    printed = table(folder, **environment)
    assert [number for number in all_numbers() if number not in printed] == []
    lines = [line.split() for line in printed.splitlines()]
    rows = {line[0]: line[1] for line in lines if len(line) == 2 and line[0] in (*STAGES, "sum")}
    assert rows == {
        **dict.fromkeys(STAGES, "-"), "fetch": "3.1", "prepare": "18.8", "pretrain": "1,287.6", "knn": "12.0",
        "sum": "1,321.6",
    }  # fmt: skip
    assert [line[0] for line in lines if len(line) == 2 and line[0] in STAGES] == STAGES
    words = " ".join(printed.split())
    assert "By k-NN and by probe the trained backbone beats the untrained network and raw pixels; by linear" in words
    assert "Teacher: epoch 2 (last). k-NN on val went from 60.0 % (epoch 1) to 70.0 % (epoch 2), the highest." in words
    assert f"Report {(folder / 'report/index.html').resolve()}\n" in printed.replace("Report  ", "Report ")
    assert "make ui" in printed
    assert "\x1b" not in printed


def test_kinds_and_evaluations_are_told_apart(folder: Path):
    lines = table(folder).splitlines()
    heading = next(line for line in lines if "k-NN" in line and "probe" in line)
    assert heading.index("k-NN") < heading.index("probe")
    for kind, title in {
        "trained": "Trained backbone",
        "untrained": "Untrained backbone",
        "pixels": "Raw pixels",
    }.items():
        row = next(line for line in lines if title in line)
        knn, probe = (f"{100 * found[kind]['test_top1']:.1f}" for found in (KNN, PROBE))
        assert row.index(knn) < row.index(probe)


def test_without_labels_it_says_why(tmp_path: Path):
    make_results(tmp_path, labelled=False)
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    printed = " ".join(table(tmp_path).split())
    assert f"k-NN: left out ({NO_LABELS['skipped']})" in printed
    assert f"probe: left out ({NO_LABELS['skipped']})" in printed
    assert "Without labels the trained backbone has no score; training is healthy." in printed
    assert "not written yet; `dvc repro` writes it" in printed


def test_before_anything_has_run_it_says_so(tmp_path: Path):
    shutil.copy(REPOSITORY / "dvc.yaml", tmp_path)
    printed = " ".join(table(tmp_path).split())
    assert "k-NN: left out (not evaluated yet)" in printed and "sum -" in printed


def test_it_loads_nothing_heavy(folder: Path):
    heavy = {"torch", "numpy", "pandas", "mlflow", "matplotlib", "pydantic", "dvc", "prefect"}
    code = f"import sys; from pipelines import table; table.main(); print(*({heavy} & set(sys.modules)))"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1] == ""
