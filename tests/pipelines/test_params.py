"""Every wrong parameter is named with place, value and cure, all of them in one error."""

import copy
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dino.config import FIELD_NAMES
from pipelines import params

GOOD: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())


def changed(**changes: Any) -> dict[str, Any]:
    """params.yaml's content with `section__key=value` changes."""
    content = copy.deepcopy(GOOD)
    for place, value in changes.items():
        *path, key = place.split("__")
        section = content
        for name in path:
            section = section[name]
        section[key] = value
    return content


def load_text(text: str, folder: Path) -> params.Params:
    path = folder / "params.yaml"
    path.write_text(text, encoding="utf-8")
    return params.load(path)


def refused(content: dict[str, Any], folder: Path) -> list[str]:
    """The lines of the error, without its first."""
    with pytest.raises(ValueError) as error:
        load_text(yaml.safe_dump(content), folder)
    head, *lines = str(error.value).splitlines()
    assert head.endswith(f"has {len(lines)} problem{'s' * (len(lines) > 1)}:")
    return [line.removeprefix("  ") for line in lines]


def test_the_current_directorys_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"no params\.yaml in {tmp_path}; run from the repository's root"):
        params.load()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(pretrain__epochs=7)))
    assert params.load().pretrain.epochs == 7


def test_values_arrive_with_their_types(tmp_path: Path) -> None:
    content = changed(pretrain__lr_at_256="5e-4", pretrain__warmup_epochs=1, pretrain__ratio=[1, 2])
    found = load_text(yaml.safe_dump(content), tmp_path)
    assert found.pretrain.lr_at_256 == 5e-4  # PyYAML reads 5e-4 as text, DVC as a number
    assert (type(found.pretrain.warmup_epochs), found.pretrain.ratio) == (float, (1.0, 2.0))
    assert found.pretrain.depth == GOOD["pretrain"]["depth"]
    assert found.probe.lrs == GOOD["probe"]["lrs"]
    assert found.runtime.tracking.uri is None


def test_params_cannot_be_changed(tmp_path: Path) -> None:
    found = load_text(yaml.safe_dump(GOOD), tmp_path)
    for section, key in ((found, "knn"), (found.knn, "temperature"), (found.pretrain, "epochs")):
        with pytest.raises((ValueError, AttributeError)):
            setattr(section, key, 1)


# changes, start of the line, parts of it
WRONG = [
    ({"pretrain__epocs": 5}, "pretrain.epocs: ", ["no such parameter", "did you mean pretrain.epochs?"]),
    ({"pretain": {}}, "pretain: ", ["no such parameter", "did you mean pretrain?"]),
    ({"runtime__tracking__experimnt": "x"}, "runtime.tracking.experimnt: ", ["mean runtime.tracking.experiment?"]),
    ({"knn__zzz": 5}, "knn.zzz: ", ["no such parameter; remove it"]),
    ({"pretrain__epochs": "many"}, "pretrain.epochs is 'many': ", ["should be a valid integer"]),
    ({"pretrain__epochs": 2.5}, "pretrain.epochs is 2.5: ", ["should be a valid integer"]),
    ({"pretrain__epochs": None}, "pretrain.epochs is None: ", ["should be a valid integer"]),
    ({"pretrain__epochs": True}, "pretrain.epochs is True: ", ["choose a number"]),
    ({"knn__neighbours": [5, False, True]}, "knn.neighbours.1 is False: ", ["greater than or equal to 1"]),
    ({"pretrain__blur_p": [1, True, 0]}, "pretrain.blur_p.1 is True: ", ["choose a number"]),
    ({"pretrain__epochs": 0}, "pretrain.epochs is 0: ", ["choose 1 or more"]),
    ({"pretrain__lr_at_256": math.inf}, "pretrain.lr_at_256 is inf: ", ["should be a finite number"]),
    ({"pretrain__lr_at_256": math.nan}, "pretrain.lr_at_256 is nan: ", ["should be a finite number"]),
    ({"pretrain__arch": "vit_smal"}, "pretrain.arch is 'vit_smal': ", ["did you mean vit_small?"]),
    ({"pretrain__compile": "maybe"}, "pretrain.compile is 'maybe': ", ["should be a valid boolean"]),
    ({"pretrain__ratio": [1.0]}, "pretrain.ratio.1: ", ["missing"]),
    ({"pretrain__ratio": [1.0, 2.0, 3.0]}, "pretrain.ratio is [1.0, 2.0, 3.0]: ", ["at most 2 items"]),
    ({"pretrain__ratio": [1.0, "x"]}, "pretrain.ratio.1 is 'x': ", ["should be a valid number"]),
    ({"pretrain__patch_size": 1000, "pretrain__local_crops": 0}, "pretrain.global_px is ", ["not a multiple", "1000"]),
    ({"pretrain": 5}, "pretrain is 5: ", ["should be a dictionary"]),
    ({"data": None}, "data is None: ", ["should be a valid dictionary"]),
    ({"data__val_fraction": 1.0}, "data.val_fraction is 1.0: ", ["should be less than 1"]),
    ({"data__max_pixels": 10**9}, "data.max_pixels is 1000000000: ", ["less than or equal to 178956970"]),
    ({"data__max_aspect": 0.5}, "data.max_aspect is 0.5: ", ["greater than or equal to 1"]),
    ({"data__folder": 5}, "data.folder is 5: ", ["should be a valid string"]),
    ({"data__seed": -1}, "data.seed is -1: ", ["greater than or equal to 0"]),
    ({"embed__crop_px": 10_000}, "embed.crop_px (10000) ", ["larger than resize_px", "choose at most that"]),
    ({"knn__neighbours": []}, "knn.neighbours is []: ", ["at least 1 item"]),
    ({"knn__neighbours": [5, 0]}, "knn.neighbours.1 is 0: ", ["greater than or equal to 1"]),
    ({"knn__temperature": math.inf}, "knn.temperature is inf: ", ["should be a finite number"]),
    ({"probe__lrs": [0.1, -1]}, "probe.lrs.1 is -1: ", ["greater than 0"]),
    ({"probe__momentum": 1}, "probe.momentum is 1: ", ["less than 1"]),
    ({"linear__lrs_at_256": [0.1, 0]}, "linear.lrs_at_256.1 is 0: ", ["greater than 0"]),
    ({"linear__scale": [0.5, 0.2]}, "linear.scale is [0.5, 0.2]: ", ["first must not be larger"]),
    ({"linear__scale": [0.5, 2]}, "linear.scale ends at 2: ", ["at most the whole image"]),
    ({"runtime__pretrain__save_minutes": 0}, "runtime.pretrain.save_minutes is 0: ", ["greater than 0"]),
    ({"runtime__tracking__experiment": ""}, "runtime.tracking.experiment is '': ", ["at least 1 character"]),
    ({"runtime__tracking__uri": "http://me:hush@host:5000"}, "runtime.tracking.uri holds a password",
     ["MLFLOW_TRACKING_PASSWORD in the environment"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "start", "parts"), WRONG, ids=[start for _, start, _ in WRONG])
def test_a_wrong_parameter_is_named_with_its_cure(
    change: dict[str, Any], start: str, parts: list[str], tmp_path: Path
) -> None:
    (line,) = refused(changed(**change), tmp_path)
    assert line.startswith(start)
    for part in parts:
        assert part in line
    assert "hush" not in line


def test_a_missing_key_is_named_with_its_cure(tmp_path: Path) -> None:
    content = changed()
    del content["knn"]["temperature"], content["embed"]
    lines = refused(content, tmp_path)
    assert [line.split(":")[0] for line in lines] == ["embed", "knn.temperature"]
    assert all("missing; add it" in line for line in lines)


def test_every_problem_stands_in_one_error(tmp_path: Path) -> None:
    several = {
        k: v
        for change, _, _ in WRONG
        for k, v in change.items()
        if k.split("__")[0] in ("data", "knn", "probe", "linear")
    }
    several.pop("data")
    places = {line.split()[0].rstrip(":") for line in refused(changed(**several), tmp_path)}
    expected = {
        "data.val_fraction",
        "data.folder",
        "data.seed",
        "data.max_pixels",
        "data.max_aspect",
        "knn.zzz",
        "knn.neighbours.1",
        "knn.temperature",
    }
    assert places == expected | {"probe.lrs.1", "probe.momentum", "linear.lrs_at_256.1"}


def test_ranges_are_checked_beside_wrong_types(tmp_path: Path) -> None:
    """Pydantic alone comes to the ranges only when all types are right."""
    content = changed(
        pretrain__epochs="many", pretrain__flip=2, pretrain__arch="vit", pretrain__epocs=1, knn__temperature=0
    )
    places = [line.split()[0].rstrip(":") for line in refused(content, tmp_path)]
    assert sorted(places) == sorted(
        ["pretrain.epochs", "pretrain.epocs", "pretrain.flip", "pretrain.arch", "knn.temperature"]
    )


def test_no_problem_is_made_up_from_a_default(tmp_path: Path) -> None:
    """batch's own default would not divide into 48 parts: that is not what the user wrote."""
    assert len(refused(changed(pretrain__batch="all", pretrain__micro_batches=48), tmp_path)) == 1


def test_a_long_value_does_not_fill_the_screen(tmp_path: Path) -> None:
    (line,) = refused(changed(knn__temperature="x" * 10_000), tmp_path)
    assert len(line) < 200


# YAML


# A thousand million values in ten lines
BOMB = "a0: &a0 [0]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("knn:\n  temperature: 1\n  temperature: 2\n", ["line 3", "'temperature' stands here twice; keep one"]),
        ("knn: {}\ndata: {}\nknn: {}\n", ["line 3", "'knn' stands here twice"]),
        ("knn: {a: 1, a: 2}\n", ["line 1", "'a' stands here twice"]),
        ("knn:\n\ttemperature: 1\n", ["line 2, column 1", "indent with spaces, not with a tab"]),
        ("knn:\n  temperature: [1, 2\ndata: 3\n", ["line 3"]),
        ("knn: 'open\n", ["line"]),
        ("? [a, b]\n: 1\n", ["line 1", "a key must be one word"]),
        ("data: 2020-13-45\n", ["month must be in 1..12"]),
        ("data: !!python/object/apply:os.getcwd []\n", ["line 1", "could not determine a constructor"]),
        ("a: *b\n", ["line 1", "undefined alias"]),
        ("[" * 1000, ["recursion"]),
        ("a: &x [1]\nb: *x\n", ["line 2, column 4", "*x stands for a list or a section; write it out"]),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", ["line 3", "*x stands for a list or a section"]),
        (BOMB, ["line 2", "*a0 stands for a list or a section"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_is_no_yaml_is_named_with_its_line(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load_text(text, tmp_path)
    assert "params.yaml cannot be read as YAML: " in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "just words\n", "5\n"])
def test_a_file_without_sections_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml holds no sections; restore it with `git checkout"):
        load_text(text, tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"data: \xff\xfe\x00\n")
    with pytest.raises(ValueError, match=r"params\.yaml cannot be read as YAML"):
        params.load(tmp_path / "params.yaml")


def test_an_anchor_of_one_value_is_plain_yaml(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD).replace("seed: 0", "seed: &seed 3", 1)
    text = text[: text.rindex("seed: 0")] + "seed: *seed" + text[text.rindex("seed: 0") + len("seed: 0") :]
    found = load_text(text, tmp_path)
    assert (found.data.seed, found.pretrain.seed, found.select.seed) == (3, 0, 3)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").touch()
    os.truncate(tmp_path / "params.yaml", 1 << 40)
    with pytest.raises(ValueError, match=r"params\.yaml has 1,099,511,627,776 bytes: no file of settings; restore it"):
        params.load(tmp_path / "params.yaml")


# Fuzz

PLACES = [(s, k) for s in ("data", "pretrain", "embed", "knn", "probe", "linear", "report") for k in GOOD[s]]
PLACES += [("runtime", k) for k in GOOD["runtime"]] + [(s, None) for s in GOOD]
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["vit_tiny", "fp32", "5e-4", "1e400", "0x10", "2020-13-45", "yes"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
edits = st.tuples(
    st.sampled_from(PLACES), st.sampled_from(["set", "drop", "rename", "add"]), values, st.text(max_size=9)
)


def edited(content: dict[str, Any], edit: Any) -> None:
    (section, key), how, value, name = edit
    place = content if key is None else content.get(section)
    key = section if key is None else key
    if not isinstance(place, dict):
        return
    if how == "set":
        place[key] = value
    elif how == "drop":
        place.pop(key, None)
    elif how == "rename":
        place[key[:-1] + name] = place.pop(key, value)
    else:
        place[name] = value


changes_of_params = st.lists(edits, min_size=1, max_size=4)


@given(changes_of_params)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_content_succeeds_or_names_a_key(tmp_path_factory: pytest.TempPathFactory, changes: list[Any]) -> None:
    succeeds_or_names_a_key(tmp_path_factory.getbasetemp(), changes)


@pytest.mark.acceptance
@given(changes_of_params)
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_content_at_length(tmp_path_factory: pytest.TempPathFactory, changes: list[Any]) -> None:
    succeeds_or_names_a_key(tmp_path_factory.getbasetemp(), changes)


def succeeds_or_names_a_key(folder: Path, changes: list[Any]) -> None:
    content = copy.deepcopy(GOOD)
    for edit in changes:
        edited(content, edit)
    try:
        found = load_text(yaml.safe_dump(content), folder)
    except ValueError as error:
        _, *lines = str(error).splitlines()
        keys = {str(key) for section in (content, *content.values()) if isinstance(section, dict) for key in section}
        keys |= set(GOOD) | set(FIELD_NAMES) | {key for _, key in PLACES if key}
        keys |= {repr(key) for key in keys}
        assert lines and all(any(key in line for key in keys) for line in lines), error
        return
    assert found.pretrain.epochs >= 1


@given(st.text(alphabet="ab:-[]{}#&*!|>'\"%@`?, \n\t0.~<", max_size=40))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_ends_in_one_clear_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    with pytest.raises(ValueError, match=r"params\.yaml (cannot be read as YAML|holds no sections|has \d+ problems?)"):
        load_text(text, tmp_path_factory.getbasetemp())
