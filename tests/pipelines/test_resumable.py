"""States of a KEY: the newest that verifies, one trainer at a time, another environment told and recorded."""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
import torch

from dino.training_state import TrainingState, load_state
from pipelines.training.resumable import Resumable, environment

KEY, OTHER = "0123456789abcdef", "fedcba9876543210"
HERE = {"torch": "2.15.0", "device": "cpu", "threads": 1, "world_size": 1}

Opened = Callable[..., Resumable]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINO_ROOT", str(tmp_path))
    return tmp_path


def state(step: int) -> TrainingState:
    return TrainingState(step, {"center": torch.full((1, 50), float(step))}, [{"step": step, "loss": 0.5}])


@pytest.fixture
def opened() -> Iterator[Callable[..., Resumable]]:
    """Opens a KEY, saves these steps in it, and closes it when the test ends."""
    with ExitStack() as stack:

        def open_key(*steps: int, key: str = KEY, env: dict[str, Any] = HERE, **more: Any) -> Resumable:
            resumable = stack.enter_context(Resumable(key, env, **more))
            for step in steps:
                resumable.save(state(step))
            return resumable

        yield open_key


def step_of(loaded: TrainingState | None) -> int | None:
    if loaded is not None:
        assert torch.equal(loaded.tensors["center"], state(loaded.step).tensors["center"])
        assert loaded.curve == state(loaded.step).curve
    return loaded and loaded.step


def names(resumable: Resumable) -> set[str]:
    return {path.name for path in resumable.folder.iterdir()}


def test_nothing_saved_is_nothing_loaded(root: Path, opened: Opened) -> None:
    resumable = opened()
    assert resumable.load() is None and resumable.bit_exact
    assert resumable.folder == root / ".work" / "pretrain" / KEY


def test_the_newest_comes_back_and_the_one_before_is_kept(opened: Opened) -> None:
    resumable = opened(1, 2, 3)
    assert step_of(resumable.load()) == 3
    assert load_state(resumable.previous)[0].step == 2
    assert names(resumable) == {"lock", "state.safetensors", "previous.safetensors"}


def test_a_key_resumes_its_own_states_only(opened: Opened) -> None:
    first, other = opened(4), opened(key=OTHER)
    assert other.load() is None
    other.save(state(9))
    assert (step_of(first.load()), step_of(other.load())) == (4, 9)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "foreign"])
def test_a_corrupt_newest_state_is_told_and_the_one_before_resumed(
    damage: str, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    resumable = opened(5, 6)
    content = bytearray(resumable.newest.read_bytes())
    content[-20] ^= 4
    broken = {"cut": content[:-7], "bit": content, "empty": b"", "foreign": b"\x89PNG" * 99}[damage]
    resumable.newest.write_bytes(broken)
    assert step_of(resumable.load()) == 5
    said = capsys.readouterr().err
    assert str(resumable.newest) in said and "going back to the save before" in said
    resumable.save(state(7))
    assert load_state(resumable.previous)[0].step == 5  # a damaged state never pushes a good one out
    assert step_of(resumable.load()) == 7
    assert capsys.readouterr().err == ""


def test_a_state_that_reads_back_damaged_never_replaces_a_good_one(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that loses a bit, just after the file was written."""
    resumable = opened(5, 6)

    def flip_a_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-20] ^= 4
        path.write_bytes(content)

    monkeypatch.setattr("pipelines.training.resumable.forget_cached", flip_a_bit)
    with pytest.raises(OSError, match=r"reads back damaged.*the one before is kept"):
        resumable.save(state(7))
    assert (load_state(resumable.newest)[0].step, load_state(resumable.previous)[0].step) == (6, 5)


def test_both_corrupt_is_a_new_start_told(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    resumable = opened(1, 2)
    for path in (resumable.newest, resumable.previous):
        path.write_bytes(b"")
    assert resumable.load() is None
    assert capsys.readouterr().err.count("or to the start") == 2


def test_a_kill_at_any_moment_of_a_save_loses_one_interval_at_most(opened: Opened) -> None:
    """Between the renames of a save: the state before is there, and a half-written file is cleared away."""
    with Resumable(KEY, HERE) as resumable:
        for step in (1, 2):
            resumable.save(state(step))
    half = resumable.folder / ".next.123.part.safetensors"
    half.write_bytes(resumable.newest.read_bytes()[:100])
    resumable.newest.replace(resumable.previous)
    assert step_of(opened().load()) == 2
    assert not half.exists()


# One trainer


def test_a_second_trainer_of_the_key_is_refused_until_the_first_ends(opened: Opened) -> None:
    with (
        Resumable(KEY, HERE),
        pytest.raises(
            ValueError, match=rf"^process {os.getpid()} on {gethostname()} trains this .*{KEY}\); wait for it"
        ),
    ):
        opened()
    opened(), opened(key=OTHER)


def test_waiting_for_the_first_trainer_is_told_and_ends_with_it(
    opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Resumable(KEY, HERE)
    with first:
        first.save(state(3))
        threading.Timer(0.5, first.__exit__, (None, None, None)).start()
        assert step_of(opened(wait_minutes=1).load()) == 3
    assert re.match(r"process \d+ on .*: waiting for its end, up to 1 minutes\n$", capsys.readouterr().err)


def test_waiting_in_vain_ends_with_the_same_message(opened: Opened) -> None:
    with Resumable(KEY, HERE), pytest.raises(ValueError, match=r"still, after 0\.01 minutes \(runtime\.wait_for_lock"):
        opened(wait_minutes=0.01)


def test_the_lock_of_a_folder_removed_meanwhile_is_no_lock(opened: Opened) -> None:
    """Who waited holds a file that nobody else can find: it locks the new one."""
    first = Resumable(KEY, HERE).__enter__()
    waiting = threading.Thread(target=opened, kwargs={"wait_minutes": 1})
    waiting.start()
    while threading.active_count() < 2:
        pass
    shutil.rmtree(first.folder)
    first.__exit__()
    waiting.join()
    with pytest.raises(ValueError, match="trains this very setting"):
        opened()


def test_the_lock_of_a_killed_process_is_free(opened: Opened) -> None:
    hold = f"""
import sys, time
from pipelines.training.resumable import Resumable
held = Resumable({KEY!r}, {{}}).__enter__()
print("held", flush=True)
time.sleep(600)
"""
    project = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, cwd=project)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on "):
            opened()
    finally:
        process.kill()
        process.communicate()
    opened()


def test_other_ranks_neither_lock_nor_write_nor_speak(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    main = opened(1, 2)
    main.newest.write_bytes(b"")
    second = opened(8, env=HERE | {"threads": 2}, writes=False)
    assert step_of(second.load()) == 1
    assert not second.bit_exact
    assert names(main) == {"lock", "state.safetensors", "previous.safetensors"}
    assert capsys.readouterr().err == ""


# Environment


def test_the_same_environment_is_bit_exact_and_silent(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    with Resumable(KEY, HERE) as first:
        first.save(state(1))
    again = opened(env=dict(HERE))
    assert step_of(again.load()) == 1
    assert again.bit_exact and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 2}, "threads 1 -> 2"),
        ({"torch": "2.16.0"}, "torch 2.15.0 -> 2.16.0"),
        ({"world_size": 4, "device": "H200"}, "device cpu -> H200; world_size 1 -> 4"),
        ({"new": "fact"}, "new None -> fact"),
    ],
)
def test_another_environment_resumes_warns_and_stays_recorded(
    change: dict[str, Any], said: str, opened: Opened, capsys: pytest.CaptureFixture[str]
) -> None:
    with Resumable(KEY, HERE) as first:
        first.save(state(1))
    with Resumable(KEY, HERE | change) as changed:
        assert step_of(changed.load()) == 1
        warning = capsys.readouterr().err
        assert said in warning and "bit_exact: false" in warning
        assert not changed.bit_exact
        changed.save(state(2))
    back = opened(env=HERE | change)
    assert step_of(back.load()) == 2
    assert not back.bit_exact  # what was computed in two environments stays so
    assert capsys.readouterr().err == ""


def test_the_environment_is_what_repeats_bytes() -> None:
    found = environment(3, torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["device"] == "cpu" and found["world_size"] == 3
    assert found["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"[A-Z0-9_ ]+", found["cpu_capability"])
