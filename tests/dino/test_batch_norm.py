"""BatchNorm shared by ranks is BatchNorm of the whole batch: outputs, gradients, running statistics."""

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from dino.batch_norm import SharedBatchNorm, share_batch_norms
from dino.distributed import World

SHARES = (3, 5)  # rows of each rank: they may differ
ALONE = World(0, 1, torch.device("cpu"))


def network() -> nn.Module:
    """Maps and rows, with and without weights, timm's with its activation, a cumulative average."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        BatchNormAct2d(4, momentum=0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
        nn.BatchNorm1d(5, affine=False, momentum=None),
        nn.Linear(5, 3),
        nn.BatchNorm1d(3, track_running_stats=False),
    ]
    return nn.Sequential(*layers).double()


def computed(world: World) -> dict[str, Tensor]:
    """Two passes over this rank's rows, backward of the summed squared errors, then eval mode; all of all rows."""
    torch.manual_seed(1)
    batches, targets = torch.randn(2, sum(SHARES), 2, 7, 7).double() + 3, torch.randn(sum(SHARES), 3).double()
    first = sum(SHARES[: world.rank]) if world.size > 1 else 0
    rows = slice(first, first + SHARES[world.rank] if world.size > 1 else None)
    shared = share_batch_norms(network(), world).train()
    found = {}
    for number, batch in enumerate(batches):
        images = batch[rows].clone().requires_grad_()
        out = shared(images)
        (out - targets[rows]).square().sum().backward()
        found |= {f"out{number}": world.gather_rows(out.detach()), f"d{number}": world.gather_rows(images.grad)}
    found |= {f"grad.{name}": world.sum(p.grad) for name, p in shared.named_parameters()}
    found |= shared.state_dict()
    shared[10].eval()  # has no statistics but the batch's: refused in eval mode by itself
    return found | {"eval": world.gather_rows(shared[:10].eval()(batches[0][rows]).detach())}


@pytest.fixture(scope="module")
def ranks(on_two_ranks) -> list[dict[str, Tensor]]:
    return on_two_ranks(computed)


def test_two_ranks_are_one_process(ranks: list[dict[str, Tensor]]) -> None:
    expected = computed(ALONE)
    assert sum(name.startswith("grad.") for name in expected) == 14
    assert sum("running" in name for name in expected) == 6
    for found in ranks:
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_ranks_hold_the_same_bits(ranks: list[dict[str, Tensor]]) -> None:
    for name, tensor in ranks[0].items():
        assert torch.equal(ranks[1][name], tensor), name


def test_alone_torchs_own_modules_stay() -> None:
    plain = network()
    assert share_batch_norms(plain, ALONE) is plain
    assert not any(isinstance(module, SharedBatchNorm) for module in plain.modules())


def test_parameters_and_names_stay() -> None:
    plain = network()
    before = dict(plain.named_parameters()), list(plain.state_dict())
    share_batch_norms(plain, World(0, 2, ALONE.device))
    assert sum(isinstance(module, SharedBatchNorm) for module in plain.modules()) == 4
    after = dict(plain.named_parameters()), list(plain.state_dict())
    assert after[1] == before[1] and after[0].keys() == before[0].keys()
    assert all(after[0][name] is parameter for name, parameter in before[0].items())


def test_half_precision_keeps_wide_statistics() -> None:
    """bf16 resolves 1 in 256 near 300: statistics in it would be lost."""
    x = 300 + 4 * torch.randn(64, 3, 4, 4)
    shared, plain = SharedBatchNorm(nn.BatchNorm2d(3), ALONE), nn.BatchNorm2d(3)
    out = shared(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain(x.bfloat16().float()), rtol=0, atol=0.02)
    torch.testing.assert_close(shared.running_var, plain.running_var, rtol=1e-5, atol=0)
