"""Vital signs of a training: how its teacher spreads images over prototypes, how many directions its features use.

Legend: B images of the batch, N rows, D width of the features, K prototypes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dino.loss import teacher_probabilities


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats along the last axis."""
    return torch.special.entr(probabilities).sum(dim=-1)


def rank_me(features_ND: Tensor) -> Tensor:
    """Effective number of directions: exp of the entropy of normalised singular values (RankMe, Garrido 2023)."""
    singular = torch.linalg.svdvals(features_ND.float().nan_to_num())  # the solver refuses NaN, feature_std shows it
    return torch.exp(entropy(singular / singular.sum().clamp(min=1e-12)))


@torch.no_grad()
def signs_of_features(features_ND: Tensor) -> dict[str, Tensor]:
    """feature_std and rank_me of features on the unit sphere: how they spread, how many directions they use."""
    normalised = F.normalize(features_ND.float(), dim=-1)
    return {
        "feature_std": normalised.std(dim=0, correction=0).mean(),  # of a single image: 0, not NaN
        "rank_me": rank_me(normalised - normalised.mean(dim=0)),
    }


@torch.no_grad()
def measure(
    teacher_out: Tensor,
    center: Tensor,
    teacher_temp: float,
    features_BD: Tensor,
    mean_over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, Tensor]:
    """Vital signs of a batch, scalars on its device.

    Args:
        teacher_out: [2 * B, K], or this rank's share of equal size.
        center: [1, K], the centre that the loss used.
        teacher_temp: The step's temperature.
        features_BD: The teacher backbone's features of one global view of the whole batch.
        mean_over_ranks: Makes one rank's mean that of all, so that the signs don't depend on how many there are.

    Returns:
        teacher_entropy, of an image, and batch_entropy, of the mean of all, in nats; information, the difference: how
        far the teacher tells images apart; feature_std and rank_me of the features on the unit sphere.
    """
    probabilities = teacher_probabilities(teacher_out, center, teacher_temp)
    of_an_image = mean_over_ranks(entropy(probabilities).mean())
    of_the_mean = entropy(mean_over_ranks(probabilities.mean(dim=0)))
    return {
        "teacher_entropy": of_an_image,
        "batch_entropy": of_the_mean,
        "information": of_the_mean - of_an_image,
        **signs_of_features(features_BD),
    }
