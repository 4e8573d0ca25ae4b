"""One thin module a DVC stage: settings, one function of `dino` or of `pipelines.data`, files, metrics."""

import os
import sys

from pipelines.processes import ending

# Of the OpenMP that torch brings on Linux, read when torch is imported. Its threads wait for each other by spinning,
# some ms at its own 300,000 rounds: where another process wants the cores, as a sibling stage does, a step then takes
# 5 to over 17 times as long. At 1,000 rounds it takes 2 to 5 times; on quiet cores that costs 5 % (LOG.md, 2026-11-24).
SPIN_ROUNDS = "1000"

if sys.argv[:1] == ["-m"]:  # this is `python -m pipelines.stages.X`, and X comes next
    ending.heed(ending.leave)
    ending.watch_parent()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)
