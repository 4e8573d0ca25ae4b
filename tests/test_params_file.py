"""Laws of params.yaml: it validates, code reads every key, a comment explains every key, DVC ignores `runtime`."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from dino.config import FIELD_NAMES
from pipelines import params

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "params.yaml").read_text(encoding="utf-8")
CONTENT: dict[str, Any] = yaml.safe_load(TEXT)
DVC: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def leaves(content: dict[str, Any], *path: str) -> list[tuple[str, ...]]:
    """Paths of all keys that are no section."""
    found = []
    for key, value in content.items():
        found += leaves(value, *path, key) if isinstance(value, dict) else [(*path, key)]
    return found


LEAVES = leaves(CONTENT)


def test_the_file_validates() -> None:
    params.load(ROOT / "params.yaml")


def test_every_setting_of_a_pretraining_stands_in_the_file() -> None:
    assert set(CONTENT["pretrain"]) == set(FIELD_NAMES)


# Every key is read

VALIDATION = {"_ranges", "problems"}  # functions that look at every setting without using it


@cache
def names_read(file: Path) -> frozenset[str]:
    """Names that a file reads as an attribute (`x.name`) or an item (`x["name"]`)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name in VALIDATION)]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            names.add(str(node.slice.value))
    return frozenset(names)


def sizes_read_by_name() -> set[str]:
    """What `getattr(config, name)` of networks.py reads: the keys of the named sizes."""
    assert "getattr(config, name)" in (ROOT / "dino" / "networks.py").read_text(encoding="utf-8")
    for node in ast.parse((ROOT / "dino" / "vision_transformer.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "NAMED_SIZES" and node.value:
            return {name for size in ast.literal_eval(node.value).values() for name in size}
    raise AssertionError("NAMED_SIZES is gone")


def is_read(*path: str) -> bool:
    """Whether a file that reads the key's section reads the key: so `epochs` of one section is not that of another."""
    *sections, key = path
    if sections[:2] == ["runtime", "stages"]:  # by the stages' names in DVC's graph
        return any(f"rules.{key}" in file.read_text(encoding="utf-8") for file in (ROOT / "pipelines").rglob("*.py"))
    if sections == ["pretrain"]:
        files = [file for file in (ROOT / "dino").glob("*.py") if re.search(r"\bconfig\b|Config\b", file.read_text())]
        if key in sizes_read_by_name() or any(key in names_read(file) for file in files):
            return True
    if f"${{{'.'.join(path)}}}" in (ROOT / "dvc.yaml").read_text(encoding="utf-8"):
        return True
    files = [file for file in (ROOT / "pipelines").rglob("*.py") if {*sections} <= names_read(file)]
    return any(key in names_read(file) for file in files)


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_code_reads_every_key(path: tuple[str, ...]) -> None:
    assert is_read(*path)


NOT_READ = ["pretrain.initial_heads", "knn.epochs", "probe.temperature", "runtime.embed.lrs", "runtime.stages.knn.lrs"]


@pytest.mark.parametrize("path", NOT_READ)
def test_a_key_that_nobody_reads_is_found(path: str) -> None:
    assert not is_read(*path.split("."))


# Every key is explained


def explained(text: str) -> dict[str, bool]:
    """Each `key: value` line's key, and whether it, or a line that heads its group (to a blank line), has a comment."""
    found, group = {}, False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            group = False
        elif re.match(r" *#|[a-z_]+: *#", line):
            group = True
        elif match := re.match(r" +([a-z_0-9]+): *([^\s#].*?)(\s#.*)?$", line):
            keys = re.findall(r"(\w+):", match[2]) if match[2].startswith("{") else [match[1]]
            found |= {f"{number}: {key}": group or match[3] is not None for key in keys}
    return found


def test_a_comment_explains_every_key() -> None:
    found = explained(TEXT)
    assert len(found) == len(LEAVES)
    assert [key for key, has_comment in found.items() if not has_comment] == []


def test_a_key_without_a_comment_is_found() -> None:
    text = "a:\n  b: 1 # one\n  c: 2\n\n  # group\n  d: 3\n  e: [4]\n\n  f: 5\nz: # group\n  g: 6\n"
    assert [key for key, has_comment in explained(text).items() if not has_comment] == ["3: c", "9: f"]


# What DVC reruns for


def dvc_params(stage: dict[str, Any]) -> list[str]:
    return [name for entry in stage.get("params", []) for name in ([entry] if isinstance(entry, str) else [*entry])]


@pytest.mark.parametrize("stage", DVC)
def test_no_stage_reruns_for_what_changes_no_result(stage: str) -> None:
    names = dvc_params(DVC[stage])
    assert names and not [name for name in names if name.split(".")[0] == "runtime"]
    for name in names:
        value: Any = CONTENT
        for key in name.split("."):
            value = value[key]


def test_every_section_that_changes_results_belongs_to_a_stage() -> None:
    sections = {name.split(".")[0] for stage in DVC.values() for name in dvc_params(stage)}
    assert sections == set(CONTENT) - {"runtime"}
