"""Many softmax regressions on the same features, trained at once: the mathematics of `probe` and `linear`.

They stand side by side: a step of all is one product of [B, D] with [D, W], and what each does is what it would do
alone.

Legend: B images of a batch, M any images, D features, S settings (a regression each), C classes, W = S * C.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

ROWS_AT_ONCE = 4096  # of predictions
FEW_CLASSES = 50  # on a CPU torch's softmax takes six times as long as ours for 10 classes, half as long for 100


@dataclass(frozen=True)
class Classifiers:
    """Trained linear classifiers, one for each setting."""

    centre_D: torch.Tensor  # subtracted from the features first
    weights_DSC: torch.Tensor
    bias_SC: torch.Tensor
    classes_C: torch.Tensor  # the label of each class

    @property
    def diverged(self) -> torch.Tensor:
        """[S]: whose weights are not finite."""
        return ~(self.weights_DSC.isfinite().all(2).all(0) & self.bias_SC.isfinite().all(1))

    def predict(self, features_MD: torch.Tensor) -> torch.Tensor:
        """Label [S, M] by each classifier; where scores are equal, the lowest label."""
        settings, classes = self.bias_SC.shape
        parts = [
            torch.addmm(self.bias_SC.flatten(), rows_BD - self.centre_D, self.weights_DSC.flatten(1))
            .view(len(rows_BD), settings, classes)
            .argmax(2)
            for rows_BD in features_MD.split(ROWS_AT_ONCE)
        ]
        return self.classes_C[torch.cat(parts)].T

    def right(self, features_MD: torch.Tensor, labels_M: torch.Tensor) -> list[int | None]:
        """How many labels each classifier predicts right; None for one that diverged."""
        right_S = (self.predict(features_MD) == labels_M).sum(1)
        return [
            None if diverged else int(right) for right, diverged in zip(right_S, self.diverged.tolist(), strict=True)
        ]


class Regressions:
    """S softmax regressions in training, by SGD with momentum on the mean cross-entropy; no weight decay.

    Args:
        weights_DW: initial weights; trained in place.
        settings: S.
        rates: steps of each weight, broadcastable to [D, W].
        bias_rates_W: steps of each bias; biases begin at 0.
        momentum: velocity <- momentum velocity + gradient, as torch.optim.SGD.
    """

    def __init__(
        self,
        weights_DW: torch.Tensor,
        settings: int,
        *,
        rates: torch.Tensor,
        bias_rates_W: torch.Tensor,
        momentum: float,
    ):
        self.settings, self.momentum = settings, momentum
        self.rates, self.bias_rates_W = rates, bias_rates_W
        self.weights_DW, self.bias_W = weights_DW, torch.zeros_like(bias_rates_W)
        self.velocity_DW, self.bias_velocity_W = torch.zeros_like(weights_DW), torch.zeros_like(bias_rates_W)

    def step(self, features_BD: torch.Tensor, columns_B: torch.Tensor, share: float) -> None:
        """One step of each on the same batch.

        Args:
            features_BD: of the weights' dtype.
            columns_B: the class of each image, 0..C-1.
            share: of the rates that the schedule leaves to this step, 0 to 1.
        """
        classes = len(self.bias_W) // self.settings
        logits_BSC = torch.addmm(self.bias_W, features_BD, self.weights_DW).view(-1, self.settings, classes)
        # gradient of the mean cross-entropy: (probability - 1 at the image's own class) / B
        error_BSC = _softmax(logits_BSC).sub_(F.one_hot(columns_B, classes)[:, None])
        error_BW = error_BSC.flatten(1) / len(features_BD)
        self.velocity_DW.mul_(self.momentum).addmm_(features_BD.T, error_BW)
        self.bias_velocity_W.mul_(self.momentum).add_(error_BW.sum(0))
        self.weights_DW.addcmul_(self.velocity_DW, self.rates, value=-share)
        self.bias_W.addcmul_(self.bias_velocity_W, self.bias_rates_W, value=-share)


def _softmax(logits_BSC: torch.Tensor) -> torch.Tensor:
    """Over classes; may use the memory of the logits."""
    if logits_BSC.shape[2] > FEW_CLASSES:
        return logits_BSC.softmax(2)
    powers_BSC = logits_BSC.sub_(logits_BSC.amax(2, keepdim=True)).exp_()
    return powers_BSC.div_(powers_BSC.sum(2, keepdim=True))
