"""Other projects' pieces and the usual PIL chain, built for a comparison; None where a project is not installed."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms as t

from dino.config import PretrainConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLUR_SIDE = 23  # of torchvision's kernel; the paper's chain blurs by PIL's radius, which torchvision's has not


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    return find_spec(name) is not None


def pil_chain(config: PretrainConfig) -> Callable[[Image.Image], list[Tensor]]:
    """The paper's ten crops of one PIL image, by torchvision's transforms on PIL images."""
    bicubic = t.InterpolationMode.BICUBIC
    colours = t.Compose(
        [
            t.RandomHorizontalFlip(config.flip),
            t.RandomApply(
                [t.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)], config.jitter_p
            ),
            t.RandomGrayscale(config.grayscale_p),
        ]
    )

    def view(px: int, scale: tuple[float, float], kind: int) -> t.Compose:
        return t.Compose(
            [
                t.RandomResizedCrop(px, scale=scale, interpolation=bicubic),
                colours,
                t.RandomApply([PilBlur(config.blur_radius)], config.blur_p[kind]),
                t.RandomSolarize(128, config.solarize_p[kind]),
                t.ToTensor(),
                t.Normalize(MEAN, STD),
            ]
        )

    views = [view(config.global_px, config.global_scale, kind) for kind in range(2)]
    views += [view(config.local_px, config.local_scale, 2)] * config.local_crops
    return lambda image: [make(image) for make in views]


class PilBlur:
    """Pillow's Gaussian blur of a radius drawn from a range."""

    def __init__(self, radius: tuple[float, float]) -> None:
        self.radius = radius

    def __call__(self, image: Image.Image) -> Image.Image:
        """The blurred image."""
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(*self.radius))))


def lightly_crops(config: PretrainConfig) -> Callable[[Image.Image], object] | None:
    """lightly's DINO transform with as many crops of the same sizes and strengths."""
    if not installed("lightly"):
        return None
    from lightly.transforms.dino_transform import DINOTransform

    return DINOTransform(
        global_crop_size=config.global_px,
        local_crop_size=config.local_px,
        n_local_views=config.local_crops,
        cj_strength=1.0,
        cj_bright=config.brightness,
        cj_contrast=config.contrast,
        cj_sat=config.saturation,
        cj_hue=config.hue,
    )


def lightly_loss(prototypes: int, device: torch.device) -> nn.Module | None:
    """lightly's loss; called with lists of views [B, K]."""
    if not installed("lightly"):
        return None
    from lightly.loss import DINOLoss

    return DINOLoss(output_dim=prototypes, warmup_teacher_temp_epochs=0).to(device)


def lightly_head(width: int, prototypes: int, hidden: int, bottleneck: int, device: torch.device) -> nn.Module | None:
    """lightly's projection head."""
    if not installed("lightly"):
        return None
    from lightly.models.modules.heads import DINOProjectionHead

    return DINOProjectionHead(width, hidden, bottleneck, prototypes).to(device)
