"""The whole algorithm, 12 float64 steps by the loop's own train_step, against the reference's; and what a step is."""

import pytest
import torch
from golden_numbers import Golden
from torch import Tensor

from dino.config import PretrainConfig
from dino.curve import StepResult, run_length
from dino.distributed import World
from dino.model import DINO, DINOHead, VisionTransformer
from dino.optimizer import build_optimizer
from dino.pretrain import MicroBatch, check_fits, step_settings, train_step

WORLD = World(0, 1, torch.device("cpu"))


class Trajectory:
    """The training that golden/trajectory.npz is of, at its first step."""

    def __init__(self, golden, micro_batches: int = 1, world: World = WORLD) -> None:
        self.world = world
        self.reference = golden("trajectory")
        c = self.reference.config
        # every setting below is the reference's; the rest (crops) is not read by a step
        self.config = PretrainConfig(
            epochs=c["epochs"],
            batch=c["batch"],
            micro_batches=micro_batches,
            lr_at_256=c["lr"][0] * 256 / c["batch"],
            lr_final=c["lr"][1],
            warmup_epochs=c["lr"][2],
            weight_decay=c["weight_decay"][0],
            weight_decay_final=c["weight_decay"][1],
            ema_momentum=c["momentum"][0],
            teacher_temp_start=c["teacher_temp"][0],
            teacher_temp=c["teacher_temp"][1],
            teacher_temp_warmup_epochs=c["teacher_temp"][2],
            clip_norm=c["clip_grad"],
            freeze_last_layer_epochs=c["freeze_last_layer_epochs"],
        )
        assert c["momentum"][1] == 1.0
        self.steps_per_epoch = c["steps_per_epoch"]
        self.total_steps = c["epochs"] * c["steps_per_epoch"]
        backbones = [VisionTransformer(**c["vit"]) for _ in range(2)]
        heads = [DINOHead(c["vit"]["embed_dim"], norm_last_layer=True, **c["head"]) for _ in range(2)]
        self.dino = DINO(*backbones, *heads).double()
        for network in (self.dino.student, self.dino.teacher):
            network.load_state_dict(self.reference.under("student0/"))
        self.optimizer = build_optimizer(self.dino.student, self.config.optimizer)
        self.center = torch.zeros(1, c["head"]["out_dim"], dtype=torch.float64)

    def crops(self, step: int) -> list[Tensor]:
        share = list(self.world.rows(self.config.batch))
        data = self.reference["data"][step][share].double()  # [B, V, C, 16, 16]
        return [data[:, 0], data[:, 1], data[:, 2, :, 4:12, 4:12], data[:, 3, :, 4:12, 4:12]]

    def parts(self, step: int) -> list[MicroBatch]:
        split = [crop.chunk(self.config.micro_batches) for crop in self.crops(step)]
        return [(list(crops), [None] * len(crops)) for crops in zip(*split, strict=True)]

    def step(self, step: int) -> StepResult:
        settings = step_settings(self.config, step, self.steps_per_epoch)
        result = train_step(self.dino, self.optimizer, self.center, self.parts(step), settings, self.config, self.world)
        self.center = result.center
        return result


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_golden_trajectory(golden, micro_batches: int) -> None:
    run = Trajectory(golden, micro_batches)
    losses = torch.stack([run.step(step).loss for step in range(run.total_steps)])
    torch.testing.assert_close(losses, run.reference["losses"], rtol=0, atol=1e-9)
    torch.testing.assert_close(run.center, run.reference["centre"], rtol=0, atol=1e-9)
    assert_all_close(run.dino.teacher.state_dict(), run.reference.under("teacher/"), 1e-9)
    assert_all_close(run.dino.student.state_dict(), run.reference.under("student/"), 1e-9)


def trained(world: World) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Losses, centre and networks of this rank."""
    run = Trajectory(Golden, micro_batches=2, world=world)
    losses = torch.stack([run.step(step).loss for step in range(run.total_steps)])
    return losses, run.center, run.dino.state_dict()


def test_golden_trajectory_on_two_ranks(golden, on_two_ranks) -> None:
    reference = golden("trajectory")
    for losses, center, networks in on_two_ranks(trained):
        torch.testing.assert_close(losses, reference["losses"], rtol=0, atol=1e-9)
        torch.testing.assert_close(center, reference["centre"], rtol=0, atol=1e-9)
        for part in ("student", "teacher"):
            found = {name.removeprefix(f"{part}."): x for name, x in networks.items() if name.startswith(f"{part}.")}
            assert_all_close(found, reference.under(f"{part}/"), 1e-9)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_are_one_batch(golden, micro_batches: int) -> None:
    whole, parts = Trajectory(golden), Trajectory(golden, micro_batches)
    for step in range(4):  # past the warm-up and the freezing
        a, b = whole.step(step), parts.step(step)
        for name in ("loss", "center", "gradient_norms"):
            torch.testing.assert_close(getattr(b, name), getattr(a, name), rtol=0, atol=1e-10)
    assert_all_close(parts.dino.state_dict(), whole.dino.state_dict(), 1e-10)


def test_the_last_layer_rests_in_the_first_epoch_and_moves_after(golden) -> None:
    run = Trajectory(golden)
    last = run.dino.student.head.last_layer.weight_v
    first = last.detach().clone()
    for step in range(run.steps_per_epoch):
        run.step(step)
        torch.testing.assert_close(last, first, rtol=0, atol=0)
    assert last not in run.optimizer.state  # no moments: a frozen layer starts fresh
    run.step(run.steps_per_epoch)
    assert not torch.equal(last, first)


def test_a_step_moves_the_teacher_after_the_student_and_the_centre_once(golden) -> None:
    run = Trajectory(golden, micro_batches=2)
    run.step(0), run.step(1)
    teacher = {name: p.clone() for name, p in run.dino.teacher.named_parameters()}
    center = run.center.clone()
    with torch.no_grad():
        teacher_out = run.dino.teacher(run.crops(2)[:2])
    run.step(2)
    momentum = step_settings(run.config, 2, run.steps_per_epoch).ema_momentum
    student = dict(run.dino.student.named_parameters())
    for name, p in run.dino.teacher.named_parameters():
        expected = momentum * teacher[name] + (1 - momentum) * student[name].detach()
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-14)
    expected_center = 0.9 * center + 0.1 * teacher_out.mean(dim=0, keepdim=True)
    torch.testing.assert_close(run.center, expected_center, rtol=0, atol=1e-14)


def test_a_step_reports_norms_before_clipping(golden) -> None:
    run = Trajectory(golden)
    norms = run.step(0).gradient_norms
    after = torch.stack([p.grad.norm() for p in run.dino.student.parameters() if p.grad is not None])
    assert len(norms) == len(after) + 1  # the frozen last layer
    torch.testing.assert_close(norms[:-1].clamp(max=3.0), after, rtol=0, atol=3e-6)
    assert (norms > 3.0).any() and (norms < 3.0).any()


def test_schedules_of_the_steps() -> None:
    config = PretrainConfig(epochs=4, batch=128, warmup_epochs=2, freeze_last_layer_epochs=1, lr_at_256=1.0)
    settings = [step_settings(config, step, 5) for step in range(20)]
    assert [s.lr for s in settings[:11]] == pytest.approx([0.5 * step / 9 for step in range(10)] + [0.5])
    assert [s.freeze_last_layer for s in settings] == [True] * 5 + [False] * 15
    assert settings[0].weight_decay == pytest.approx(0.04) and settings[0].ema_momentum == pytest.approx(0.996)
    assert settings[-1].weight_decay < 0.4 and settings[-1].ema_momentum < 1.0
    assert settings[0].lr == 0.0


def test_teacher_temperature_is_constant_within_an_epoch() -> None:
    config = PretrainConfig(
        epochs=5, warmup_epochs=0, teacher_temp_start=0.04, teacher_temp=0.07, teacher_temp_warmup_epochs=4
    )
    found = [step_settings(config, step, 3).teacher_temp for step in range(15)]
    assert found == pytest.approx([t for t in (0.04, 0.05, 0.06, 0.07, 0.07) for _ in range(3)])


def test_the_remainder_of_the_images_is_dropped() -> None:
    config = PretrainConfig(epochs=20, batch=64)
    for images, steps in ((64, 1), (127, 1), (128, 2), (1000, 15)):
        assert run_length(config, images) == (steps, 20 * steps)


@pytest.mark.parametrize(
    ("images", "ranks", "micro_batches", "words"),
    [
        (63, 1, 1, ["batch is 64", "63 training images", "choose at most 63"]),
        (64, 3, 1, ["batch (64)", "3 processes", "choose a multiple of 3"]),
        (64, 4, 32, ["batch (64)", "4 processes", "32 micro_batches", "choose a multiple of 128"]),
    ],
)
def test_a_batch_that_cannot_be_trained_is_refused(images: int, ranks: int, micro_batches: int, words) -> None:
    config = PretrainConfig(batch=64, micro_batches=micro_batches)
    with pytest.raises(ValueError) as error:
        check_fits(config, images, World(0, ranks, torch.device("cpu")))
    assert all(word in str(error.value) for word in words)
    check_fits(PretrainConfig(batch=64, micro_batches=4), 64, World(1, 2, torch.device("cpu")))
