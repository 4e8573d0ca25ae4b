"""KEY of intent: what names a training by its settings, its images and the code that computes it."""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


@cache  # by the text, so it is never stale
def imported_modules(source: str) -> list[str]:
    """Full names that the import statements of a module may take from modules of `dino`."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import would escape the KEY"
            from_package = node.module == PACKAGE.name
            names += [f"{node.module}.{alias.name}" for alias in node.names] if from_package else [str(node.module)]
    return [name.partition(".")[2] for name in names if name.startswith(f"{PACKAGE.name}.")]


def code_files(module: str) -> list[Path]:
    """The module's file and those of `dino` that it imports, directly or not; module is a name such as "pretrain"."""
    found: list[Path] = []
    waiting = [module]
    while waiting:
        file = PACKAGE / f"{waiting.pop()}.py"
        if file not in found:
            found.append(file)
            waiting += imported_modules(file.read_text(encoding="utf-8"))
    return sorted(found)


def plain_tree(node: Any) -> Any:
    """A syntax tree as nested lists; without empty fields, since each version of Python has more of them."""
    if isinstance(node, ast.AST):
        filled = [[name, plain_tree(value)] for name, value in ast.iter_fields(node) if value not in (None, [])]
        return [type(node).__name__, *filled]
    return [plain_tree(item) for item in node] if isinstance(node, list) else repr(node)


@cache
def plain_code(source: str) -> str:
    """A module's syntax tree without comments and docstrings, which change no result."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return json.dumps(plain_tree(tree))


def code_digest(files: list[Path]) -> str:
    """Digest of the files' names and code."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"[{json.dumps(file.name)}, {plain_code(file.read_text(encoding='utf-8'))}]".encode())
    return digest.hexdigest()


def intent_key(settings: dict[str, Any], data_md5: str, module: str = "pretrain") -> str:
    """16 hex digits: the same for the same settings, images and code, another for any other."""
    text = json.dumps([settings, data_md5, code_digest(code_files(module))], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
