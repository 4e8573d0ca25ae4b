"""The collapse doctor while a training runs: a word for the progress line, and a line when the state turns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dino.config import PretrainConfig
from dino.health import HEALTHY, Diagnosis, State, Yardstick, diagnose

PAGE = "docs/health.md"


def yardstick_of(config: PretrainConfig, arch: Mapping[str, Any]) -> Yardstick:
    """What the numbers of this training are read against; `arch` is the backbone's, as checkpoints have it."""
    return Yardstick(config.out_dim, config.batch, arch["embed_dim"], config.epochs, config.warmup_epochs)


class Doctor:
    """Looks at each point of the curve; an alarm is said once, and once more when the training has recovered."""

    def __init__(
        self,
        yardstick: Yardstick,
        points: Sequence[dict[str, float]],
        say: Callable[[str], None],
        tag: Callable[[str], None],
    ) -> None:
        """`points` are those before, of a resumed training; `tag` is told each new state's name."""
        self.yardstick, self.points, self._say, self._tag = yardstick, list(points), say, tag
        self._named: State | None = None
        self._alarm: Diagnosis | None = None

    def look(self, point: dict[str, float]) -> Diagnosis:
        """The state with this point; says so where it turns bad, becomes another bad one, or recovers."""
        self.points.append(point)
        found = diagnose(self.points, self.yardstick)
        if found.state == self._named:
            return found
        self._named = found.state
        self._tag(found.state.name)
        if found.state.is_bad:
            self._alarm = found
            self._say(f"ALARM: {found.state.name} since epoch {found.since_epoch:.1f}. {told(found)}")
        elif self._alarm is not None and found.state == HEALTHY:
            before = f"{self._alarm.state.name} since epoch {self._alarm.since_epoch:.1f}"
            self._say(f"recovered: healthy since epoch {found.since_epoch:.1f} (before: {before}). {found.finding}")
            self._alarm = None
        return found


def told(found: Diagnosis) -> str:
    """Finding and remedy, and where to read more."""
    more = f" See {PAGE}." if found.state.is_bad else ""
    return " ".join(filter(None, (found.finding, found.state.advice))) + more


def facts(found: Diagnosis, yardstick: Yardstick) -> dict[str, Any]:
    """The diagnosis as metrics/pretrain.json has it."""
    shown = ("loss", "kl", "teacher_entropy", "batch_entropy", "information", "feature_std", "rank_me", "grad_norm")
    return {
        "state": found.state.name,
        "advice": found.state.advice,
        "finding": found.finding,
        "since_epoch": found.since_epoch,
        "healthy_above": yardstick.healthy_above,
        **{name: found.signs[name] for name in shown},
    }
