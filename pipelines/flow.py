"""`python -m pipelines.flow [STAGE...] [--force]`: the pipeline as a Prefect flow, generated from DVC's graph.

One task a stage, named as the stage; stages that don't need each other run in parallel. DVC alone decides what is
stale, so Prefect's caching is off. Which stages there are stands in dvc.yaml and nowhere here; how often one is tried,
how long it may take and whether it needs the GPU's slot stands in params.yaml (runtime.stages).

Exit code: 0 when every stage is up to date, 1 when one failed, 130 after Ctrl-C.
"""

import argparse
import atexit
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import CancelledRun, FailedRun
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Failed

from pipelines import paths
from pipelines.flows import artifacts, stage_task, summary
from pipelines.flows.cancelling import heeding_cancellation
from pipelines.flows.local_server import local_server
from pipelines.processes.graph import Graph, stage_graph, stages_for
from pipelines.processes.runner import StageResult, StageRunner

INTERRUPTED = 130
DESCRIPTION = "Bring the pipeline's stages up to date, in the order of DVC's graph"


@flow(name="dino", description=DESCRIPTION, persist_result=False)
def pipeline(targets: list[str] | None = None, force: bool = False) -> State:
    """Bring the pipeline's stages up to date, in the order of DVC's graph.

    Args:
        targets: stages to run with what they need; all of them if none is named.
        force: run also what DVC holds to be unchanged.

    Returns:
        A completed state, or a failed one whose message names the stage, its last lines and the command to rerun it.
    """
    from pipelines.params import load  # here: it checks by dino's own rules, and a flow is loaded without dino

    began = time.monotonic()
    graph = stage_graph()
    plan = stages_for(graph, targets or [])
    results: dict[str, StageResult] = {}
    with StageRunner(force=force, env=flow_run_environment()) as runner, heeding_cancellation(runner):
        run_stages(plan, results, runner, load().runtime.stages)
    artifacts.show_run(plan, results, whole=plan == graph)
    words = "\n".join(summary.last_words(plan, results, time.monotonic() - began))
    if summary.cancelled(results):
        return Cancelled(message=words)
    return Completed(message=words) if summary.succeeded(plan, results) else Failed(message=words)


def run_stages(
    plan: Graph,
    results: dict[str, StageResult],
    runner: StageRunner,
    rules: Any,
    after: Sequence[PrefectFuture[State]] = (),
) -> list[PrefectFuture[State]]:
    """One task a stage, each when those that it needs are done; returns the last ones when none is left that can run.

    Args:
        plan: The stages, and what each needs.
        results: Where they go.
        runner: Runs them; it is ended by whoever made it.
        rules: How each is run (pipelines.params.Stages).
        after: Tasks before the first.
    """
    futures: dict[str, PrefectFuture[State]] = {}
    try:
        for stage, needs in plan.items():
            work = stage_task.stage_work(runner, stage, rules.of(stage))
            before = [futures[need] for need in needs] or list(after)
            futures[stage] = stage_task.submit(stage, work, results, after=before, rules=rules.of(stage))
        wait(list(futures.values()))
        needed = {need for needs in plan.values() for need in needs}
        return [future for stage, future in futures.items() if stage not in needed]
    except BaseException:  # Ctrl-C, or Prefect cancels the run
        if runner.running:
            get_run_logger().warning(
                "Ending %s: up to %.0f s to save; Ctrl-C once more ends it at once",
                ", ".join(runner.running),
                runner.grace_seconds,
            )
        raise


def flow_run_environment() -> dict[str, str]:
    """What tells a stage which flow run it belongs to; tracking tags its row with it."""
    context = FlowRunContext.get()
    return {"DINO_FLOW_RUN_ID": str(context.flow_run.id)} if context and context.flow_run else {}


def _not_said_by_us(record: logging.LogRecord) -> bool:
    """Whether a line of Prefect's is news: it tells a run's end as `Failed(message='...')`, we as a sentence."""
    text = record.getMessage()
    told_by_us = ("Finished in state", "Task run failed with state", "Crash detected! Execution was aborted by")
    if record.exc_info and isinstance(record.exc_info[1], CancelledRun | FailedRun):
        return False
    return not text.startswith(told_by_us) or " - Retry " in text


def tell_once() -> None:
    """Leave out what Prefect says a second time."""
    for name in ("prefect.flow_runs", "prefect.task_runs", "prefect.engine"):
        logging.getLogger(name).addFilter(_not_said_by_us)


def server_of_our_own(port: int = 0) -> None:
    """Start a server (at this port if it is free), and end it when this process ends, unless one is configured."""
    if PREFECT_API_URL.value():
        return
    # Ended after main, at exit: only then has Prefect sent its last log lines.
    server = contextlib.ExitStack()
    atexit.register(server.close)
    address = server.enter_context(local_server(paths.work_dir() / "prefect-server.log", port))
    server.enter_context(temporary_settings({PREFECT_API_URL: address}))


def run_command(work: Callable[[], int]) -> int:
    """Do the work of a command that runs flows; where it fails, say so in one message. Its exit code."""
    tell_once()
    try:
        return work()
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
    except RuntimeError as error:
        if "Failed to reach API" not in str(error):
            raise
        print(f"{error}: start it (`prefect server start`), or unset PREFECT_API_URL", file=sys.stderr)
    except KeyboardInterrupt:
        print("Interrupted; what was finished is kept, and the next run goes on from there.", file=sys.stderr)
        return INTERRUPTED
    return 1


def main(arguments: list[str] | None = None) -> int:
    """Run the flow in the repository of the current directory, with a server of its own if none is configured."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.flow", description=DESCRIPTION)
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages to run with what they need; default: all")
    parser.add_argument("-f", "--force", action="store_true", help="run also what is unchanged")
    options = parser.parse_args(arguments)

    def work() -> int:
        stages_for(stage_graph(), options.targets)  # before a server is started for nothing
        server_of_our_own()
        state = pipeline(**vars(options), return_state=True)
        print(state.message)
        return 0 if state.is_completed() else 1

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
