"""Laws of the recipes: each fits the settings that the code reads, trains, and says what is known of it and no more."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dvc.utils.hydra import apply_overrides
from tiny import digits, write_table

from dino.config import PretrainConfig
from dino.distributed import World
from dino.pretrain import pretrain
from pipelines import params, recipe

PROJECT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (PROJECT / "recipes").glob("*.yaml"))
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)


def settings_of(name: str, *options: str, folder: Path | None = HERE) -> dict[str, Any]:
    known = recipe.recipes()
    return recipe.whole_settings(recipe.find(name, known), known, folder, options)


def current() -> dict[str, Any]:
    return params.read(PROJECT / "params.yaml")


def test_the_default_recipe_is_params_yaml() -> None:
    """Changed params.yaml? Then copy the change to recipes/fashion-mnist-cpu.yaml; does it fit the others too?"""
    content = current()
    content.pop("runtime")
    assert recipe.recipes()[recipe.DEFAULT].settings == content
    assert list(recipe.differences(current(), settings_of(recipe.DEFAULT, folder=None))) == []


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_fits_and_is_honest(name: str) -> None:
    settings = settings_of(name)
    params.check(recipe.over(current(), settings), name)
    default = recipe.recipes()[recipe.DEFAULT].settings
    named = {(section, key) for section, values in settings.items() for key in values}
    assert named == {(section, key) for section, values in default.items() for key in values}, "unknown settings"
    claims = recipe.recipes()[name].claims
    assert claims.run == "not run by us" or re.match(r"by us on 20\d\d-\d\d-\d\d, commit [0-9a-f]{7}", claims.run)
    assert "not run" in claims.run or all(figure in (PROJECT / "README.md").read_text() for figure in ("83.9", "83.6"))
    assert "(published)" not in claims.expected or "Caron" in claims.source


def test_the_vanilla_recipe_is_the_papers() -> None:
    """dino/config.py holds the paper's values; the batch is that of eight GPUs."""
    pretraining = params.check(recipe.over(current(), settings_of("imagenet-vit-s16-vanilla")), "x").pretrain
    expected = {**vars(PretrainConfig()), "batch": 512}
    assert {name: getattr(pretraining, name) for name in expected} == expected


def test_the_other_published_recipes_differ_from_it_as_their_sources_say() -> None:
    vanilla = settings_of("imagenet-vit-s16-vanilla")["pretrain"]
    boosted = settings_of("imagenet-vit-s16-boosted")["pretrain"]
    assert {name: value for name, value in boosted.items() if value != vanilla[name]} == {
        "epochs": 300, "batch": 1024, "norm_last_layer": False, "teacher_temp": 0.07, "teacher_temp_warmup_epochs": 30,
    }  # fmt: skip
    resnet = settings_of("imagenet-resnet50")["pretrain"]
    of_vits = ("patch_size", "embed_dim", "depth", "num_heads", "drop_path_rate", "init_std", "position_std")
    assert {name: value for name, value in resnet.items() if name not in of_vits and value != vanilla[name]} == {
        "arch": "resnet50", "optimizer": "sgd", "lr_at_256": 0.03, "weight_decay": 1e-4, "weight_decay_final": 1e-4,
        "global_scale": [0.14, 1.0], "local_scale": [0.05, 0.14],
    }  # fmt: skip


def shrunk(pretraining: dict[str, Any]) -> dict[str, Any]:
    """The same recipe for six images and a minute less: sizes are small, everything else is as it was."""
    patch = pretraining["patch_size"]
    small = {"epochs": 1, "batch": 2, "out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 2,
             "warmup_epochs": 0.5, "teacher_temp_warmup_epochs": min(1, pretraining["teacher_temp_warmup_epochs"]),
             "freeze_last_layer_epochs": 0.5}  # fmt: skip
    if pretraining["arch"].startswith("vit"):
        return (
            pretraining
            | small
            | {"embed_dim": 24, "depth": 2, "num_heads": 3, "global_px": 2 * patch, "local_px": patch}
        )
    return pretraining | small | {"global_px": 32, "local_px": 32, "local_crops": 1}


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_trains(name: str, tmp_path: Path) -> None:
    settings = settings_of(name)
    settings["pretrain"] = shrunk(settings["pretrain"])
    config = PretrainConfig(**vars(params.check(recipe.over(current(), settings), name).pretrain))
    table = write_table(tmp_path / "train.arrow", digits(6))
    epochs: list[int] = []
    final = pretrain(
        config, table, world=World(0, 1, torch.device("cpu")), precision=torch.float32,
        snapshot=lambda epoch, backbone: epochs.append(epoch),
    )  # fmt: skip
    assert final.step == 3 and epochs == [1]
    student, teacher = (final.tensors[f"{part}.head.mlp.0.weight"] for part in ("student", "teacher"))
    assert not student.equal(teacher) and student.isfinite().all()


VALUES = [
    "it's",
    "ends in \\",
    '\\" \\\\"',
    'a "b" \\c',
    "/a b/ü{x}=,c",
    "null",
    "1e3",
    "12",
    "true",
    "x y",
    "vit_tiny",
    "timm/a.b-c_d",
    "",
]


def test_values_reach_params_yaml_as_they_are(tmp_path: Path) -> None:
    """Through DVC's own writer of overrides, and then as stages read them."""
    wanted = {
        "words": {f"w{i}": word for i, word in enumerate(VALUES)},
        "numbers": {"a": 1e-6, "b": 5.0, "c": 3, "d": None, "e": True, "f": [0.5, 1e-7, 2.0], "g": 123456789.5},
    }
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({section: dict.fromkeys(values, "old") for section, values in wanted.items()}))
    apply_overrides(path, list(recipe.differences(params.read(path), wanted)))
    found = yaml.safe_load(path.read_text())
    found["numbers"]["f"] = [float(x) for x in found["numbers"]["f"]]  # DVC writes 1e-07, which PyYAML reads as a word
    assert found["words"] == wanted["words"]
    assert {k: float(v) if k == "a" else v for k, v in found["numbers"].items()} == wanted["numbers"]


def test_a_recipe_is_over_the_default_whatever_stands_in_params_yaml() -> None:
    edited = current()
    edited["pretrain"] |= {"lr_at_256": 99.0, "epochs": 7}
    edited["runtime"]["embed"]["batch"] = 3
    settings = settings_of("own-photos", "pretrain.epochs=2", "runtime.embed.batch=5")
    changed = [*recipe.differences(edited, settings)]
    assert {"pretrain.lr_at_256=0.0005", "pretrain.epochs=2", "runtime.embed.batch=5"} <= set(changed)
    merged = recipe.over(edited, settings)
    assert merged["pretrain"]["lr_at_256"] == 5e-4 and merged["runtime"]["tracking"] == edited["runtime"]["tracking"]
    assert f"data.folder={HERE.absolute()}" in changed


def called(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.recipe", *arguments]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def test_the_table_names_every_recipe_and_claim(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for width in ("80", "140"):
        monkeypatch.setenv("COLUMNS", width)
        recipe.main([])
        words = "".join(capsys.readouterr().out.split())
        for name, one in recipe.recipes().items():
            assert name in words
            if width == "80":
                claims = (one.claims.title, one.claims.hardware, one.claims.time, one.claims.expected, one.claims.run)
                assert all("".join(claim.split()) in words for claim in claims)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["own-foto"], "no recipe 'own-foto'; did you mean own-photos? choose one of"),
        (["own-photos"], "own-photos needs --data FOLDER: the folder with your images"),
        (["own-photos", "--data", "nowhere"], "--data nowhere: no such folder (looked for /"),
        (
            ["fashion-mnist-gpu", "-S", "pretrain.epoch=3"],
            "pretrain.epoch: no such parameter; did you mean pretrain.epochs?",
        ),
        (["fashion-mnist-gpu", "-S", "epochs=3"], "-S 'epochs=3': write SECTION.NAME=VALUE"),
        (["fashion-mnist-gpu", "-S", "pretrain.ratio=[1"], "'[1' is no value: line 1"),
        (["fashion-mnist-gpu", "-S", "pretrain.batch=0"], "pretrain.batch is 0: choose 1 or more"),
    ],
)
def test_a_users_error_is_one_clear_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        recipe.main([*arguments, "--dry"])
    assert ended.value.code == 1
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message
