"""The KEY of intent: another for whatever changes results, the same for whatever doesn't.

That it holds the files that Python loads: tests/test_architecture.py.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tiny import SETTINGS

from dino import fingerprint
from dino.config import PretrainConfig
from dino.fingerprint import code_digest, intent_key

MD5 = "d41d8cd98f00b204e9800998ecf8427e"
CHOSEN = asdict(PretrainConfig(**SETTINGS))

# One of everything that the grammar of Python 3.11 has and this project uses.
SOURCE = '''"""Module."""
import math
from collections.abc import Callable

# a comment
LIMIT: int = 1_000
class A(dict[str, float], metaclass=type):
    """Class."""
    x: float = 0.5  # another

    @property
    def half(self) -> float:
        """Half."""
        return self.x / 2

async def g(): ...
def f(a, /, b: int = 1, *rest: str, c, **more) -> Callable[..., int] | None:
    """Function."""
    global LIMIT
    total, *_ = (lambda y: y + 1 if y else -y)(b), b"b", None, True, ..., 1j
    for i, j in enumerate(rest):
        while i < j <= 3 and not (total := math.pi):
            continue
    with open(a, mode="r") as file, file:
        text = f"{total!r:>{b}s} of {a}" "tail"
    try:
        del more["x"], rest[1:2]
    except (KeyError, ValueError) as error:
        raise RuntimeError(text) from error
    else:
        assert {**more} and [k for k in {1, 2} if k]
    finally:
        yield from (x async for x in g())
    match a:
        case {"k": [1, *others], **left} | A(x=left):
            return others
'''
# By Python 3.11.7; 3.12.1 and 3.13.0 give the same.
SOURCE_DIGEST = "6755981f9739a2aadb421a770e5d837f9051bfaa6f117a095ebc4e8f9b57a213"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of dino/ whose files may be changed."""
    copy = tmp_path / "dino"
    shutil.copytree(fingerprint.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "PACKAGE", copy)
    return copy


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def key(module: str = "ema") -> str:
    """Of all that a module imports; what pretrain does takes half a second to read."""
    return intent_key(CHOSEN, MD5, module)


def test_a_key_is_sixteen_hex_digits_and_always_the_same() -> None:
    assert intent_key(CHOSEN, MD5) == key("pretrain") != key()
    assert len(key()) == 16 and int(key(), 16) >= 0
    assert key() == key() == intent_key(dict(reversed(CHOSEN.items())), MD5, "ema")
    assert key() == intent_key(json.loads(json.dumps(CHOSEN)), MD5, "ema")  # as it is read from a checkpoint


def other(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] + 0.01)
    return "another" if isinstance(value, str) else (value or 0) + 1


def test_each_setting_the_images_and_their_going_back() -> None:
    keys = {name: intent_key(CHOSEN | {name: other(value)}, MD5, "ema") for name, value in CHOSEN.items()}
    keys["images"] = intent_key(CHOSEN, MD5.replace("d", "e"), "ema")
    assert len({key(), *keys.values()}) == len(CHOSEN) + 2
    assert intent_key(CHOSEN | {"epochs": CHOSEN["epochs"]}, MD5, "ema") == key()


NO_RESULT = [
    ("loss.py", "GLOBAL_VIEWS = 2\n", "GLOBAL_VIEWS  =  2  # of them global\n\n\n"),
    ("ema.py", '"""Momentum teacher', '"""Another word: momentum teacher'),
    ("pretrain.py", '"""Mean over ranks', '"""The mean over ranks'),
    ("schedules.py", "    progress = (step - warmup_steps)", "    # a remark\n    progress = ((step - warmup_steps))"),
]
OTHER_CODE = [
    ("loss.py", "GLOBAL_VIEWS = 2\n", "GLOBAL_VIEWS = 3\n"),
    ("ema.py", "1.0 - momentum", "1.0 + momentum"),
    ("draws.py", "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C17"),
    ("decode.py", '{1: "L", 3: "RGB"}', '{1: "L", 3: "YCbCr"}'),
    ("pretrain.py", "optimizer.step()", "pass"),
    ("vision_transformer.py", "NORM_EPS = 1e-6", "NORM_EPS = 1e-5"),
]


@pytest.mark.parametrize(("file", "old", "new"), NO_RESULT, ids=[file for file, *_ in NO_RESULT])
def test_what_changes_no_result_keeps_the_digest(file: str, old: str, new: str, package: Path) -> None:
    before = code_digest([package / file])
    edit(package / file, old, new)
    assert code_digest([package / file]) == before


@pytest.mark.parametrize(("file", "old", "new"), OTHER_CODE, ids=[file for file, *_ in OTHER_CODE])
def test_what_changes_code_changes_the_digest(file: str, old: str, new: str, package: Path) -> None:
    before = code_digest([package / file])
    edit(package / file, old, new)
    assert code_digest([package / file]) != before
    edit(package / file, new, old)
    assert code_digest([package / file]) == before


def test_the_key_changes_with_the_code_that_is_imported_and_with_no_other(package: Path) -> None:
    before = key("pretrain")
    for change in NO_RESULT:
        edit(package / change[0], *change[1:])
    edit(package / "knn.py", "import torch\n", "import torch\n\nUNUSED = 1\n")  # that training does not import
    assert key("pretrain") == before
    edit(package / "draws.py", "0x9E3779B97F4A7C15", "0x9E3779B97F4A7C17")  # imported by what it imports
    assert key("pretrain") != before


@pytest.mark.parametrize("form", ["import dino.extra", "from dino.extra import x", "from dino import extra as y"])
def test_every_form_of_import_is_followed(form: str, package: Path) -> None:
    (package / "extra.py").write_text("x = 1\n")
    edit(package / "ema.py", "import torch\n", f"import torch\n{form}\n")
    before = key()
    (package / "extra.py").write_text("x = 2\n")
    assert key() != before


def test_a_relative_import_is_an_error_of_ours(package: Path) -> None:
    edit(package / "ema.py", "import torch\n", "import torch\nfrom . import draws\n")
    with pytest.raises(AssertionError, match="relative import"):
        key()


def test_a_digest_is_the_same_in_every_version_of_python(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(SOURCE)
    assert code_digest([tmp_path / "source.py"]) == SOURCE_DIGEST
