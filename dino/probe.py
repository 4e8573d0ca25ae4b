"""Probes on stored features: softmax regressions with many settings, trained at once on the same batches.

Not the paper's protocol, which trains on augmented images: this one sees each image's stored features only. SGD with
momentum, no weight decay and a cosine schedule are the paper's. Its steps are scaled along the principal axes of the
training features, since plain SGD judges how features are scaled as much as what they say: features that vary along
a few axes only, as those of an untrained network do, come out far below what a linear classifier can make of them,
and a gain over them far too large. The classifiers are the same, linear ones; shift, scale and rotation of the
features change nothing.

Legend: N images, B of a batch, D features, S settings, C classes, W = S * C.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dino.regression import Classifiers, Regressions
from dino.schedules import cosine


class Setting(NamedTuple):
    """One probe's settings.

    lr: peak step; 0.01 to 10 is the useful range, whatever the scale of the features.
    damping: in mean variances of the features. Each axis's steps are divided by its variance + this: small values
        let weak axes speak at once, large ones come near plain SGD, where weak axes are learnt late or never.
    """

    lr: float
    damping: float


def train_probes(
    features_ND: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    settings: Sequence[Setting],
    epochs: int,
    batch: int,
    momentum: float,
    seed: int,
) -> Classifiers:
    """Train a softmax regression for each setting; from zero weights, so that only the order of images is drawn.

    Args:
        features_ND: floating point, any scale.
        labels_N: int64, any values.
        settings: at most a few dozen: all see each batch in one matrix product.
        epochs: passes over the images; the schedule is a cosine from each setting's lr to 0 over all of them.
        batch: images per step; the last one of an epoch may be smaller.
        momentum: of SGD.
        seed: of the order of images, a pure function of (seed, epoch), the same on every device.

    Raises:
        ValueError: no images, features that are not finite, or an lr or damping that is not above 0.
    """
    _check(features_ND, settings)
    classes_C, column_N = labels_N.unique(return_inverse=True)
    count, classes = len(features_ND), len(classes_C)
    centre_D = features_ND.mean(0)
    variance_D, axes_DD = _principal_axes(features_ND - centre_D)
    along_ND = (features_ND - centre_D) @ axes_DD
    lr_S = along_ND.new_tensor([setting.lr for setting in settings])
    damping_S = along_ND.new_tensor([setting.damping for setting in settings])
    rate_DS = lr_S / (variance_D[:, None] + damping_S * variance_D.mean())
    rates_DW, bias_rates_W = (rates.repeat_interleave(classes, -1) for rates in (rate_DS, lr_S))
    regressions = Regressions(
        torch.zeros_like(rates_DW), len(settings), rates=rates_DW, bias_rates_W=bias_rates_W, momentum=momentum
    )
    steps = epochs * math.ceil(count / batch)
    step = 0
    for epoch in range(epochs):
        order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for rows_B in order_N.to(along_ND.device).split(batch):
            share = cosine(step, base=1.0, final=0.0, total_steps=steps)
            regressions.step(along_ND[rows_B], column_N[rows_B], share)
            step += 1
    shape = (len(settings), classes)
    weights_DSC = (axes_DD @ regressions.weights_DW).unflatten(1, shape)
    return Classifiers(centre_D, weights_DSC, regressions.bias_W.unflatten(0, shape), classes_C)


def _principal_axes(centred_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances [D] along the principal axes, and the axes [D, D] as columns; none below rounding."""
    covariance_DD = (centred_ND.T @ centred_ND / len(centred_ND)).cpu().double()
    variance_D, axes_DD = torch.linalg.eigh(covariance_DD)
    variance_D.clamp_(min=float(variance_D[-1]) * torch.finfo(centred_ND.dtype).eps)
    if not variance_D[-1] > 0:  # all images have the same features: nothing to learn but the bias
        variance_D.fill_(1)
    return variance_D.to(centred_ND), axes_DD.to(centred_ND)


def _check(features_ND: torch.Tensor, settings: Sequence[Setting]) -> None:
    if not len(features_ND):
        raise ValueError("no labelled images to train a probe on; give the training images labels")
    if not torch.isfinite(features_ND).all():
        raise ValueError("features to train a probe on are not all finite: has the training diverged?")
    for setting in settings:
        if not (setting.lr > 0 and setting.damping > 0):
            raise ValueError(f"probe.lrs holds {setting.lr}, probe.dampings {setting.damping}; choose numbers above 0")
