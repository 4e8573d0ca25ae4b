"""What a sweep tries, and that nothing wrong ever starts."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides

from pipelines import params
from pipelines.sweeps.variants import grid, parse

PROJECT = Path(__file__).parents[2]


def current() -> dict[str, Any]:
    return params.read(PROJECT / "params.yaml")


def made(*arguments: str, seeds: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    return [one.settings for one in grid(parse(arguments, seeds), current(), "s")]


def test_every_combination_with_every_seed_as_the_code_reads_the_values() -> None:
    found = made("pretrain.lr_at_256=5e-4,1", "knn.neighbours=[5],[5, 20]", seeds=(0, 3))
    assert len(found) == 8
    assert found[0] == {"pretrain.lr_at_256": 0.0005, "knn.neighbours": [5], "pretrain.seed": 0}
    assert found[-1] == {"pretrain.lr_at_256": 1.0, "knn.neighbours": [5, 20], "pretrain.seed": 3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain.local_crop=4,8"], "pretrain.local_crop: no such parameter; did you mean pretrain.local_crops?"),
        (["pretran.local_crops=4"], "pretran: no such parameter; did you mean pretrain?"),
        (["pretrain.local_crops=two,4"], "pretrain.local_crops is 'two': input should be a valid integer"),
        (["knn.neighbours=5,10"], "knn.neighbours is 5: input should be a valid list"),
        (["pretrain.local_crops=4", "pretrain.lr_at_256=1e-3,-2"], "choose more than 0 (in local_crops=4 lr_at_256=-2"),
        (["pretrain.epochs=5,1", "pretrain.warmup_epochs=2"], "(in epochs=1 warmup_epochs=2)"),
        (["runtime.embed.batch=1,2"], "runtime.embed.batch changes no result"),
        (["pretrain.lr_at_256=0.001,1e-3"], "lr_at_256=0.001 stands there twice"),
        (["pretrain.epochs=1", "pretrain.epochs=2"], "pretrain.epochs stands there twice"),
        (["epochs=3"], "write SECTION.NAME=VALUE,VALUE"),
        (["pretrain.epochs="], "write SECTION.NAME=VALUE,VALUE"),
        (["pretrain.ratio=[1"], "is no value"),
    ],
)
def test_a_wrong_value_is_told_before_anything_starts(arguments: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=r"(?s).") as refused:
        made(*arguments)
    assert said in str(refused.value)


def test_seeds_and_a_swept_seed_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"pretrain\.seed and --seeds are the same"):
        parse(["pretrain.seed=1,2"], [0])


WORDS = [
    "a b",
    "a-b",
    "..",
    "x.lock",
    "/a/b",
    "/c/b",
    "é~^:",
    "@{1}",
    "[",
    "a\\b",
    "x" * 300,
    "x" * 299 + "y",
    "-",
    "b.",
]


def test_names_differ_and_git_takes_them() -> None:
    names = [one.name for one in grid({"data.folder": WORDS}, current(), "s")]
    assert len({*names}) == len(WORDS)
    for name in names:
        reference = f"refs/exps/ab/cd/{name}"
        assert "/" not in name
        assert subprocess.run(["git", "check-ref-format", reference]).returncode == 0, name


def test_values_reach_params_yaml_as_they_were_checked(tmp_path: Path) -> None:
    """Through DVC's own writer of overrides."""
    arguments = ["pretrain.lr_at_256=1e-7", "data.folder='/a b/c,d'", "knn.neighbours=[5, 7]", "pretrain.init_std=null"]
    (one,) = grid(parse(arguments), current(), "s")
    path = tmp_path / "params.yaml"
    path.write_text((PROJECT / "params.yaml").read_text())
    apply_overrides(path, one.overrides()[1::2])
    read = yaml.safe_load(path.read_text())
    assert read["data"]["folder"] == "/a b/c,d" and read["knn"]["neighbours"] == [5, 7]
    assert params.load(path).pretrain.lr_at_256 == 1e-7 and read["pretrain"]["init_std"] is None
