"""The plain step that ours is timed beside is the reference's algorithm: the golden trajectory."""

import torch
from golden_numbers import Golden
from test_trajectory import Trajectory, assert_all_close

from benchmarks.plain import Head, MultiCrop, PlainDino, Vit
from dino.pretrain import step_settings


def test_golden_trajectory_by_the_plain_step() -> None:
    run = Trajectory(Golden)
    c = run.reference.config
    vit, head = {"in_chans": 3, **c["vit"]}, {"in_dim": c["vit"]["embed_dim"], **c["head"]}
    student, teacher = (MultiCrop(Vit(**vit), Head(**head)).double() for _ in range(2))
    student.load_state_dict(run.reference.under("student0/"))
    plain = PlainDino(student, teacher, c["head"]["out_dim"])
    losses = []
    for step in range(run.total_steps):
        settings = step_settings(run.config, step, run.steps_per_epoch)
        losses.append(plain.step(run.crops(step), settings, run.config))
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), run.reference["losses"], rtol=0, atol=1e-9)
    torch.testing.assert_close(plain.center, run.reference["centre"], rtol=0, atol=1e-9)
    assert_all_close(teacher.state_dict(), run.reference.under("teacher/"), 1e-9)
    assert_all_close(student.state_dict(), run.reference.under("student/"), 1e-9)
