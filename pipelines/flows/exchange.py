"""What a tick exchanges with the world, by DVC: data that comes in before the stages, results that go out after."""

import time
from collections.abc import Callable
from dataclasses import replace

from pipelines.processes.graph import Outside
from pipelines.processes.runner import Outcome, StageResult, StageRunner

Say = Callable[[str], None]
IN, OUT = "data", "push"
# What `dvc fetch`, `checkout`, `update` and `push` say when there was nothing to do.
NOTHING_TO_DO = ("Everything is up to date.", "didn't change, skipping")


def bring_in(runner: StageRunner, outside: Outside, folder: str, say: Say) -> StageResult:
    """Bring data in: imports are updated, the remote's files fetched, missing data checked out.

    A folder that DVC does not hold is watched where it lies: the first stage that reads it sees what changed.

    Args:
        runner: Runs the commands.
        outside: Where data comes from.
        folder: data.folder, for people.
        say: Takes lines for people.
    """
    commands = [["update", file] for file in outside.imports]
    if outside.remote:
        commands.append(["fetch", "--remote", outside.remote])
    commands += [["checkout", file] for file in outside.missing]
    if not commands:
        say(f"no remote, no imports: {folder} is watched where it lies")
    return _in_turn(runner, IN, commands, say)


def push(runner: StageRunner, outside: Outside, say: Say) -> StageResult:
    """Send results to the remote, if there is one."""
    if not outside.remote:
        say("no remote is set (`dvc remote add -d NAME URL`): results stay here")
        return StageResult(OUT, Outcome.UNCHANGED, 0, 0.0, ())
    return _in_turn(runner, OUT, [["push", "--remote", outside.remote]], say)


def _in_turn(runner: StageRunner, name: str, commands: list[list[str]], say: Say) -> StageResult:
    """Run DVC's commands one after the other, to the first that fails."""
    began = time.monotonic()
    result = StageResult(name, Outcome.UNCHANGED, 0, 0.0, ())
    news = False
    for command in commands:
        result = runner.dvc(name, command, say)
        if result.outcome is not Outcome.RAN:
            return result
        news |= not any(line.endswith(NOTHING_TO_DO) for line in result.last_lines)
    outcome = Outcome.RAN if news else Outcome.UNCHANGED
    return replace(result, outcome=outcome, seconds=time.monotonic() - began)
