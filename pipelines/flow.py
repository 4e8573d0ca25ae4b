"""`python -m pipelines.flow [STAGE...] [--force]`: the pipeline as a Prefect flow, generated from DVC's graph.

One task a stage, named as the stage; stages that don't need each other run in parallel. DVC alone decides what is
stale, so Prefect's caching is off. Which stages there are stands in dvc.yaml and nowhere here.

Exit code: 0 when every stage is up to date, 1 when one failed, 130 after Ctrl-C.
"""

import argparse
import atexit
import contextlib
import logging
import sys
import time

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed, Failed

from pipelines import paths, summary
from pipelines.graph import stage_graph, stages_for
from pipelines.local_server import local_server
from pipelines.runner import Outcome, StageResult, StageRunner, rerun_command

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
    began = time.monotonic()
    graph = stage_graph()
    plan = stages_for(graph, targets or [])
    results: dict[str, StageResult] = {}
    with StageRunner(force=force, env=flow_run_environment()) as runner:

        def run_stage(stage: str) -> State:
            logger = get_run_logger()
            # A stage that begins its lines with its name, for `dvc repro`, has it from Prefect here.
            result = runner.run(stage, lambda line: logger.info(line.removeprefix(f"{stage}: ")))
            results[stage] = result
            if result.outcome is Outcome.CANCELLED:
                return Cancelled(message=f"{stage} was ended")
            if result.outcome is Outcome.FAILED:
                logger.error("failed (%.1f s); to run it again: %s", result.seconds, rerun_command(stage))
                return Failed(message=result.last_lines[-1] if result.last_lines else "without a word")
            logger.info("%s (%.1f s)", result.outcome, result.seconds)
            return Completed(name=result.outcome.capitalize(), message=f"in {result.seconds:.1f} s")

        futures: dict[str, PrefectFuture[State]] = {}
        try:
            for stage, needs in plan.items():
                one = task(name=stage, task_run_name=stage, cache_policy=NO_CACHE, persist_result=False)(run_stage)
                futures[stage] = one.submit(stage, return_state=False, wait_for=[futures[need] for need in needs])
            wait(list(futures.values()))
        except BaseException:  # Ctrl-C, or Prefect cancels the run
            if runner.running:
                get_run_logger().warning(
                    "Ending %s: up to %.0f s to save; Ctrl-C once more ends it at once",
                    ", ".join(runner.running),
                    runner.grace_seconds,
                )
            raise
    page = summary.markdown(plan, results, whole=plan == graph)
    create_markdown_artifact(page, key="dino", description="Scores, and what became of each stage")
    words = "\n".join(summary.last_words(plan, results, time.monotonic() - began))
    return Completed(message=words) if summary.succeeded(plan, results) else Failed(message=words)


def flow_run_environment() -> dict[str, str]:
    """What tells a stage which flow run it belongs to; tracking tags its row with it."""
    context = FlowRunContext.get()
    return {"DINO_FLOW_RUN_ID": str(context.flow_run.id)} if context and context.flow_run else {}


def _not_said_by_us(record: logging.LogRecord) -> bool:
    """Whether a line of Prefect's is news: it tells a run's end as `Failed(message='...')`, we as a sentence."""
    text = record.getMessage()
    told_by_us = ("Finished in state", "Task run failed with state", "Crash detected! Execution was aborted by")
    return not text.startswith(told_by_us) or " - Retry " in text


def main(arguments: list[str] | None = None) -> int:
    """Run the flow in the repository of the current directory, with a server of its own if none is configured."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.flow", description=DESCRIPTION)
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="stages to run with what they need; default: all")
    parser.add_argument("-f", "--force", action="store_true", help="run also what is unchanged")
    options = parser.parse_args(arguments)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_not_said_by_us)
    try:
        stages_for(stage_graph(), options.targets)  # before a server is started for nothing
        if not PREFECT_API_URL.value():
            # Ended after main, at exit: only then has Prefect sent its last log lines.
            server = contextlib.ExitStack()
            atexit.register(server.close)
            address = server.enter_context(local_server(paths.work_dir() / "prefect-server.log"))
            server.enter_context(temporary_settings({PREFECT_API_URL: address}))
        state = pipeline(**vars(options), return_state=True)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "Failed to reach API" not in str(error):
            raise
        print(f"{error}: start it (`prefect server start`), or unset PREFECT_API_URL", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what was finished is kept, and the next run goes on from there.", file=sys.stderr)
        return 130
    print(state.message)
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main())
