"""One Prefect task for a stage, or a step of a tick: its state, its live output, how far it is, its turn on the GPU."""

import socket
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed, Failed

from pipelines.flows import summary
from pipelines.processes import progress
from pipelines.processes.runner import Outcome, StageResult, StageRunner

Say = Callable[[str], None]
Work = Callable[[Say], StageResult]
ASK_SECONDS = 3.0  # a waiting stage asks for its slot, and whether it should end, this often
LEASE_SECONDS = 60.0  # a slot whose holder was killed is free after that


def submit(
    name: str, work: Work, results: dict[str, StageResult], *, after: Iterable[PrefectFuture[State]] = (), rules: Any
) -> PrefectFuture[State]:
    """Start a task that does `work` when those before it are done; its result goes to `results[name]`.

    Args:
        name: The task's.
        work: Given a function for the lines that a person should see.
        results: Where its result goes.
        after: Tasks that must have completed.
        rules: How often and when it is tried again (pipelines.params.StageRules).
    """

    @task(
        name=name,
        task_run_name=name,
        cache_policy=NO_CACHE,  # DVC alone decides what is stale
        persist_result=False,
        retries=rules.retries,
        retry_delay_seconds=rules.delay_seconds,
        retry_condition_fn=lambda task, run, state: results[name].outcome is Outcome.FAILED,
    )
    def run() -> State:
        logger = get_run_logger()
        bar = ProgressBar(name)

        def say(line: str) -> None:
            # A stage that begins its lines with its name, for `dvc repro`, has it from Prefect here.
            logger.info(line.removeprefix(f"{name}: "))
            bar.look(line)

        result = results[name] = work(say)
        if result.outcome is Outcome.CANCELLED:
            return Cancelled(message=f"{name} was ended")
        if result.outcome in (Outcome.FAILED, Outcome.OVERTIME):
            logger.error("%s (%.1f s); to run it again: %s", result.outcome, result.seconds, result.rerun)
            said = result.last_lines[-1] if result.last_lines else "without a word"
            return Failed(message=said if result.outcome is Outcome.FAILED else summary.in_words(result))
        bar.end()
        logger.info("%s (%.1f s)", result.outcome, result.seconds)
        return Completed(name=result.outcome.capitalize(), message=f"in {result.seconds:.1f} s")

    return run.submit(return_state=False, wait_for=list(after))


def stage_work(runner: StageRunner, stage: str, rules: Any) -> Work:
    """Running one stage by its rules (pipelines.params.StageRules), with the GPU's slot if it needs one."""

    def work(say: Say) -> StageResult:
        with ExitStack() as slot:
            if rules.gpu and runner.would_run(stage) and not hold_gpu_slot(slot, say, lambda: runner.ending):
                return StageResult(stage, Outcome.CANCELLED, 1, 0.0, ())
            return runner.run(stage, say, rules.limit_minutes)

    return work


def gpu_slot() -> str:
    """Name of the global concurrency limit of this machine's GPU."""
    return f"gpu-{socket.gethostname()}"


def hold_gpu_slot(slot: ExitStack, say: Say, ended: Callable[[], bool]) -> bool:
    """Wait until this machine's GPU slot is free, and hold it until `slot` is closed; False if we should end first.

    The limit is made, with one slot, where there is none; `prefect gcl update` changes it.
    """
    name, told = gpu_slot(), False
    while not ended():
        if not _is_free(name):
            if not told:
                say(f"waiting for slot {name}: another flow holds it (`prefect gcl inspect {name}`)")
                told = True
            time.sleep(ASK_SECONDS)
            continue
        with suppress(TimeoutError):  # another flow was faster
            # A lost lease (a server that was started anew) must not end a training of days.
            slot.enter_context(
                concurrency(
                    name,
                    timeout_seconds=ASK_SECONDS,
                    lease_duration=LEASE_SECONDS,
                    strict=True,
                    raise_on_lease_renewal_failure=False,
                )
            )
            return True
    return False


def _is_free(name: str) -> bool:
    """Whether a limit has a free slot; it is made if there is none."""
    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another flow was faster
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
            return True
        return limit.active_slots < limit.limit


class ProgressBar:
    """How far a task is, as an artifact that its lines of progress move; made at the first of them."""

    def __init__(self, name: str):
        self.name = name
        self.made: Any = None
        self.given_up = False

    def look(self, line: str) -> None:
        """Move the bar if the line says how far the task is."""
        if found := progress.heard(line):
            self._move(*found)

    def end(self) -> None:
        """It is done."""
        if self.made:
            self._move(100.0, "done")

    def _move(self, percent: float, words: str) -> None:
        if self.given_up:
            return
        try:
            if self.made:
                update_progress_artifact(self.made, percent, words)
            else:
                self.made = create_progress_artifact(percent, f"{self.name}-progress", words)
        except Exception as error:  # a view must never end the stage that it shows
            self.given_up = True
            get_run_logger().warning("progress is not shown: %s", error)
