"""Each deliberate defect of mutations.py turns its test red, in a copy of the tree; the README lists them all."""

import contextlib
import os
import shutil
import sys
from multiprocessing import get_context
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, table
from unguarded import UNGUARDED

ROOT = Path(__file__).parents[1]
NEEDED = ("dino", "pipelines", "tests", "weights", "params.yaml", "dvc.yaml", "pyproject.toml")
ALL = [*MUTATIONS, *UNGUARDED]
SLOW_TO_IMPORT = ["torch", "torch._dynamo", "torchvision.transforms.v2", "scipy.stats", "pytest"]
TESTS_FAILED = 1  # pytest's exit code; 2 to 5: it could not even run them
MAX_SECONDS = 600
CRASHES = ("NameError", "SyntaxError", "ImportError")  # a defect that is no running code


def test_the_readme_lists_every_defect() -> None:
    readme = (ROOT / "tests" / "README.md").read_text()
    assert table(MUTATIONS) in readme and table(UNGUARDED) in readme


def test_every_defect_still_has_its_place_and_its_test() -> None:
    for mutation in ALL:
        healthy = (ROOT / mutation.file).read_text()
        assert healthy.count(mutation.old) == 1, f"{mutation.file} has changed: renew {mutation.defect!r}"
        file, _, name = mutation.test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / place(file)).read_text()


def place(test: str) -> str:
    """Below tests/dino, or below tests/ where it names its folder."""
    return f"tests/{test}" if "/" in test.partition("::")[0] else f"tests/dino/{test}"


def in_a_fork(tree: Path, tests: list[str], log: Path) -> None:
    """Run these tests of the tree in this process, which a server forked that has imported torch but no dino."""
    os.chdir(tree)
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True  # one second's edits would look alike
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *map(place, tests)])
    os._exit(code)


def run_tests(tree: Path, tests: list[str]) -> tuple[int | None, str]:
    """Exit code and output of pytest."""
    forks = get_context("forkserver")
    forks.set_forkserver_preload(SLOW_TO_IMPORT)
    log = tree / "log.txt"
    process = forks.Process(target=in_a_fork, args=(tree, tests, log))
    process.start()
    process.join(MAX_SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
    return process.exitcode, log.read_text()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy whose named tests are green."""
    copy = tmp_path_factory.mktemp("tree")
    for part in NEEDED:
        source, target = ROOT / part, copy / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    code, output = run_tests(copy, sorted({m.test for m in ALL}))
    assert code == 0, output
    return copy


@pytest.mark.acceptance
@pytest.mark.parametrize("mutation", ALL, ids=[m.defect for m in ALL])
def test_a_deliberate_defect_is_caught(mutation: Mutation, tree: Path) -> None:
    file = tree / mutation.file
    healthy = file.read_text()
    try:
        file.write_text(healthy.replace(mutation.old, mutation.new))
        code, output = run_tests(tree, [mutation.test])
    finally:
        file.write_text(healthy)
    assert code == TESTS_FAILED, f"not caught: {mutation.defect}\n{output}"
    # a law that is broken, not a line that crashes; without a guard, the fault itself may be what the test meets
    if mutation in MUTATIONS:
        assert "AssertionError" in output or "DID NOT RAISE" in output or "E       assert " in output, output
    assert not any(f"E   {error}" in output.replace("E       ", "E   ") for error in CRASHES), output
