"""The projection head against the reference's numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino.head import DINOHead

CASES = pytest.mark.parametrize(("file", "norm_last_layer"), [("head_norm0", False), ("head_norm1", True)])


@CASES
def test_golden_head(golden, file: str, norm_last_layer: bool) -> None:
    reference = golden(file)
    head = DINOHead(16, 48, norm_last_layer=norm_last_layer, hidden_dim=40, bottleneck_dim=16)
    head.load_state_dict(reference.under("w/"))
    x = reference["x"].requires_grad_()
    y = head(x)
    torch.testing.assert_close(y, reference["y"], rtol=0, atol=1e-6)
    y.backward(reference["gy"])
    torch.testing.assert_close(x.grad, reference["gx"], rtol=1e-5, atol=1e-6)
    trainable = [name for name, p in head.named_parameters() if p.requires_grad]
    assert trainable == reference.names("trainable")


@CASES
def test_initial_last_layer(file: str, norm_last_layer: bool) -> None:
    torch.manual_seed(0)
    last = DINOHead(16, 512, norm_last_layer=norm_last_layer, hidden_dim=40, bottleneck_dim=64).last_layer
    assert (last.weight_g == 1).all() and last.weight_g.shape == (512, 1)
    assert last.weight_g.requires_grad is not norm_last_layer
    assert last.weight_v.abs().max().item() == pytest.approx(1 / 8, rel=0.01)  # torch's own: uniform


def test_initial_mlp_is_truncated_normal() -> None:
    torch.manual_seed(0)
    for layer in DINOHead(64, 32, hidden_dim=128, bottleneck_dim=64).mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert (layer.bias == 0).all()


def test_scores_are_cosines_times_g() -> None:
    torch.manual_seed(0)
    head = DINOHead(8, 5, norm_last_layer=False, hidden_dim=16, bottleneck_dim=4).double()
    head.last_layer.weight_g.data.uniform_(0.5, 2.0)
    x = torch.randn(3, 8, dtype=torch.float64)
    cosines = F.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight_v, dim=-1)
    torch.testing.assert_close(head(x), cosines * head.last_layer.weight_g[:, 0])
    assert (cosines.abs() <= 1).all()


@pytest.mark.parametrize("use_bn", [False, True])
@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
def test_layers_are_the_references(nlayers: int, use_bn: bool) -> None:
    head = DINOHead(8, 5, use_bn=use_bn, nlayers=nlayers, hidden_dim=16, bottleneck_dim=4)
    kinds = [type(layer) for layer in head.mlp] if nlayers > 1 else [type(head.mlp)]
    hidden = [nn.Linear, nn.BatchNorm1d, nn.GELU] if use_bn else [nn.Linear, nn.GELU]
    assert kinds == hidden * (nlayers - 1) + [nn.Linear]
    sizes = [(m.in_features, m.out_features) for m in head.mlp.modules() if isinstance(m, nn.Linear)]
    assert sizes == list(zip([8] + [16] * (nlayers - 1), [16] * (nlayers - 1) + [4], strict=True))
    assert head(torch.randn(6, 8)).shape == (6, 5)


def test_a_head_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="nlayers is 0"):
        DINOHead(8, 5, nlayers=0)
