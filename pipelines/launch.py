"""A stage in several processes: one for each GPU, started by torchrun's own agent, which ends all when one dies.

How many there are is environment and nothing of params.yaml: the number of GPUs, or DINO_PROCESSES (on CPUs too).
Under a torchrun of your own (several machines: docs/many_gpus.md) nothing is started here.
"""

import logging
import os
import signal
import sys
import uuid
from typing import NoReturn

from pipelines.processes.ending import EXIT_REQUEUE

PROCESSES = "DINO_PROCESSES"
LOOPBACK = "127.0.0.1"
SAVE_SECONDS = 600  # that processes have after TERM, as large states take; torchrun's own: 30


def processes() -> int:
    """How many processes this one should start and wait for; 1: none, it does the work itself.

    Raises:
        ValueError: DINO_PROCESSES is not a number above 0.
    """
    if "RANK" in os.environ:
        return 1  # we are one of several
    wanted = os.environ.get(PROCESSES, "")
    if wanted and not (wanted.isdecimal() and int(wanted) > 0):
        raise ValueError(f"{PROCESSES} is {wanted!r}; choose a number of processes, 1 or more, or unset it")
    if wanted:
        return int(wanted)
    if os.environ.get("DINO_DEVICE", "cuda") not in ("", "cuda"):
        return 1
    import torch  # here: who starts nothing need not wait for it

    return max(1, torch.cuda.device_count())


def across(count: int, module: str) -> None:
    """Run `python -m module` in `count` processes of this machine, and return when all have succeeded.

    Leaves with 75 where they were asked to stop, and with a process's own exit code where it failed and said why.

    Raises:
        ValueError: A process was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # what failed is told below, in words
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{LOOPBACK}:0",
        local_addr=LOOPBACK,
        max_restarts=0,  # a stage resumes by being run again: whoever runs it decides
        monitor_interval=0.1,
    )
    if hasattr(config, "shutdown_timeout"):  # not in every torch that we take
        config.shutdown_timeout = SAVE_SECONDS
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module)
    except SignalException:  # it has passed the signal on and waited
        sys.exit(EXIT_REQUEUE)
    except ChildFailedError as error:
        _leave_as({rank: failure.exitcode for rank, failure in error.failures.items()}, count)


def _leave_as(codes: dict[int, int], count: int) -> NoReturn:
    """End as the processes did that failed first."""
    for rank, code in codes.items():
        if code < 0:
            raise ValueError(
                f"process {rank + 1} of {count} was killed by {signal.Signals(-code).name} (out of memory?), and the "
                "others were ended; what was saved stays, run the same command again to go on"
            )
    sys.exit(EXIT_REQUEUE if set(codes.values()) == {EXIT_REQUEUE} else max(codes.values()))
