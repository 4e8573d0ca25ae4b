"""A stage in two processes: started by the stage itself, told to end together, dead together."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_pretrain_stage import EXIT_REQUEUE, PROJECT, STEPS, Workplace
from toy import wait_until

from dino.training_state import load_state
from pipelines import launch


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "DINO_PROCESSES", "DINO_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, 0, 1),
        ({}, 4, 4),
        ({"DINO_DEVICE": "cuda"}, 4, 4),
        ({"DINO_DEVICE": "cpu"}, 4, 1),
        ({"DINO_DEVICE": "cpu", "DINO_PROCESSES": "3"}, 0, 3),
        ({"DINO_PROCESSES": "2"}, 4, 2),
        ({"RANK": "0", "DINO_PROCESSES": "2"}, 4, 1),
    ],
)
def test_how_many_processes_is_environment(alone, environment, gpus: int, expected: int) -> None:
    alone.setattr(torch.cuda, "device_count", lambda: gpus)
    for name, value in environment.items():
        alone.setenv(name, value)
    assert launch.processes() == expected


@pytest.mark.parametrize("wanted", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(alone, wanted: str) -> None:
    alone.setenv("DINO_PROCESSES", wanted)
    with pytest.raises(ValueError, match=r"DINO_PROCESSES is .*choose"):
        launch.processes()


def start(place: Workplace) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DINO_")}
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.stages.pretrain"],
        cwd=place.root,
        env=environment
        | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "DINO_DEVICE": "cpu", "DINO_PROCESSES": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def saved_states(place: Workplace) -> list[Path]:
    return [*place.root.glob(".work/pretrain/*/state.safetensors")]


def workers(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.acceptance
def test_told_to_end_both_save_once_and_the_next_two_go_on(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    first = start(place)
    wait_until(lambda: saved_states(place))
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=200)[0]
    assert first.returncode == EXIT_REQUEUE, said
    assert "Traceback" not in said and "run the same command again" in said
    assert said.count("80 images") <= 1 and len(saved_states(place)) == 1
    step = load_state(saved_states(place)[0])[0].step
    assert 0 < step < STEPS
    second = start(place)
    said = second.communicate(timeout=200)[0]
    assert second.returncode == 0, said
    assert f"resuming after step {step}" in said
    assert load_state(tmp_path / "models/training_state.safetensors")[0].step == STEPS


@pytest.mark.acceptance
def test_a_killed_rank_ends_all(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    stage = start(place)
    wait_until(lambda: saved_states(place))
    ranks = workers(stage)
    os.kill(ranks[-1], signal.SIGKILL)
    said = stage.communicate(timeout=200)[0]
    assert stage.returncode == 1, said
    assert "was killed by SIGKILL" in said and "run the same command again" in said
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]


@pytest.mark.acceptance
def test_a_users_error_is_told_in_words(tmp_path: Path) -> None:
    stage = start(Workplace(tmp_path, batch=5))
    said = stage.communicate(timeout=200)[0]
    assert stage.returncode == 1
    assert said.count("does not divide among 2 processes") == 1, said
    assert "Traceback" not in said
