"""The collapse doctor: the curve's last points -> a named state, its finding in numbers and its remedy.

A loss says little: it rises in healthy trainings and stays at ln K in dead ones. What tells is how far the teacher's
answers differ from image to image (its information) and how many directions the features use (paper section 5.3).
The last points are looked at together, so that one odd batch neither raises an alarm nor turns the verdict of a run.
LOG.md (2026-11-24) has the trainings that the limits were found on; docs/health.md is for the one who meets an alarm.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from dino.curve import CURE_OF_DIVERGENCE

Point = dict[str, float]

WINDOW = 5  # points: with the median of five, two odd ones change nothing
WARMUP_SHARE = 0.1  # of the run, or its warm-up if that is longer: odd numbers are expected
MIN_INFORMATION = 0.02  # nats; collapsed trainings lie below 0.01, the default recipe at 0.9 and above
UNIFORM_SHARE = 0.5  # of ln K: what a constant answer is nearer to, all prototypes alike or a few
MIN_STD_SHARE = 0.1  # of 1 / sqrt(D), the std of features spread evenly over the sphere
MIN_RANK_SHARE = 0.125  # of the directions that a batch of this size can use; healthy ones use 0.4 and more
MIN_RANK = 1.5
MIN_ROWS_OF_STD, MIN_ROWS_OF_RANK = 2, 8  # images of a batch; fewer say nothing about spread, about directions
MAX_LOSS_SHARE = 1.25  # of ln K, what a student that knows nothing and says so would have
FEATURE_SIGNS = {"feature_std": "std", "rank_me": "directions in use"}


@dataclass(frozen=True)
class State:
    """A named state, and in plain words what to do."""

    name: str
    advice: str

    @property
    def is_bad(self) -> bool:
        """Whether something must be changed."""
        return self not in (HEALTHY, WARMING_UP)


HEALTHY = State("healthy", "Nothing to do.")
WARMING_UP = State("warming up", "Too early to tell; look again after the warm-up.")
UNIFORM = State(
    "uniform collapse",
    "The loss stays at ln K and nothing is learned. Lower pretrain.teacher_temp_start and pretrain.teacher_temp "
    "(0.02 to 0.04), lower pretrain.out_dim, lower pretrain.lr_at_256, lengthen pretrain.warmup_epochs.",
)
ONE_HOT = State(
    "one-hot collapse",
    "The centring does not keep up. Raise pretrain.teacher_temp, lower pretrain.center_momentum (0.9), lower "
    "pretrain.lr_at_256, keep pretrain.freeze_last_layer_epochs at 1 or more.",
)
DIMENSIONAL = State(
    "dimensional collapse",
    "Lower pretrain.lr_at_256, lengthen pretrain.warmup_epochs, lower pretrain.weight_decay and "
    "pretrain.weight_decay_final, use more or harder local crops.",
)
DIVERGING = State("diverging", CURE_OF_DIVERGENCE)


@dataclass(frozen=True)
class Yardstick:
    """What the numbers of a training are read against.

    Attributes:
        prototypes: K.
        batch: Images of the whole batch, which feature_std and rank_me are measured on.
        width: D of the features.
        epochs: Of the run.
        warmup_epochs: Of its learning rate.
    """

    prototypes: int
    batch: int
    width: int
    epochs: float
    warmup_epochs: float

    @property
    def ln_k(self) -> float:
        """Entropy of an answer that names all prototypes alike, nats."""
        return math.log(self.prototypes)

    @property
    def first_epoch(self) -> float:
        """From here on a state is named."""
        return max(self.warmup_epochs, WARMUP_SHARE * self.epochs)

    @property
    def healthy_above(self) -> Point:
        """Limits of those signs that a batch of this size can show."""
        limits = {"information": MIN_INFORMATION}
        if self.batch >= MIN_ROWS_OF_STD:
            limits["feature_std"] = MIN_STD_SHARE / math.sqrt(self.width)
        if self.batch >= MIN_ROWS_OF_RANK:
            limits["rank_me"] = max(MIN_RANK, MIN_RANK_SHARE * min(self.batch, self.width))
        return limits


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor says at a point of the curve.

    Attributes:
        state: Its name and remedy.
        since_epoch: Of the first point of this state, without another in between.
        signs: The numbers that it was named by: middle values of the last points.
        finding: These numbers in words.
    """

    state: State
    since_epoch: float
    signs: Point
    finding: str


def signs_of(window: Sequence[Point]) -> Point:
    """What the last points say together: medians, and the mean of the loss, whose rare bursts count."""
    found = {name: median(point[name] for point in window) for name in window[-1]}
    return found | {"loss": fmean(point["loss"] for point in window)}


def state_at(window: Sequence[Point], yardstick: Yardstick) -> State:
    """The state that the last points of a curve show."""
    if not math.isfinite(window[-1]["loss"]):
        return DIVERGING
    if window[-1]["epoch"] < yardstick.first_epoch:
        return WARMING_UP
    signs = signs_of(window)
    if signs["loss"] > MAX_LOSS_SHARE * yardstick.ln_k:
        return DIVERGING
    low = {name for name, limit in yardstick.healthy_above.items() if signs[name] < limit}
    if low & FEATURE_SIGNS.keys():
        return DIMENSIONAL
    if "information" in low:
        return UNIFORM if signs["batch_entropy"] > UNIFORM_SHARE * yardstick.ln_k else ONE_HOT
    return HEALTHY


def states(points: Sequence[Point], yardstick: Yardstick) -> Iterator[State]:
    """The state at each point, the last one first; each looks back only."""
    for end in range(len(points), 0, -1):
        yield state_at(points[max(0, end - WINDOW) : end], yardstick)


def diagnose(points: Sequence[Point], yardstick: Yardstick) -> Diagnosis:
    """Name the state of a training from its curve so far.

    Args:
        points: Rows with epoch, loss, batch_entropy, information, feature_std, rank_me; the last one is now.
        yardstick: What they are read against.
    """
    backwards = states(points, yardstick)
    state, since = next(backwards), points[-1]["epoch"]
    for point, before in zip(points[-2::-1], backwards, strict=True):
        if before != state:
            break
        since = point["epoch"]
    signs = signs_of(points[-WINDOW:])
    return Diagnosis(state, since, signs, finding(state, signs, yardstick))


def finding(state: State, signs: Point, yardstick: Yardstick) -> str:
    """What a state was named by, in plain words with numbers."""
    limits = yardstick.healthy_above
    if state == DIVERGING:
        return f"The loss is {signs['loss']:.2f}; knowing nothing would cost ln K = {yardstick.ln_k:.2f}."
    if state == DIMENSIONAL:
        told = [(words, signs[name], limits[name]) for name, words in FEATURE_SIGNS.items() if name in limits]
        numbers = [f"{words} {value:.2g}, healthy: above {limit:.2g}" for words, value, limit in told]
        return f"The features of different images are almost alike ({'; '.join(numbers)})."
    answer = f"entropy {signs['batch_entropy'] / yardstick.ln_k:.3f} of ln K = {yardstick.ln_k:.2f}"
    apart = f"{max(signs['information'], 0.0):.3f} nats of information, healthy: above {MIN_INFORMATION}"
    if state == UNIFORM:
        return f"The teacher gives every image the same answer, all prototypes alike ({answer}; {apart})."
    if state == ONE_HOT:
        return f"The teacher puts every image on the same few prototypes ({answer}; {apart})."
    return f"The teacher tells images apart ({answer}; {apart})." if state == HEALTHY else ""
