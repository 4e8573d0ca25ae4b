"""One thin module a DVC stage: settings, one function of `dino` or of `pipelines.data`, files, metrics."""

import sys

from pipelines import ending

if sys.argv[:1] == ["-m"]:  # this is `python -m pipelines.stages.X`, and X comes next
    ending.heed(ending.leave)
    ending.watch_parent()
