"""Every benchmark's command runs with tiny settings and prints one JSON line with what it promises."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import by_turns, peak_extra_bytes, ratios, summary
from benchmarks.options import step_flop
from dino.config import PretrainConfig

PROJECT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NETWORK = "--arch vit_tiny --patch-size 4 --global-px 16 --local-px 8 --local-crops 2 --out-dim 64 --batch 2"
COMMANDS = {
    "step": (
        NETWORK,
        "step_s crops_s images_per_s images_per_s_with_crops peak_memory_bytes flop_per_s share_of_product spread",
    ),
    "loss": ("--batches 2 --out-dim 64", "by_batch"),
    "head": ("--rows 8 --width 16 --out-dim 64", "head_s times_its_products peak_memory_bytes"),
    "crops": (f"{NETWORK} --source-px 24", "crops_s images_per_s peak_memory_bytes"),
    "knn": ("--queries 200 --bank 300 --width 8 --neighbours 1 5", "knn_s times_its_product top1 peak_memory_bytes"),
    "linear": ("--rows 200 --width 8 --probes 2 --epochs 1", "probes_s times_one_probe peak_memory_bytes"),
    "prepare": ("--images 20 --source-px 32", "prepare_images_per_s decode_images_per_s read_table_images_per_s"),
}


def check(name: str, printed: str) -> None:
    (line,) = printed.splitlines()
    found = json.loads(line)
    assert {"benchmark", "hardware", "versions", "n", *COMMANDS[name][1].split()} <= found.keys()
    assert found["benchmark"] == name and found["hardware"]["device"] == "cpu"


def arguments(name: str) -> list[str]:
    return ["--steps", "1", "--device", "cpu", *COMMANDS[name][0].split()]


@pytest.mark.acceptance  # the step alone is tried below
def test_the_step_beside_a_plain_one_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", *arguments("step")],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    check("step", done.stdout)


@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_one_line_of_json(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments(name), *(["--alone"] if name == "step" else [])])
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    check(name, capsys.readouterr().out)


def test_every_benchmark_is_tried_here() -> None:
    shared = {"__init__", "measure", "options", "peers", "plain"}
    elsewhere = {"kill", "save"}  # of interruptions: tests/pipelines
    assert {file.stem for file in (PROJECT / "benchmarks").glob("*.py")} - shared - elsewhere == COMMANDS.keys()


def test_contestants_take_turns_and_ratios_are_of_neighbours() -> None:
    calls: list[str] = []
    seconds = by_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, device=CPU, warm_up=1
    )
    assert "".join(calls) == "abababab" and {len(values) for values in seconds.values()} == {3}
    found = ratios({"ours": [1.0, 10.0, 100.0], "peer": [2.0, 20.0, 300.0]}, "ours")
    assert found["peer"]["times_ours"] == {"median": 2.0, "n": 3, "spread": [2.0, 3.0]}
    assert summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "n": 5, "spread": [1.5, 4.5]}


def test_peak_memory_is_what_lived_at_once() -> None:
    def call() -> None:
        first = torch.empty(1000)
        del first
        second, third = torch.empty(2000), torch.empty(500)
        del second, third

    assert 4 * 2500 <= peak_extra_bytes(call, CPU) <= 4 * 2500 + 1024


def test_operations_of_a_step_are_those_of_its_products() -> None:
    """ViT-Tiny, patch 4, 32 px, 4 locals of 16 px, K 4096: 8.27 GFLOP an image, summed by hand."""
    config = PretrainConfig(
        arch="vit_tiny", patch_size=4, global_px=32, local_px=16, local_crops=4, out_dim=4096, batch=64
    )
    assert step_flop(config) / 64 == pytest.approx(8.3e9, rel=0.01)
