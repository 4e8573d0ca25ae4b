"""A flow run that was cancelled in Prefect's pages, or by its CLI, ends its stages; a trainer saves first.

Prefect tells a run's process by a signal, but who sends it (`serve`, a worker) stops listening when the server was away
for some seconds, and nobody sends it to a flow that was started by hand. So the flow asks too.
"""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from pipelines.processes.runner import StageRunner

ASK_SECONDS = 5.0


@contextmanager
def heeding_cancellation(runner: StageRunner) -> Iterator[None]:
    """In the block, what `runner` runs is ended when the flow run around it is cancelled."""
    context = FlowRunContext.get()
    assert context and context.flow_run
    run, done, log = context.flow_run.id, threading.Event(), get_run_logger()

    def watch() -> None:
        while not done.wait(ASK_SECONDS):
            try:
                with get_client(sync_client=True) as client:
                    state = client.read_flow_run(run).state
            except Exception:  # the server is away: it will be asked again
                continue
            if state and (state.is_cancelling() or state.is_cancelled()):
                log.warning("Cancelled: ending %s, which may save first", ", ".join(runner.running) or "here")
                runner.end()
                return

    here = contextvars.copy_context()  # it knows the flow's server; without it Prefect starts one for the thread
    threading.Thread(target=here.run, args=(watch,), name="cancellation", daemon=True).start()
    try:
        yield
    finally:
        done.set()
