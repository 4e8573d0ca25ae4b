"""KEY of intent: what names a training by its settings, its images and the code that computes it."""

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent


def code_files(module: str) -> list[Path]:
    """The module's file and those of `dino` that it imports, directly or not; module is a name such as "pretrain"."""
    found: list[Path] = []
    waiting = [module]
    while waiting:
        file = PACKAGE / f"{waiting.pop()}.py"
        if file in found:
            continue
        found.append(file)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE.name}."):
                waiting.append(str(node.module).partition(".")[2])
    return sorted(found)


def code_digest(files: list[Path]) -> str:
    """Digest of the files' syntax trees without comments and docstrings, which change no result."""
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{file.name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()


def intent_key(settings: dict[str, Any], data_md5: str, module: str = "pretrain") -> str:
    """16 hex digits: the same for the same settings, images and code, another for any other."""
    text = json.dumps([settings, data_md5, code_digest(code_files(module))], sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
