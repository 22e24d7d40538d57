"""dataset/perturbation.py: every perturbation against its definition, computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from dataset.perturbation import LEVELS, PERTURBATIONS, choose, draw_chance
from dataset.pet import find_records, make_loader
from tests.conftest import run
from utils.files import InputError

SIZE = 128
NAMES = list(PERTURBATIONS)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """Two smooth pictures with all brightnesses in them, (2, 3, SIZE, SIZE) uint8."""
    coarse = torch.randint(0, 256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0)).float()
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=False)
    return smooth.round().clamp(0, 255).to(torch.uint8)


def damage(image: torch.Tensor, name: str, level: int, seed: int = 0) -> torch.Tensor:
    ways = [PERTURBATIONS[name]]
    draws = [draw_chance(f"image{number}", ways, SIZE, seed + 1).get(name) for number in range(len(image))]
    chance = None if draws[0] is None else torch.stack([draw[seed] for draw in draws])
    return PERTURBATIONS[name](image, level, chance)


def test_the_levels_are_those_of_the_design():
    amounts = {name: list(way.amounts) for name, way in PERTURBATIONS.items()}
    assert amounts == {
        "gaussian_noise": [0, 2, 4, 6, 8, 10, 12, 14, 16, 18],
        "gaussian_blur": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9],
        "contrast_increase": [1, 1.01, 1.02, 1.03, 1.04, 1.05, 1.1, 1.15, 1.2, 1.25],
        "contrast_decrease": [1, 0.95, 0.9, 0.85, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1],
        "brightness_increase": [0, 5, 10, 15, 20, 25, 30, 35, 40, 45],
        "brightness_decrease": [0, -5, -10, -15, -20, -25, -30, -35, -40, -45],
        "occlusion": [0, 5, 10, 15, 20, 25, 30, 35, 40, 45],
        "salt_and_pepper": [0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18],
    }


@pytest.mark.parametrize("name", NAMES)
def test_level_zero_is_the_image_and_every_other_level_starts_from_it(name, image):
    before = image.clone()
    assert torch.equal(damage(image, name, 0), image)
    last = damage(image, name, LEVELS - 1)
    assert last.dtype == torch.uint8 and last.shape == image.shape and not torch.equal(last, image)
    assert torch.equal(image, before), "the image itself is left alone"
    assert torch.equal(damage(image, name, LEVELS - 1), last), "the same again"


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_damaged_alike_alone_and_in_any_batch(name, image):
    together = damage(image, name, 7)
    assert torch.equal(damage(image[:1], name, 7), together[:1])


@pytest.mark.parametrize("level", [1, 5, 9])
def test_noise_has_the_standard_deviation_asked_for(level):
    grey = torch.full((1, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    noise = damage(grey, "gaussian_noise", level).double() - 128
    asked = PERTURBATIONS["gaussian_noise"].amounts[level]
    assert noise.std().item() == pytest.approx(np.hypot(asked, 12**-0.5), rel=0.02)  # and that of rounding
    assert abs(noise.mean().item()) < 0.1
    channels = noise[0].flatten(1)
    assert torch.corrcoef(channels).fill_diagonal_(0).abs().max() < 0.05, "each channel has its own"


def test_nine_blurs_are_one_gaussian_of_the_combined_variance(image):
    """Report eq. 18: each kernel has the variance 1/2 along either axis, nine of them 4.5."""
    blurred = damage(image, "gaussian_blur", 9)[0].double().numpy()
    expected = np.stack([gaussian_filter(channel.double().numpy(), 4.5**0.5, mode="nearest") for channel in image[0]])
    contrast = float(image[0].double().std())
    assert np.abs(blurred - expected).max() < 0.02 * 255 and np.abs(blurred - expected).std() < 0.02 * contrast


def test_one_blur_is_the_binomial_kernel():
    dot = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    dot[..., 40, 50] = 160
    expected = 10 * torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(damage(dot, "gaussian_blur", 1)[0, 1, 39:42, 49:52].int(), expected.int())
    flat = torch.full((1, 3, SIZE, SIZE), 77, dtype=torch.uint8)
    assert torch.equal(damage(flat, "gaussian_blur", 9), flat), "the border is no edge"


@pytest.mark.parametrize(
    "name", ["contrast_increase", "contrast_decrease", "brightness_increase", "brightness_decrease"]
)
@pytest.mark.parametrize("level", range(LEVELS))
def test_contrast_and_brightness_are_exact_after_clipping(name, level, image):
    amount = PERTURBATIONS[name].amounts[level]
    pixels = image.numpy().astype(np.float64)
    expected = np.rint(np.clip(pixels * amount if "contrast" in name else pixels + amount, 0, 255))
    assert np.abs(damage(image, name, level).numpy() - expected).max() <= (1 if "contrast" in name else 0)
    darker = damage(image, name, level).double().mean() < image.double().mean()
    assert bool(darker) == (level > 0 and name.endswith("decrease"))


@pytest.mark.parametrize("level", [1, 9])
def test_the_square_has_its_edge_and_lies_inside(level):
    white = torch.full((40, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    black = (damage(white, "occlusion", level) == 0).all(dim=1)
    edge = PERTURBATIONS["occlusion"].amounts[level]
    assert (black.sum(dim=(1, 2)) == edge**2).all()
    assert (black.any(dim=1).sum(dim=1) == edge).all() and (black.any(dim=2).sum(dim=1) == edge).all()
    assert len({tuple(place.nonzero()[0].tolist()) for place in black}) > 30, "at a place of its own in each image"


def test_a_square_larger_than_the_image_covers_it():
    way = PERTURBATIONS["occlusion"]
    assert not way(torch.full((1, 3, 32, 32), 9, dtype=torch.uint8), 9, torch.rand(1, 2)).any()


@pytest.mark.parametrize("level", [1, 9])
def test_salt_and_pepper_have_their_share_half_of_each(level):
    grey = torch.full((4, 3, SIZE, SIZE), 128, dtype=torch.uint8)
    damaged = damage(grey, "salt_and_pepper", level)
    asked = PERTURBATIONS["salt_and_pepper"].amounts[level]
    for value in (0, 255):
        assert (damaged[:, 0] == value).sum(dim=(1, 2)).tolist() == pytest.approx([asked / 2 * SIZE**2] * 4, abs=1)
    assert torch.equal(damaged[:, 0], damaged[:, 1]) and torch.equal(damaged[:, 0], damaged[:, 2])


def test_the_damage_depends_on_seed_image_and_perturbation_alone():
    ways = list(PERTURBATIONS.values())
    one, same = draw_chance("cat_1", ways, 32, 3), draw_chance("cat_1", ways[:1] + ways[-2:], 32, 2)
    other = draw_chance("cat_2", ways, 32, 3)
    assert set(one) == {"gaussian_noise", "occlusion", "salt_and_pepper"} == set(same)
    for name, draws in one.items():
        assert torch.equal(draws[:2], same[name]), "whatever else is drawn"
        assert not torch.equal(draws, other[name]) and not torch.equal(draws[0], draws[1])


def test_batches_carry_the_chance_from_any_number_of_workers(prepared):
    from dataset.pet import EpochBatches, PetDataset

    records = find_records(prepared, "Test")
    ways = list(PERTURBATIONS.values())

    def chance(name: str) -> dict[str, torch.Tensor]:
        return draw_chance(name, ways, 32, 2)

    batches = []
    for workers in (0, 2):
        dataset = PetDataset(records, 32, chance=chance)
        batches.append(list(make_loader(dataset, EpochBatches(len(dataset), 5, shuffle=False), workers)))
    for one, two in zip(*batches, strict=True):
        assert one["chance/gaussian_noise"].shape[1:] == (2, 3, 32, 32)
        for key in ("chance/gaussian_noise", "chance/occlusion", "chance/salt_and_pepper"):
            assert torch.equal(one[key], two[key])


def test_choosing():
    assert choose(None) == [] and [way.name for way in choose([])] == NAMES
    assert [way.name for way in choose(["occlusion", "gaussian_blur"])] == ["gaussian_blur", "occlusion"]
    with pytest.raises(InputError, match="--perturb fog: no such perturbation, there are gaussian_noise, "):
        choose(["occlusion", "fog"])


def test_the_figure(prepared, tmp_path):
    out = tmp_path / "figure.png"
    result = run("dataset/perturbation.py", prepared, "--image-size", 32, "--out", out)
    assert result.returncode == 0, result.stderr
    assert Image.open(out).width > 1000
    result = run("dataset/perturbation.py", prepared, "--image", "nobody", "--out", out)
    assert result.returncode == 1 and "--image nobody: no image of" in result.stderr
    result = run("dataset/perturbation.py", tmp_path)
    assert result.returncode == 1 and "is not prepared. Run: python dataset/dataset_prep.py" in result.stderr
