"""In which order the experiments of a sweep start, so that no stage is computed twice."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.processes.graph import stage_graph, stage_params
from pipelines.recipe import over
from pipelines.sweeps.variants import Variant, look_up, nested


class Schedule:
    """Which variant is next. One that shares stages with a running one waits until that has done them.

    So nothing is computed twice: what it shares comes from the run-cache.
    """

    def __init__(self, variants: Sequence[Variant], current: Mapping[str, Any]) -> None:
        """Variants in the order wished; `current` is params.yaml."""
        self.graph, self.reads = stage_graph(), stage_params()
        self.settings = {one.name: over(dict(current), nested(one.settings)) for one in variants}
        self.waiting = [*variants]
        self.done_by: dict[str, set[str]] = {}  # running variant -> its stages that are done
        self.ending = False
        self.change = threading.Condition()

    def shared(self, one: str, other: str) -> set[str]:
        """Stages that are the same in both: all settings that they and what they need read are equal."""
        found: set[str] = set()
        for stage, needs in self.graph.items():  # in an order that can run
            pairs = ((look_up(self.settings[v], name) for v in (one, other)) for name in self.reads[stage])
            if found.issuperset(needs) and all(a == b for a, b in pairs):
                found.add(stage)
        return found

    def take(self) -> Variant | None:
        """The next one that may start, once there is one; None when there is none any more."""
        with self.change:
            while self.waiting and not self.ending:
                for variant in self.waiting:
                    if all(self.shared(variant.name, other) <= done for other, done in self.done_by.items()):
                        self.waiting.remove(variant)
                        self.done_by[variant.name] = set()
                        return variant
                self.change.wait(1.0)
            return None

    def begins(self, variant: Variant, stage: str) -> None:
        """DVC is at this stage now, so it has done those that it came to before."""
        with self.change:
            order = [*self.graph]
            if stage in order:
                self.done_by[variant.name] |= set(order[: order.index(stage)])
                self.change.notify_all()

    def ended(self, variant: Variant) -> None:
        """It runs no more."""
        with self.change:
            del self.done_by[variant.name]
            self.change.notify_all()
