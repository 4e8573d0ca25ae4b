"""The law of direction: who may import whom, where each outsider lives, and that DVC sees all code that computes."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
OURS = ("dino", "pipelines")

ALLOWED_IN_DINO = {"torch", "torchvision", "numpy", "pyarrow", "safetensors"}
# Imported where they are used, inside functions. PIL comes with torchvision.
EXTRAS_OF_DINO = {"onnx", "onnxruntime", "timm", "PIL"}
HOMES = {
    "mlflow": {
        *("pipelines/rows/mlflow_store.py", "pipelines/rows/dvc_source.py"),
        *("pipelines/registered/registry.py", "pipelines/registered/served.py"),
    },
    "prefect": {
        *(f"pipelines/{name}.py" for name in ("flow", "tick", "serve")),
        *(f"pipelines/flows/{name}.py" for name in ("stage_task", "artifacts", "cancelling")),
    },
    "dvc": {"pipelines/processes/graph.py", "pipelines/registered/served.py"},
    "pydantic": {"pipelines/params.py"},
    "yaml": {"pipelines/params.py", "pipelines/rows/workspace.py"},  # params.yaml; dvc.lock
    "torch.distributed": {"dino/distributed.py", "pipelines/launch.py"},  # its operations; its launcher
}


def files(*folders: str) -> list[str]:
    """Python files of the project, relative to its root."""
    return sorted(str(file.relative_to(ROOT)) for folder in folders for file in (ROOT / folder).rglob("*.py"))


# Commands on a finished result: they compute, for no stage, so no stage needs them.
TOOLS = {
    *(f"pipelines/{name}.py" for name in ("embed", "export", "look")),
    *("pipelines/evaluation/embedded.py", "pipelines/registered/served.py"),
}
# Changes here rerun nothing: none of it computes what stands in an out. All commands, and whole rooms.
PLUMBING = {
    *("dino/__init__.py", "pipelines/stages/__init__.py"),
    *(str(file.relative_to(ROOT)) for file in (ROOT / "pipelines").glob("*.py")),
    *files(*(f"pipelines/{room}" for room in ("processes", "rows", "registered", "flows", "sweeps"))),
    *(f"pipelines/training/{name}.py" for name in ("pace", "resumable", "save_clock")),
} - TOOLS


class Imports(ast.NodeVisitor):
    """Modules that a file imports when it runs: everywhere in it, but for `if TYPE_CHECKING:`."""

    def __init__(self, file: str):
        self.at_import: set[str] = set()
        self.later: set[str] = set()  # inside functions
        self.depth = 0
        self.visit(ast.parse((ROOT / file).read_text(), file))

    @property
    def all(self) -> set[str]:
        return self.at_import | self.later

    def add(self, name: str) -> None:
        (self.later if self.depth else self.at_import).add(name)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.add(alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert not node.level, "imports are absolute"
        for alias in node.names:
            self.add(f"{node.module}.{alias.name}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("torch", "distributed"):
            self.add("torch.distributed")
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1


@cache
def imports_of(file: str) -> Imports:
    """Read once: most tests ask for most files."""
    return Imports(file)


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def our_files(module: str) -> Iterator[str]:
    """The files that run when `module` (or a name out of one) is imported, packages first."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        place = "/".join(parts[:length])
        for file in (f"{place}/__init__.py", f"{place}.py"):
            if parts[0] in OURS and (ROOT / file).is_file():
                yield file


@cache
def computes(file: str) -> bool:
    """Not plumbing, and not a package's file that holds its docstring only."""
    if file in PLUMBING:
        return False
    body = ast.parse((ROOT / file).read_text()).body
    return not (file.endswith("__init__.py") and all(isinstance(node, ast.Expr) for node in body))


@cache
def code_of(file: str) -> set[str]:
    """The file and all of ours that it imports and that compute, in any way."""
    found: set[str] = set()
    todo = [file]
    while todo:
        if (this := todo.pop()) not in found and computes(this):
            found.add(this)
            todo += [other for module in imports_of(this).all for other in our_files(module)]
    return found


@pytest.mark.parametrize("file", files("dino"))
def test_dino_imports_its_five_and_nothing_of_the_pipeline(file):
    imports = imports_of(file)

    def strangers(modules: set[str], allowed: set[str]) -> set[str]:
        return {module.split(".")[0] for module in modules} - allowed - sys.stdlib_module_names - {"dino"}

    assert not strangers(imports.at_import, ALLOWED_IN_DINO)
    assert not strangers(imports.later, ALLOWED_IN_DINO | EXTRAS_OF_DINO)


@pytest.mark.parametrize("file", files("dino", "pipelines", "benchmarks"))
def test_each_outsider_has_one_home(file):
    modules = imports_of(file).all
    visited = {outsider for outsider in HOMES if any(is_in(module, outsider) for module in modules)}
    assert not {outsider for outsider in visited if file not in HOMES[outsider]}


@pytest.mark.parametrize("outsider", HOMES)
def test_every_home_is_lived_in(outsider):
    """A house that moved takes its entry along."""
    homes = [home for home in HOMES[outsider] if (ROOT / home).is_file()]
    assert homes
    assert all(any(is_in(module, outsider) for module in imports_of(home).all) for home in homes)


@pytest.mark.parametrize("file", sorted(PLUMBING & set(files("pipelines"))))
def test_plumbing_knows_no_stage_and_no_maths(file):
    settings_and_files = ("dino.config", "dino.files", "dino.training_state")
    for module in imports_of(file).all:
        assert not is_in(module, "pipelines.stages")
        assert not is_in(module, "dino") or any(is_in(module, known) for known in settings_and_files)


@pytest.mark.parametrize("file", files("pipelines/stages"))
def test_stages_know_no_other_stage(file):
    assert not {module for module in imports_of(file).all if is_in(module, "pipelines.stages")}


def test_no_module_is_beyond_the_law():
    """Every module of pipelines/ is a stage, computes for one, is plumbing, or a tool that no stage uses."""
    used = {file for stage in STAGES for file in code_of(f"pipelines/stages/{stage}.py")}
    idle = set(files("pipelines")) - used - PLUMBING
    assert {file for file in idle if computes(file)} == TOOLS
    assert not used & TOOLS


def dependencies(stage: str) -> set[str]:
    """The code that dvc.yaml names as a stage's deps; a folder stands for its files."""
    named = [dep for dep in STAGES[stage]["deps"] if dep.split("/")[0] in OURS]
    for dep in named:
        assert (ROOT / dep).exists(), f"{stage}: {dep} does not exist"
    return {file for dep in named for file in ([dep] if dep.endswith(".py") else files(dep))}


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_sees_all_code_that_a_stage_computes_with(stage):
    """Else DVC serves a stale result after a change of code."""
    missing = code_of(f"pipelines/stages/{stage}.py") - dependencies(stage)
    assert not missing, f"deps of {stage} in dvc.yaml lack:\n" + "\n".join(
        f"      - {file}" for file in sorted(missing)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_reruns_for_code_it_does_not_use(stage):
    """Else a change of a log line retrains for three days."""
    needless = {file for file in dependencies(stage) if file in PLUMBING or computes(file)}
    needless -= code_of(f"pipelines/stages/{stage}.py")
    assert not needless, f"deps of {stage} in dvc.yaml hold without need: {sorted(needless)}"


@pytest.mark.parametrize("stage", STAGES)
def test_what_changes_no_result_reruns_nothing(stage):
    def keys(params: list[Any]) -> Iterator[str]:
        for entry in params:
            if isinstance(entry, dict):  # {file: keys}
                for names in entry.values():
                    yield from keys(names or ["runtime"])  # a whole file holds all sections
            else:
                yield entry

    assert not [key for key in keys(STAGES[stage].get("params", [])) if is_in(key, "runtime")]


@pytest.mark.parametrize("stage", STAGES)
def test_command_is_the_stages_module_whatever_the_environment(stage):
    """World size, device and speed are environment: in `cmd` they would rerun the stage."""
    assert STAGES[stage]["cmd"] == f"python -m pipelines.stages.{stage}"


def test_every_path_of_dvc_yaml_stands_in_paths():
    from pipelines import paths

    known = {str(value) for value in vars(paths).values() if isinstance(value, Path)}
    for stage, described in STAGES.items():
        entries = [*described["deps"], *described.get("outs", [])]
        entries += [*described.get("metrics", []), *described.get("plots", [])]
        for entry in entries:
            path = entry if isinstance(entry, str) else next(iter(entry))
            if path.split("/")[0] not in OURS and not path.startswith("$"):
                assert path in known, f"{stage}: {path}"


FLOW = HOMES["prefect"] | {"pipelines/processes/runner.py", "pipelines/flows/summary.py"}


@pytest.mark.parametrize("file", sorted(FLOW))
def test_the_flow_names_no_stage(file):
    """It has their names from dvc.yaml, through DVC."""
    tree = ast.parse((ROOT / file).read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not (texts | names) & set(STAGES)


# In new interpreters; two serve all these tests, since importing torch or Prefect takes seconds


def printed(code: str, environment: dict[str, str]) -> str:
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


ABSENT = ["pipelines", "pydantic", "yaml", "dvc", "mlflow", "prefect", "pandas", "sklearn", "matplotlib", "rich"]
ON_A_BARE_MACHINE = f"""
import importlib, json, pkgutil, sys
sys.modules.update(dict.fromkeys({ABSENT}))  # None: ModuleNotFoundError
loaded = {{"nothing": list(sys.modules)}}
import dino
dino.load
loaded["dino"] = list(sys.modules)
for module in "dino.pretrain", "dino.checkpoint":
    importlib.import_module(module)
    loaded[module] = list(sys.modules)
for module in pkgutil.walk_packages(dino.__path__, "dino."):
    importlib.import_module(module.name)
loaded["all"] = list(sys.modules)
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What is loaded after nothing, `dino`, `dino.pretrain`, `dino.checkpoint`, and all of it."""
    return {name: set(modules) for name, modules in json.loads(printed(ON_A_BARE_MACHINE, {**os.environ})).items()}


def test_importing_dino_loads_nothing_heavy(loaded):
    new = {name.split(".")[0] for name in loaded["dino"] - loaded["nothing"]}
    assert new <= sys.stdlib_module_names | {"dino"}
    assert "dino.checkpoint" not in loaded["dino"]


def test_the_key_of_a_training_holds_the_files_that_python_loads(loaded):
    from dino.fingerprint import code_files

    training = {f"dino.{file.stem}" for file in code_files("pretrain")}
    assert training == {name for name in loaded["dino.pretrain"] if name.startswith("dino.")}


def test_our_vits_load_no_torchvision(loaded):
    """It takes more than a second to import; its own networks, and timm's, bring it when they are built."""
    assert "torch" in loaded["dino.checkpoint"] and "torchvision" not in loaded["dino.checkpoint"]


def test_dino_runs_where_nothing_of_the_pipeline_is_installed(loaded):
    """A bare GPU machine."""
    assert {file.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for file in files("dino")} <= loaded[
        "all"
    ]


AT_HOME = """
import json, sys
import pipelines.serve
modules = list(sys.modules)
from dvc.analytics import is_enabled
from mlflow.telemetry.utils import is_telemetry_disabled
from prefect.settings import get_current_settings
server = get_current_settings().server
print(json.dumps({
    "modules": modules,
    "sent": {"dvc": is_enabled(), "mlflow": not is_telemetry_disabled(), "prefect": server.analytics_enabled},
    "host": server.api.host,
    "patience": server.ephemeral.startup_timeout_seconds,
}))
"""


@pytest.fixture(scope="module")
def at_home() -> dict[str, Any]:
    """Of the flow, where no variable says anything; MLflow is quiet in tests."""
    named = ("PREFECT", "MLFLOW", "DVC", "DO_NOT", "PYTEST")
    unasked = {name: value for name, value in os.environ.items() if not name.startswith(named) and name != "CI"}
    return json.loads(printed(AT_HOME, unasked))


def test_the_flow_loads_no_torch_and_no_stage(at_home):
    heavy = [name for name in at_home["modules"] if name == "torch" or name.startswith(("dino", "pipelines.stages"))]
    assert "prefect" in at_home["modules"] and not heavy


def test_nothing_is_sent_home_unasked(at_home):
    """By the libraries' own account."""
    assert at_home["sent"] == {"dvc": False, "mlflow": False, "prefect": False}
    assert (at_home["host"], at_home["patience"]) == ("127.0.0.1", 90)


def test_a_variable_that_is_set_stays():
    name = "PREFECT_SERVER_ANALYTICS_ENABLED"
    found = printed(f"import os, pipelines; print(os.environ['{name}'])", os.environ | {name: "true"})
    assert found.strip() == "true"


def test_dvc_called_by_hand_is_quiet_too():
    config = (ROOT / ".dvc/config").read_text()
    assert {"analytics = false", "check_update = false"} <= {line.strip() for line in config.splitlines()}
    assert "__pycache__/" in (ROOT / ".dvcignore").read_text().splitlines()
