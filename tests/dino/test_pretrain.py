"""Laws of the loop: what it was interrupted by, split into or shared among leaves no trace in what it computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import BATCH, IMAGES, SETTINGS, STEPS, STEPS_PER_EPOCH, digits, write_table
from two_ranks import CONFIG, STOP_AFTER, compute, steps_of

from dino import draws
from dino.config import PretrainConfig
from dino.curve import CURVE_COLUMNS
from dino.distributed import World
from dino.images import ImageTable
from dino.networks import build_dino
from dino.optimizer import build_optimizer
from dino.pretrain import (
    Interrupted,
    make_micro_batches,
    pretrain,
    repeatable,
    step_settings,
    train_step,
)
from dino.training_state import TrainingState, load_state, save_state

ALONE = World(0, 1, torch.device("cpu"))
FP32 = torch.float32


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> ImageTable:
    return write_table(tmp_path_factory.mktemp("tiny") / "train.arrow")


@pytest.fixture(scope="module")
def uninterrupted(table: ImageTable) -> TrainingState:
    return pretrain(CONFIG, table, world=ALONE, precision=FP32)


def stopped_after(step: int, table: ImageTable, config: PretrainConfig = CONFIG, **more: Any) -> TrainingState:
    """The state saved by a run that is asked to stop when so many steps are done."""
    saved: list[TrainingState] = []
    asked = iter(range(more["state"].step + 1 if "state" in more else 1, STEPS + 1))
    with pytest.raises(Interrupted, match=f"after step {step} of {config.epochs * STEPS_PER_EPOCH}"):
        pretrain(
            config,
            table,
            world=ALONE,
            precision=FP32,
            save=saved.append,
            should_stop=lambda: next(asked) == step,
            **more,
        )
    (state,) = saved
    assert state.step == step
    return state


def assert_same_bits(found: TrainingState, expected: TrainingState) -> None:
    assert found.step == expected.step
    assert found.curve == expected.curve
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name


# Resuming


def test_the_tiny_training_has_everything_on(uninterrupted: TrainingState) -> None:
    for name in ("drop_path_rate", "flip", "jitter_p", "brightness", "contrast", "saturation", "hue", "grayscale_p"):
        assert getattr(CONFIG, name) > 0
    assert all(CONFIG.blur_p) and CONFIG.solarize_p[1] > 0 and CONFIG.local_crops > 0
    assert [point["step"] for point in uninterrupted.curve] == [STEPS_PER_EPOCH, STEPS]


@pytest.mark.parametrize("step", [1, STEPS_PER_EPOCH, STEPS_PER_EPOCH + 3, STEPS])
def test_a_resumed_run_is_the_uninterrupted_run(
    step: int, table: ImageTable, uninterrupted: TrainingState, tmp_path: Path
) -> None:
    state = stopped_after(step, table)
    save_state(tmp_path / "state.safetensors", state, {"why": "a test"})
    loaded, facts = load_state(tmp_path / "state.safetensors")
    assert facts == {"why": "a test"}
    assert_same_bits(loaded, state)
    assert_same_bits(pretrain(CONFIG, table, world=ALONE, precision=FP32, state=loaded), uninterrupted)


def test_interrupted_twice(table: ImageTable, uninterrupted: TrainingState) -> None:
    state = stopped_after(9, table, state=stopped_after(2, table))
    assert_same_bits(pretrain(CONFIG, table, world=ALONE, precision=FP32, state=state), uninterrupted)


def test_saving_changes_nothing(table: ImageTable, uninterrupted: TrainingState) -> None:
    saved: list[TrainingState] = []
    final = pretrain(CONFIG, table, world=ALONE, precision=FP32, save=saved.append, should_save=lambda: True)
    assert_same_bits(final, uninterrupted)
    assert [state.step for state in saved] == list(range(1, STEPS + 1))
    assert_same_bits(saved[-1], uninterrupted)


def test_a_finished_state_is_the_result(table: ImageTable, uninterrupted: TrainingState) -> None:
    reported: list[int] = []
    final = pretrain(
        CONFIG, table, world=ALONE, precision=FP32, state=uninterrupted, report=lambda step, _: reported.append(step)
    )
    assert_same_bits(final, uninterrupted)
    assert reported == []


ONE_EPOCH = replace(CONFIG, epochs=1, teacher_temp_warmup_epochs=1)


@pytest.fixture(scope="module")
def one_epoch(table: ImageTable) -> TrainingState:
    return pretrain(ONE_EPOCH, table, world=ALONE, precision=FP32)


@pytest.mark.parametrize(
    "change",
    [
        *({"seed": 1}, {"drop_path_rate": 0.0}, {"blur_p": (0.0, 0.0, 0.0)}, {"head_batch_norm": True}),
        *({"optimizer": "sgd", "lr_at_256": 1.0}, {"optimizer": "lars", "lr_at_256": 10.0}),
        {"arch": "shufflenet_v2_x0_5", "drop_path_rate": 0.0, "optimizer": "sgd"},
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_resuming_holds_for_other_settings_whose_results_differ(
    change: dict[str, Any], table: ImageTable, one_epoch: TrainingState
) -> None:
    config = replace(ONE_EPOCH, **change)
    whole = pretrain(config, table, world=ALONE, precision=FP32)
    assert_same_bits(pretrain(config, table, world=ALONE, precision=FP32, state=stopped_after(5, table, config)), whole)
    assert whole.curve != one_epoch.curve


def test_resuming_holds_where_images_differ_in_size(tmp_path: Path) -> None:
    files = [file for px in range(10) for file in digits(IMAGES // 10, 12 + px, 20 - px)]
    table = write_table(tmp_path / "train.arrow", files)
    whole = pretrain(ONE_EPOCH, table, world=ALONE, precision=FP32)
    state = stopped_after(4, table, ONE_EPOCH)
    assert_same_bits(pretrain(ONE_EPOCH, table, world=ALONE, precision=FP32, state=state), whole)


def test_no_global_randomness_is_used_or_touched(table: ImageTable, uninterrupted: TrainingState) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert_same_bits(pretrain(CONFIG, table, world=ALONE, precision=FP32), uninterrupted)
    assert torch.equal(torch.get_rng_state(), before)


# What is reported


def test_every_step_is_reported_and_points_at_some(table: ImageTable, uninterrupted: TrainingState) -> None:
    reported: list[tuple[int, dict[str, float]]] = []
    pretrain(CONFIG, table, world=ALONE, precision=FP32, report=lambda step, point: reported.append((step, point)))
    assert [step for step, _ in reported] == list(range(1, STEPS + 1))
    assert [point for _, point in reported if point] == uninterrupted.curve
    for point in uninterrupted.curve:
        assert set(point) == set(CURVE_COLUMNS)
        assert point["epoch"] == point["step"] / STEPS_PER_EPOCH


def test_the_curve_shows_the_mean_loss_since_the_point_before(table: ImageTable, uninterrupted: TrainingState) -> None:
    sums: list[float] = []
    pretrain(
        CONFIG,
        table,
        world=ALONE,
        precision=FP32,
        save=lambda state: sums.append(float(state.tensors["loss_sum"])),
        should_save=lambda: True,
    )
    before = 0
    for point in uninterrupted.curve:
        step = int(point["step"])
        assert sums[step - 1] == 0.0
        losses = torch.tensor(sums[before : step - 1]).diff(prepend=torch.zeros(1))
        assert len(losses) == STEPS_PER_EPOCH - 1 and (losses > 0).all()
        missing = point["loss"] * STEPS_PER_EPOCH - sums[step - 2]  # the loss of the point's own step
        assert missing == pytest.approx(point["kl"] + point["teacher_entropy"], rel=1e-4)
        before = step


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=pytest.mark.acceptance), 4])
def test_what_is_reported_does_not_depend_on_micro_batches(
    micro_batches: int, table: ImageTable, uninterrupted: TrainingState
) -> None:
    final = pretrain(replace(CONFIG, micro_batches=micro_batches), table, world=ALONE, precision=FP32)
    for found, expected in zip(final.curve, uninterrupted.curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_batch_of_one_image_is_no_divergence(tmp_path: Path) -> None:
    table = write_table(tmp_path / "train.arrow", digits(6))
    assert pretrain(replace(ONE_EPOCH, batch=1), table, world=ALONE, precision=FP32).step == 6


# Not finite


def poisoned(state: TrainingState) -> TrainingState:
    return replace(state, tensors=state.tensors | {"center": torch.full_like(state.tensors["center"], torch.nan)})


def test_a_loss_that_is_not_finite_names_its_own_step(table: ImageTable) -> None:
    saved: list[TrainingState] = []
    state = poisoned(stopped_after(3, table))
    with pytest.raises(FloatingPointError, match=r"^step 4: .*loss.* not finite\. .*pretrain\.lr_at_256"):
        pretrain(CONFIG, table, world=ALONE, precision=FP32, state=state)  # noticed at the epoch's end
    with pytest.raises(FloatingPointError, match=r"^step 4: .*"):
        pretrain(CONFIG, table, world=ALONE, precision=FP32, state=state, save=saved.append, should_stop=lambda: True)
    assert saved == []


def test_a_state_that_is_not_finite_is_never_saved(table: ImageTable) -> None:
    """A rate so high that the weights overflow while the loss before them was finite."""
    saved: list[TrainingState] = []
    config = replace(CONFIG, lr_at_256=1e41, warmup_epochs=0)
    with pytest.raises(FloatingPointError) as error:
        pretrain(config, table, world=ALONE, precision=FP32, save=saved.append, should_save=lambda: True)
    step = int(str(error.value).removeprefix("step ").partition(":")[0])
    assert [state.step for state in saved] == list(range(1, step))
    for state in saved:
        assert all(tensor.isfinite().all() for tensor in state.tensors.values())


def test_a_result_that_is_not_finite_is_none(table: ImageTable) -> None:
    """The last step's loss is finite and so are the backbone's features; a weight of the head is not."""
    state = stopped_after(STEPS - 1, table)
    name = "optimizer.exp_avg.head.mlp.0.weight"
    state = replace(state, tensors=state.tensors | {name: torch.full_like(state.tensors[name], torch.nan)})
    with pytest.raises(FloatingPointError, match=rf"^step {STEPS}: .*head.*not finite"):
        pretrain(CONFIG, table, world=ALONE, precision=FP32, state=state)


def test_a_divergence_is_told_as_such_at_a_point_too(table: ImageTable) -> None:
    with pytest.raises(FloatingPointError, match=r"^step \d+: .* not finite"):
        pretrain(replace(CONFIG, lr_at_256=1e41, warmup_epochs=0), table, world=ALONE, precision=FP32)


# What cannot be trained


@pytest.mark.parametrize(
    ("change", "ranks", "fragments"),
    [
        ({"batch": IMAGES + 2}, 1, [f"pretrain.batch is {IMAGES + 2}", f"{IMAGES} training images", "at most 30"]),
        ({"batch": 4}, 3, ["pretrain.batch (4)", "3 processes", "choose a multiple of 3"]),
        ({"batch": 6, "micro_batches": 2}, 2, ["pretrain.batch (6)", "2 micro_batches", "choose a multiple of 4"]),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, int], ranks: int, fragments: list[str], table: ImageTable
) -> None:
    with pytest.raises(ValueError) as error:
        pretrain(replace(CONFIG, **change), table, world=World(0, ranks, ALONE.device), precision=FP32)
    assert all(fragment in str(error.value) for fragment in fragments)


def test_deterministic_mode_ends_with_its_block() -> None:
    for failure in (None, KeyError):
        with pytest.raises(KeyError) if failure else repeatable(False), repeatable(True):
            assert torch.are_deterministic_algorithms_enabled()
            if failure:
                raise failure
        assert not torch.are_deterministic_algorithms_enabled()


# Parts of a batch


def batches_of(micro_batches: int, step: int, table: ImageTable, rows: torch.Tensor) -> list[Any]:
    config = replace(CONFIG, batch=8, micro_batches=micro_batches)
    batch = table.batch(rows.tolist())
    return make_micro_batches(config, CONFIG.depth, step, batch, torch.arange(8), table, ALONE.device)


@pytest.mark.parametrize("sizes", ["one", "many"])
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_parts_of_a_batch_are_the_batch(micro_batches: int, sizes: str, table: ImageTable, tmp_path: Path) -> None:
    if sizes == "many":
        files = [file for px in range(10) for file in digits(1, 12 + px, 20 - px)]
        table = write_table(tmp_path / "train.arrow", files)
    rows = draws.epoch_order(0, 0, len(table))[:8]
    ((crops, drawn),) = batches_of(1, 5, table, rows)
    parts = batches_of(micro_batches, 5, table, rows)
    for view, crop in enumerate(crops):
        torch.testing.assert_close(torch.cat([part[view] for part, _ in parts]), crop, rtol=0, atol=1e-6)
        assert torch.equal(torch.cat([part[view] for _, part in parts], dim=-1), drawn[view])


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_gradient_accumulation_is_one_batch(micro_batches: int, table: ImageTable) -> None:
    """With real crops and stochastic depth; everything that moves, moves once an optimizer step."""

    config = replace(CONFIG, lr_at_256=5e-4)  # a high rate would amplify the rounding of gradients near 0

    def two_steps(parts: int) -> dict[str, torch.Tensor]:
        dino = build_dino(CONFIG, table.channels).double()
        optimizer = build_optimizer(dino.student, config.optimizer)
        center = torch.zeros(1, CONFIG.out_dim, dtype=torch.float64)
        for step in (4, 5):  # past the warm-up and the freezing
            rows = torch.arange(8 * (step - 4), 8 * (step - 3))
            made = [([crop.double() for crop in crops], drawn) for crops, drawn in batches_of(parts, step, table, rows)]
            assert len(made) == parts
            settings = step_settings(config, step, STEPS_PER_EPOCH)
            assert settings.lr > 0 and not settings.freeze_last_layer
            center = train_step(dino, optimizer, center, made, settings, config, ALONE).center
        counts = {f"steps.{i}": state["step"] for i, state in enumerate(optimizer.state.values())}
        return dino.state_dict() | {"center": center} | counts

    whole, parts = two_steps(1), two_steps(micro_batches)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert all(tensor == 2 for name, tensor in parts.items() if name.startswith("steps."))


# BatchNorm

BATCH_NORM = replace(ONE_EPOCH, head_batch_norm=True, arch="shufflenet_v2_x0_5", drop_path_rate=0.0)


def test_points_of_the_curve_leave_batch_norm_alone(table: ImageTable) -> None:
    """The two global crops pass the teacher once a step; those that only look are not counted."""
    final = pretrain(BATCH_NORM, table, world=ALONE, precision=FP32)
    assert final.curve
    counted = {
        int(count)
        for name, count in final.tensors.items()
        if name.startswith("teacher.backbone.") and "num_batches" in name
    }
    assert counted == {STEPS_PER_EPOCH}


# Two processes


@pytest.fixture(scope="module")
def ranks(table: ImageTable, on_two_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_two_ranks(compute, table, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone(table: ImageTable) -> dict[str, Any]:
    return steps_of(ALONE, table)


def test_ranks_share_the_rows_and_crops_of_one_process(ranks, alone) -> None:
    for view, crop in enumerate(alone["float64"]["crops"]):
        assert len(crop) == BATCH
        assert torch.equal(torch.cat([rank["float64"]["crops"][view] for rank in ranks]), crop)


@pytest.mark.parametrize("steps", ["float64", "convnet"])
def test_ranks_compute_the_steps_of_one_process(steps: str, ranks, alone) -> None:
    """The convnet's with BatchNorm, whose running statistics stand among the weights."""
    expected = alone[steps]
    for rank in ranks:
        found = rank[steps]
        for name in ("losses", "center"):
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)
        for name, tensor in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=1e-9, msg=name)


def test_batch_norm_of_a_run_is_that_of_all_ranks(ranks) -> None:
    """Running statistics that ranks did not share would differ."""
    one, other = (rank["batch_norm"] for rank in ranks)
    assert any("running_mean" in name for name in one)
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_the_first_loss_of_ranks_in_fp32_is_that_of_one_process(ranks, alone) -> None:
    for rank in ranks:
        first, expected_first = rank["float32"]["losses"][0], alone["float32"]["losses"][0]
        torch.testing.assert_close(first, expected_first, rtol=0, atol=1e-5)


def test_ranks_hold_the_same_bits(ranks) -> None:
    one, other = (rank["run"]["final"] for rank in ranks)
    assert_same_bits(TrainingState(**other), TrainingState(**one))


def test_a_run_shared_among_ranks_reports_what_one_process_reports(ranks, uninterrupted: TrainingState) -> None:
    for found, expected in zip(ranks[1]["run"]["final"]["curve"], uninterrupted.curve, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_ranks_stop_together_and_resume_to_the_bit(ranks) -> None:
    """Only the last rank was asked to stop, only the first one to save after step 1."""
    for rank in ranks:
        run = rank["run"]
        assert run["saved"] == [1, STOP_AFTER]
        assert run["said"] == f"stopped after step {STOP_AFTER} of {STEPS}"
        assert_same_bits(TrainingState(**run["resumed"]), TrainingState(**run["final"]))


def test_settings_of_the_tiny_training_are_those_of_a_config() -> None:
    assert PretrainConfig(**SETTINGS) == CONFIG
