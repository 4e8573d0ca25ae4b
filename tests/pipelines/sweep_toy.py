"""A real git and DVC repository with three quick stages under the project's own params.yaml, for sweeps."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[2]
DVC_YAML = {
    "stages": {
        "prepare": {"cmd": "python toy.py prepare", "params": ["data"], "outs": ["prepared"]},
        "pretrain": {
            "cmd": "python toy.py pretrain",
            "deps": ["prepared"],
            "params": ["pretrain"],
            "outs": ["model"],
            "metrics": [{"metrics/pretrain.json": {"cache": False}}],
        },
        "knn": {
            "cmd": "python toy.py knn",
            "deps": ["model"],
            "params": ["knn"],
            "metrics": [{"metrics/knn.json": {"cache": False}}],
        },
    }
}
# On val a high learning rate is best, on test a low one; 3 local crops diverge; 64 epochs wait until they are ended.
SCRIPT = """
import json, os, pathlib, signal, sys, time
import yaml
stage, settings = sys.argv[1], yaml.safe_load(open("params.yaml"))
training, root = settings["pretrain"], pathlib.Path(os.environ["DINO_ROOT"])
def note(what):
    with (root / ".work/ran").open("a") as file:
        file.write(f"{stage} {what}\\n")
note(f"lr {training['lr_at_256']} seed {training['seed']} crops {training['local_crops']}")
if stage == "prepare":
    time.sleep(1.0)  # long enough for two to meet
    pathlib.Path("prepared").write_text("images")
    sys.exit()
pathlib.Path("metrics").mkdir(exist_ok=True)
share = min(0.9, 100 * training["lr_at_256"] + 0.01 * training["seed"])
if stage == "pretrain":
    if training["local_crops"] == 3:
        print("\\npretrain failed: the loss is not finite;\\nlower pretrain.lr_at_256\\n(set DINO_TRACEBACK=1)", file=sys.stderr)
        sys.exit(1)
    if training["epochs"] == 64 and not (root / ".work/saved").exists():
        def save(number, frame):
            time.sleep(0.5)
            (root / ".work/saved").write_text("whole")
            sys.exit(75)
        signal.signal(signal.SIGTERM, save)
        note("waits")
        time.sleep(120)
    pathlib.Path("model").write_text(str(share))
    found = {"loss": 1.0, "health": {"state": "healthy"}}
else:
    found = {"trained": {f"{split}_top1{end}": value + d for split, value in (("val", share), ("test", 1 - share))
                         for end, d in (("", 0), ("_low", -0.02), ("_high", 0.02))}}
pathlib.Path(f"metrics/{stage}.json").write_text(json.dumps(found))
"""  # noqa: E501


def make(root: Path) -> Path:
    """The repository, with one commit."""
    settings = yaml.safe_load((PROJECT / "params.yaml").read_text())
    settings["runtime"]["tracking"]["enabled"] = False
    settings["pretrain"] |= {"lr_at_256": 1.0e-3, "local_crops": 2}
    for name, text in (
        ("params.yaml", yaml.safe_dump(settings, sort_keys=False)),
        ("dvc.yaml", yaml.safe_dump(DVC_YAML, sort_keys=False)),
        ("toy.py", SCRIPT),
        (".gitignore", "/prepared\n/model\n/.work/\n"),
        (".dvcignore", "/.work/\n"),
    ):
        (root / name).write_text(text)
    (root / ".work").mkdir()
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    dvc = [sys.executable, "-P", "-m", "dvc"]
    commands = [
        ["git", "init", "-q"],
        [*dvc, "init", "-q"],
        ["git", "add", "-A"],
        ["git", *author, "commit", "-qm", "toy"],
    ]
    for command in commands:
        subprocess.run(command, cwd=root, env=environment(), check=True)
    return root


def environment() -> dict[str, str]:
    """A terminal's, with this interpreter first and the project importable."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("DINO_", "DVC_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return outside | {"PATH": path, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def sweep(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    command = [sys.executable, "-m", "pipelines.sweep", *arguments]
    return subprocess.run(command, cwd=root, env=environment(), capture_output=True, text=True, timeout=300)
