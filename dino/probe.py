"""Probes on stored features: softmax regressions with many settings, trained at once on the same batches.

Not the paper's protocol, which trains on augmented images: this one sees each image's stored features only. SGD with
momentum, no weight decay and a cosine schedule are the paper's. Its steps are scaled along the principal axes of the
training features, since plain SGD judges how features are scaled as much as what they say: features that vary along
a few axes only, as those of an untrained network do, come out far below what a linear classifier can make of them,
and a gain over them far too large. The classifiers are the same, linear ones; shift, scale and rotation of the
features change nothing.

Legend: N images, B of a batch, D features, S settings, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

ROWS_AT_ONCE = 4096  # of predictions
FEW_CLASSES = 50  # on a CPU torch's softmax takes six times as long as ours for 10 classes, half as long for 100


class Setting(NamedTuple):
    """One probe's settings.

    lr: peak step; 0.01 to 10 is the useful range, whatever the scale of the features.
    damping: in mean variances of the features. Each axis's steps are divided by its variance + this: small values
        let weak axes speak at once, large ones come near plain SGD, where weak axes are learnt late or never.
    """

    lr: float
    damping: float


@dataclass(frozen=True)
class Probes:
    """Trained probes, one for each setting, for features as they were given."""

    centre_D: torch.Tensor
    weights_DSC: torch.Tensor
    bias_SC: torch.Tensor
    classes_C: torch.Tensor

    @property
    def diverged(self) -> torch.Tensor:
        """[S]: whose weights are not finite."""
        return ~(self.weights_DSC.isfinite().all(2).all(0) & self.bias_SC.isfinite().all(1))

    def predict(self, features_MD: torch.Tensor) -> torch.Tensor:
        """Label [S, M] by each probe; where scores are equal, the lowest label."""
        settings, classes = self.bias_SC.shape
        parts = [
            torch.addmm(self.bias_SC.flatten(), rows_BD - self.centre_D, self.weights_DSC.flatten(1))
            .view(len(rows_BD), settings, classes)
            .argmax(2)
            for rows_BD in features_MD.split(ROWS_AT_ONCE)
        ]
        return self.classes_C[torch.cat(parts)].T

    def accuracy(self, features_MD: torch.Tensor, labels_M: torch.Tensor) -> list[float]:
        """Share of right labels, 0 to 1, by each probe; NaN for one that diverged."""
        share_S = (self.predict(features_MD) == labels_M).double().mean(1)
        return share_S.masked_fill(self.diverged.to(share_S.device), math.nan).tolist()


def train_probes(
    features_ND: torch.Tensor,
    labels_N: torch.Tensor,
    *,
    settings: Sequence[Setting],
    epochs: int,
    batch: int,
    momentum: float,
    seed: int,
) -> Probes:
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
    # settings and classes side by side: one product of [B, D] with [D, S * C]
    rate_DW, bias_rate_W = (rate.repeat_interleave(classes, -1) for rate in (rate_DS, lr_S))
    weights_DW, bias_W = torch.zeros_like(rate_DW), torch.zeros_like(bias_rate_W)
    velocity_DW, bias_velocity_W = torch.zeros_like(weights_DW), torch.zeros_like(bias_W)
    steps = epochs * math.ceil(count / batch)
    step = 0
    for epoch in range(epochs):
        order_N = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for rows_B in order_N.to(along_ND.device).split(batch):
            batch_BD = along_ND[rows_B]
            logits_BSC = torch.addmm(bias_W, batch_BD, weights_DW).view(len(rows_B), len(settings), classes)
            # gradient of the mean cross-entropy: (probability - 1 at the image's own class) / B
            error_BSC = _softmax(logits_BSC).sub_(F.one_hot(column_N[rows_B], classes)[:, None])
            error_BW = error_BSC.flatten(1) / len(rows_B)
            velocity_DW.mul_(momentum).addmm_(batch_BD.T, error_BW)
            bias_velocity_W.mul_(momentum).add_(error_BW.sum(0))
            share = (1 + math.cos(math.pi * step / steps)) / 2
            weights_DW.addcmul_(velocity_DW, rate_DW, value=-share)
            bias_W.addcmul_(bias_velocity_W, bias_rate_W, value=-share)
            step += 1
    shape = (len(settings), classes)
    return Probes(centre_D, (axes_DD @ weights_DW).unflatten(1, shape), bias_W.unflatten(0, shape), classes_C)


def _softmax(logits_BSC: torch.Tensor) -> torch.Tensor:
    """Over classes; may use the memory of the logits."""
    if logits_BSC.shape[2] > FEW_CLASSES:
        return logits_BSC.softmax(2)
    powers_BSC = logits_BSC.sub_(logits_BSC.amax(2, keepdim=True)).exp_()
    return powers_BSC.div_(powers_BSC.sum(2, keepdim=True))


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
