"""Laws of the pictures: what they show is what slow, independent computations say."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as torchvision
from torch import Tensor

from dino.look import (
    HEAT,
    attention_maps,
    colour_picture,
    enlarged,
    fitted,
    heat_picture,
    image_picture,
    overlaid,
    patch_components,
    seen_picture,
    whole_image,
)
from dino.vision_transformer import VisionTransformer


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(img_size=12, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 1, 12, 20, generator=torch.Generator().manual_seed(1))


def test_attention_sits_where_its_patch_is(backbone: VisionTransformer, images: Tensor):
    maps = attention_maps(backbone, images)
    assert maps.shape == (3, 2, 3, 5)
    weights = backbone.get_last_selfattention(images)
    for row in range(3):
        for column in range(5):
            assert torch.equal(maps[:, :, row, column], weights[:, :, 0, 1 + row * 5 + column])
    assert torch.allclose(maps.sum((2, 3)), 1 - weights[:, :, 0, 0])


def test_components_are_the_eigenvectors_of_the_covariance(backbone: VisionTransformer, images: Tensor):
    components = patch_components(backbone, images)
    assert components.shape == (3, 3, 5, 3) and components.min() >= 0 and components.max() <= 1
    tokens = backbone.get_intermediate_layers(images, 1)[0].detach().double()
    patches = tokens[:, 1:].reshape(-1, 16).numpy()
    _, vectors = np.linalg.eigh(np.cov(patches, rowvar=False))
    for index in range(3):
        vector = vectors[:, -1 - index]
        vector = vector * np.sign(vector[np.abs(vector).argmax()])
        score = (patches - patches.mean(0)) @ vector
        low, high = np.quantile(score, [0.01, 0.99])
        expected = np.clip((score - low) / (high - low), 0, 1)
        assert np.allclose(components[..., index].numpy().ravel(), expected, atol=1e-5)


def test_equal_patches_get_equal_colours_across_images(backbone: VisionTransformer, images: Tensor):
    twice = patch_components(backbone, torch.cat([images, images]))
    assert torch.allclose(twice[:3], twice[3:], atol=1e-6)


def test_patches_that_do_not_vary_are_grey(backbone: VisionTransformer):
    with torch.no_grad():
        still = VisionTransformer(**backbone.arch).eval()
        still.norm.weight.zero_()
    assert torch.equal(patch_components(still, torch.ones(2, 1, 12, 12)), torch.full((2, 3, 3, 3), 0.5))


def test_rounding_is_not_shown_as_a_component(backbone: VisionTransformer):
    """Two kinds of patches, no positions: features differ in one direction, the rest is rounding."""
    network = VisionTransformer(**backbone.arch).eval()
    with torch.no_grad():
        network.pos_embed.zero_()
    halves = torch.ones(1, 1, 12, 12)
    halves[..., :4] = -1
    components = patch_components(network, halves)
    assert components[..., 0].unique().tolist() == [0.0, 1.0]
    assert torch.equal(components[..., 1:], torch.full((1, 3, 3, 2), 0.5))


def test_more_components_than_features_are_grey():
    narrow = VisionTransformer(img_size=8, patch_size=4, in_chans=1, embed_dim=2, depth=1, num_heads=1).eval()
    assert torch.equal(patch_components(narrow, torch.randn(2, 1, 8, 8))[..., 2], torch.full((2, 2, 2), 0.5))


def test_pictures_do_not_hinder_training_afterwards(backbone: VisionTransformer):
    """The network caches its position resampling; a matrix made for a picture must serve a gradient too."""
    network = VisionTransformer(**backbone.arch).eval()
    attention_maps(network, torch.ones(1, 1, 28, 24))
    network(torch.ones(1, 1, 28, 24)).sum().backward()


def test_pictures_leave_torchs_generator_alone(backbone: VisionTransformer, images: Tensor):
    before = torch.get_rng_state()
    attention_maps(backbone, images)
    patch_components(backbone, images)
    assert torch.equal(torch.get_rng_state(), before)


def test_heat_rises_in_lightness_from_black_to_its_last_colour():
    picture = heat_picture(torch.linspace(2, 5, 300).view(1, 300))[0].astype(int)
    assert tuple(picture[0]) == HEAT[0] and tuple(picture[-1]) == HEAT[-1]
    assert (np.diff(np.array(HEAT) @ [0.2126, 0.7152, 0.0722]) > 10).all()
    assert (np.diff(picture @ [0.2126, 0.7152, 0.0722]) > -1).all()
    assert (heat_picture(torch.ones(2, 2)) == HEAT[0]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_normalised_image_comes_back_to_the_pixel(channels: int):
    mean, std = [0.3, 0.5, 0.4][:channels], [0.2, 0.3, 0.25][:channels]
    generator = torch.Generator().manual_seed(3)
    stored = torch.randint(0, 256, (channels, 5, 7), generator=generator, dtype=torch.uint8)
    normalised = (stored / 255 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    picture = seen_picture(normalised, mean, std)
    assert np.array_equal(picture, image_picture(stored))
    for channel in range(3):
        assert np.array_equal(picture[..., channel], stored[channel % channels].numpy())


def test_colours_are_rounded_not_cut():
    assert colour_picture(torch.tensor([[[0.0, 0.5, 1.0]]])).tolist() == [[[0, 128, 255]]]
    assert colour_picture(torch.tensor([[[0.999, 0.001, 0.003]]])).tolist() == [[[255, 0, 1]]]


def test_fitting_magnifies_by_whole_numbers_and_shrinks_by_means():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    large = fitted(picture, 11)
    assert large.shape == (6, 9, 3) and np.array_equal(large[::3, ::3], picture)
    assert np.array_equal(large[1::3, 2::3], picture)
    chequered = np.zeros((40, 20, 3), np.uint8)
    chequered[::2] = 200
    small = fitted(chequered, 10)
    assert small.shape == (10, 5, 3) and (small == 100).all()


@pytest.mark.parametrize(("height", "width", "kept"), [(20, 30, (40, 56)), (30, 20, (56, 40)), (20, 20, (40, 40))])
def test_a_whole_image_is_torchvisions_cut_to_patches_in_the_middle(height: int, width: int, kept: tuple[int, int]):
    generator = torch.Generator().manual_seed(4)
    stored = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    seen = whole_image(stored, short_px=41, multiple=8)
    larger = [2 * height, 2 * width]
    expected = torchvision.resize(stored / 255, larger, interpolation=torchvision.InterpolationMode.BICUBIC)
    expected = torchvision.center_crop(expected, list(kept)).clamp(0, 1)
    assert seen.shape == (3, *kept)
    assert torch.allclose(seen, expected, rtol=0, atol=0.5 / 255)


def test_an_image_smaller_than_a_patch_becomes_one_patch():
    assert whole_image(torch.zeros(1, 1, 9, dtype=torch.uint8), short_px=2, multiple=4).shape == (1, 4, 36)


def test_a_map_is_enlarged_where_it_lies_and_within_its_range():
    values = torch.zeros(4, 6, 1)
    values[1, 4] = 2
    large = enlarged(values, 40, 60)[..., 0]
    assert large.shape == (40, 60) and large.min() == 0 and large.max() <= 2
    assert divmod(int(large.argmax()), 60) in [(row, column) for row in (14, 15) for column in (44, 45)]
    assert torch.allclose(enlarged(torch.full((2, 3, 2), 0.7), 9, 11), torch.tensor(0.7))


def test_an_overlay_shows_the_strongest_patch_in_colour_and_the_rest_in_dimmed_grey():
    picture = np.full((40, 60, 3), (200, 100, 0), np.uint8)
    values = torch.zeros(4, 6)
    values[1, 4] = 1
    shown = overlaid(picture, values)
    row, column = divmod(int(np.ptp(shown, axis=2).argmax()), 60)
    assert abs(row - 14.5) < 6 and abs(column - 44.5) < 6
    grey = 200 * 0.2989 + 100 * 0.587
    assert (shown[-5:, :20] == round(0.75 * grey)).all()
    assert (overlaid(picture, torch.ones(4, 6)) == round(0.75 * grey)).all()
