"""`python -m pipelines.tick`: what happens at each tick of a schedule, once: data in, stages, promotion, push, report.

    data ──► the stages of dvc.yaml ──► promote ──► push ──► page, pictures, webhook

Nothing changed: some seconds, and it says so. One tick at a time in a working directory, by a lock on a file, which no
server and no crash can leave behind. A tick that comes while another runs is cancelled, and so is one that was missed
when a later one has run: however many were missed, one runs.

Exit code: 0 when all is up to date, 1 when a step failed, 130 after Ctrl-C.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.futures import PrefectFuture, wait
from prefect.states import Cancelled, Completed, Crashed, Failed

from pipelines import paths
from pipelines.flow import flow_run_environment, run_command, run_stages, server_of_our_own, tell_once
from pipelines.flows import artifacts, exchange, notify, stage_task, summary
from pipelines.flows.cancelling import heeding_cancellation
from pipelines.processes.graph import Graph, outside, stage_graph
from pipelines.processes.lock import hold, holder
from pipelines.processes.runner import Outcome, StageResult, StageRunner

LOCK = paths.RUNNING / "tick"  # written when a tick begins
DESCRIPTION = "Bring data in, run what is stale, promote what is better, push, report"
PROMOTE = "promote"
UNCHANGED = "Unchanged"  # a tick's state
AT_ONCE = 200  # flow runs that the server hands out in one answer, at most


@flow(name="dino-tick", description=DESCRIPTION, persist_result=False)
def tick() -> State:
    """One tick in the current directory's repository.

    Returns:
        A completed state, named Unchanged if there was nothing to do; a cancelled one if another tick runs or a later
        one has run; or a failed one whose message names the step, its last lines, its log and the command to rerun it.
    """
    from pipelines.params import load  # here: it checks by dino's own rules, and a flow is loaded without dino

    tell_once()
    run = _this_run()
    if other := holder(LOCK):
        return _left_out(f"A tick runs here already ({other}): this one is left out")
    before = last_began()
    if before and run.expected_start_time and run.expected_start_time < before:
        return _left_out(f"Missed; the tick that began at {before:%Y-%m-%d %H:%M:%S} UTC has covered it")
    with hold(LOCK, "runs a tick here"):
        tidy_up(run, before)
        webhook = None
        try:
            settings = load()
            webhook = settings.runtime.webhook
            state = _work(settings)
        except (ValueError, OSError) as error:  # what is wrong with params.yaml or dvc.yaml
            state = Failed(message=str(error))
        if webhook and not state.is_cancelled() and state.name != UNCHANGED:
            get_run_logger().info(notify.tell(webhook, f"{paths.real_root().name}: {state.message}"))
    return state


def _left_out(words: str) -> State:
    get_run_logger().info(words)
    return Cancelled(message=words)


def _work(settings: Any) -> State:
    """All steps of a tick."""
    began, rules = time.monotonic(), settings.runtime.stages
    graph, sources = stage_graph(), outside()
    steps: Graph = {exchange.IN: (), **graph, PROMOTE: (), exchange.OUT: ()}
    results: dict[str, StageResult] = {}
    notes: list[str] = []
    with StageRunner(env=flow_run_environment()) as runner, heeding_cancellation(runner):

        def step(name: str, work: stage_task.Work, after: list[PrefectFuture[State]]) -> list[PrefectFuture[State]]:
            """Run a step that is no stage, to its end."""
            future = stage_task.submit(name, work, results, after=after, rules=rules.of(name))
            wait([future])
            return [future]

        last = step(exchange.IN, partial(exchange.bring_in, runner, sources, settings.data.folder), [])
        if summary.succeeded([exchange.IN], results):
            last = run_stages(graph, results, runner, rules, last)
        if summary.succeeded(graph, results):
            step(PROMOTE, partial(promote, settings, notes), last)
            step(exchange.OUT, partial(exchange.push, runner, sources), last)
    seconds = time.monotonic() - began
    artifacts.show_run(steps, results, whole=True, more=notes)
    words = "\n".join([*summary.last_words(graph, results, seconds), *notes])
    if summary.cancelled(results):
        return Cancelled(message=words)
    if not summary.succeeded(steps, results):
        return Failed(message=words)
    return Completed(name=UNCHANGED, message=words) if summary.unchanged(results) else Completed(message=words)


def promote(settings: Any, notes: list[str], say: stage_task.Say) -> StageResult:
    """Have new results considered for promotion, and show them beside the champion."""
    from pipelines.flows import champion  # here: mlflow takes seconds, and nothing changed takes few
    from pipelines.rows.tracking import first_line

    began = time.monotonic()
    result = partial(StageResult, PROMOTE, rerun="python -m pipelines.promote")
    if not champion.is_news():
        say("promotion was asked about these results before")
        return result(Outcome.UNCHANGED, 0, time.monotonic() - began, ())
    try:
        decision = champion.decide(settings)
        address = champion.row_address(settings)
    except Exception as error:  # mlflow's, the network's, ours: results stand, whoever fails to show them
        line = first_line(error)
        say(line)
        return result(Outcome.FAILED, 1, time.monotonic() - began, (line,))
    say(decision.words)
    notes.append(decision.words)
    if rows := champion.comparison(decision):
        artifacts.show_comparison(rows, decision.words)
    if address:
        artifacts.show_row(address)
        notes.append(f"MLflow: {address}")
    outcome = Outcome.RAN if decision.version else Outcome.UNCHANGED
    return result(outcome, 0, time.monotonic() - began, (decision.words,))


def last_began() -> datetime | None:
    """When the last tick of this working directory began."""
    return datetime.fromtimestamp(LOCK.stat().st_mtime, UTC) if LOCK.exists() else None


def _this_run() -> FlowRun:
    context = FlowRunContext.get()
    assert context and context.flow_run
    return context.flow_run


def tidy_up(run: FlowRun, before: datetime | None) -> None:
    """Cancel this deployment's ticks that are overdue, as `run` covers them; tell the server of those that were killed.

    Args:
        run: The tick that runs now, alone.
        before: When the last one began: what began earlier and still runs, for the server, was killed.
    """
    if run.deployment_id is None:
        return
    with get_client(sync_client=True) as client:
        for missed in _runs(client, run, ["SCHEDULED"], {"expected_start_time": {"before_": datetime.now(UTC)}}):
            if missed.auto_scheduled:
                words = f"Missed, or due while another ran; {run.name} covers it"
                client.set_flow_run_state(missed.id, Cancelled(message=words), force=True)
        if before is None:
            return
        for dead in _runs(client, run, ["RUNNING", "CANCELLING"], {"start_time": {"before_": before}}):
            client.set_flow_run_state(dead.id, Crashed(message="Its process is gone"), force=True)


def _runs(client: SyncPrefectClient, run: FlowRun, states: list[str], more: dict[str, Any]) -> Iterator[FlowRun]:
    """Other runs of the same deployment in these states."""
    wanted = {"deployment_id": {"any_": [run.deployment_id]}, "state": {"type": {"any_": states}}, **more}
    asked = FlowRunFilter.model_validate(wanted)
    found = client.read_flow_runs(flow_run_filter=asked, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=AT_ONCE)
    return (other for other in found if other.id != run.id)


def main(arguments: list[str] | None = None) -> int:
    """Run one tick, with a server of its own if none is configured."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.tick", description=DESCRIPTION)
    parser.parse_args(arguments)

    def work() -> int:
        stage_graph()  # before a server is started for nothing
        server_of_our_own()
        state = tick(return_state=True)
        print(state.message)
        return 0 if state.is_completed() else 1

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
