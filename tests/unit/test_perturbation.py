"""dataset/perturbation.py: every perturbation against its definition, its random inputs, and the figure."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dataset.perturbation import (
    LEVELS,
    NUM_DRAWS,
    PERTURBATIONS,
    choose_perturbations,
    plot_perturbations,
    sample_noise,
)
from dataset.pet import PetDataset, find_records
from tests.helpers import CPU
from utils.loader import EpochBatchSampler, make_loader

SIZE = 128
EVERY = list(PERTURBATIONS.values())
NOISY = {name for name, perturbation in PERTURBATIONS.items() if perturbation.sample}


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """Two smooth pictures with all brightnesses in them, (2, 3, SIZE, SIZE) uint8."""
    coarse = torch.randint(0, 256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)
    return smooth.round().clamp(0, 255).to(torch.uint8)


def perturb(image: torch.Tensor, name: str, level: int) -> torch.Tensor:
    perturbation = PERTURBATIONS[name]
    draws = [sample_noise(f"image{number}", [perturbation], SIZE).get(name) for number in range(len(image))]
    noise = None if draws[0] is None else torch.stack([draw[0] for draw in draws])
    return perturbation(image, level, noise)


def test_the_levels_are_those_of_the_report():
    amounts = {name: list(perturbation.amounts) for name, perturbation in PERTURBATIONS.items()}
    expected = {
        "gaussian_noise": [0, 2, 4, 6, 8, 10, 12, 14, 16, 18],
        "gaussian_blur": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        "contrast_increase": [1, 1.01, 1.02, 1.03, 1.04, 1.05, 1.1, 1.15, 1.2, 1.25],
        "contrast_decrease": [1, 0.95, 0.9, 0.85, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1],
        "brightness_increase": [0, 5, 10, 15, 20, 25, 30, 35, 40, 45],
        "brightness_decrease": [0, -5, -10, -15, -20, -25, -30, -35, -40, -45],
        "occlusion": [0, 5, 10, 15, 20, 25, 30, 35, 40, 45],
        "salt_and_pepper": [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18],
    }
    assert {name: amounts.get(name) for name in expected} == expected
    assert {name: len(levels) for name, levels in amounts.items()} == dict.fromkeys(amounts, LEVELS)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_every_level_starts_from_the_unchanged_image(name, image):
    """Also alone in its batch."""
    before = image.clone()
    assert torch.equal(perturb(image, name, 0), image)
    last = perturb(image, name, LEVELS - 1)
    assert last.dtype == torch.uint8 and last.shape == image.shape and not torch.equal(last, image)
    assert torch.equal(image, before)
    assert torch.equal(perturb(image, name, LEVELS - 1), last)
    assert torch.equal(perturb(image[:1], name, 7), perturb(image, name, 7)[:1])


@pytest.mark.parametrize("level", [1, 5, 9])
def test_noise_has_the_standard_deviation_of_its_level(level):
    grey = torch.full((1, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    noise = perturb(grey, "gaussian_noise", level).double() - 128
    std = PERTURBATIONS["gaussian_noise"].amounts[level]
    assert noise.std().item() == pytest.approx(np.hypot(std, 12**-0.5), rel=0.02)  # rounding adds a variance of 1/12
    assert abs(noise.mean().item()) < 0.1
    assert torch.corrcoef(noise[0].flatten(1)).fill_diagonal_(0).abs().max() < 0.05, "each channel has noise of its own"


def test_nine_blurs_are_one_gaussian_of_the_summed_variance(image):
    """Report eq. 18: each kernel has the variance 1/2 along either axis, nine of them 4.5."""
    blurred = perturb(image, "gaussian_blur", 9)[0].double().numpy()
    expected = np.stack([gaussian_filter(channel.double().numpy(), 4.5**0.5, mode="nearest") for channel in image[0]])
    contrast = float(image[0].double().std())
    assert np.abs(blurred - expected).max() < 0.02 * 255 and np.abs(blurred - expected).std() < 0.02 * contrast


def test_one_blur_is_the_binomial_kernel():
    dot = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    dot[..., 40, 50] = 160
    expected = 10 * torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(perturb(dot, "gaussian_blur", 1)[0, 1, 39:42, 49:52].int(), expected.int())
    flat = torch.full((1, 3, SIZE, SIZE), 77, dtype=torch.uint8)
    assert torch.equal(perturb(flat, "gaussian_blur", 9), flat), "the padding adds no edge"


@pytest.mark.parametrize("level", range(LEVELS))
def test_contrast_and_brightness_are_exact_after_clipping(level, image):
    pixels = image.numpy().astype(np.float64)
    for kind, change, tolerance in (("contrast", np.multiply, 1), ("brightness", np.add, 0)):
        for direction in ("increase", "decrease"):
            name = f"{kind}_{direction}"
            expected = np.rint(np.clip(change(pixels, PERTURBATIONS[name].amounts[level]), 0, 255))
            perturbed = perturb(image, name, level)
            assert np.abs(perturbed.numpy() - expected).max() <= tolerance, name
            is_darker = bool(perturbed.double().mean() < image.double().mean())
            assert is_darker == (level > 0 and direction == "decrease"), name


@pytest.mark.parametrize("level", [1, 9])
def test_occlusion_is_a_black_square_inside_the_image(level):
    white = torch.full((40, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    black = (perturb(white, "occlusion", level) == 0).all(dim=1)
    edge = PERTURBATIONS["occlusion"].amounts[level]
    assert (black.sum(dim=(1, 2)) == edge**2).all()
    assert (black.any(dim=1).sum(dim=1) == edge).all() and (black.any(dim=2).sum(dim=1) == edge).all()
    assert len({tuple(place.nonzero()[0].tolist()) for place in black}) > 30, "another place in each image"
    small = white[:1, :, :4, :4]
    assert not PERTURBATIONS["occlusion"](small, level, torch.rand(1, 2)).any(), "a larger square covers the image"


@pytest.mark.parametrize("level", [1, 9])
def test_salt_and_pepper_change_exact_shares_of_the_pixels(level):
    grey = torch.full((4, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    perturbed = perturb(grey, "salt_and_pepper", level)
    share = PERTURBATIONS["salt_and_pepper"].amounts[level]
    for value in (0, 255):
        assert (perturbed[:, 0] == value).sum(dim=(1, 2)).tolist() == pytest.approx([share / 2 * SIZE**2] * 4, abs=1)
    assert torch.equal(perturbed[:, 0], perturbed[:, 1]) and torch.equal(perturbed[:, 0], perturbed[:, 2])


def test_noise_depends_on_draw_image_and_perturbation_alone():
    noise, other = sample_noise("cat_1", EVERY, 32), sample_noise("cat_2", EVERY, 32)
    assert set(noise) == NOISY >= {"gaussian_noise", "occlusion", "salt_and_pepper"}
    for name, draws in noise.items():
        alone = sample_noise("cat_1", [PERTURBATIONS[name]], 32, draws=2)[name]
        assert torch.equal(draws[:2], alone), f"{name} without the other perturbations and with fewer draws"
        assert not torch.equal(draws, other[name]), f"{name} of another image"
        assert len({draw.numpy().tobytes() for draw in draws}) == len(draws) == NUM_DRAWS, f"draws of {name}"
    for name, perturbation in PERTURBATIONS.items():
        assert perturbation.draws == (NUM_DRAWS if name in NOISY else 1), name


def test_noise_is_independent_of_the_number_of_workers(prepared):
    dataset = PetDataset(find_records(prepared, "Test"), 32, perturbations=EVERY)
    sampler = EpochBatchSampler(len(dataset), 5, shuffle=False)
    alone, shared = (list(make_loader(dataset, sampler, workers, CPU)) for workers in (0, 2))
    for first, second in zip(alone, shared, strict=True):
        for name in NOISY:
            assert first[f"noise/{name}"].shape[:2] == (len(first["name"]), NUM_DRAWS), name
            assert torch.equal(first[f"noise/{name}"], second[f"noise/{name}"]), name


def test_choosing_perturbations():
    assert choose_perturbations(None) == [] and choose_perturbations([]) == EVERY
    chosen = choose_perturbations(["occlusion", "gaussian_blur"])
    assert [perturbation.name for perturbation in chosen] == ["gaussian_blur", "occlusion"]


def test_the_figure_shows_every_perturbation_at_every_level(image):
    pixels = image[0, :, :40, :40].permute(1, 2, 0).numpy()
    figure = plot_perturbations(pixels, "cat_1", EVERY)
    assert len(figure.axes) == len(EVERY) * LEVELS
    noise = sample_noise("cat_1", EVERY, 40)
    for number, axis in enumerate(figure.axes):
        perturbation, level = EVERY[number // LEVELS], number % LEVELS
        draw = noise[perturbation.name][:1] if perturbation.name in noise else None
        expected = perturbation(image[:1, :, :40, :40], level, draw)[0].permute(1, 2, 0)
        np.testing.assert_array_equal(axis.images[0].get_array(), expected, err_msg=f"{perturbation.name} {level}")
        assert axis.get_title() == f"{perturbation.amounts[level]:g}"
        assert axis.get_ylabel() == ("" if level else f"{perturbation.name.replace('_', ' ')}\n{perturbation.unit}")
