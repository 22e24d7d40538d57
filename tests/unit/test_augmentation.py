"""dataset/augmentation.py: image and mask stay aligned, and a sample depends on its key alone."""

from __future__ import annotations

import numpy as np
import pytest

from dataset.augmentation import PRESETS, SmoothElasticTransform, augment, paste_pet, train_transform
from utils.dataset import IGNORE, UNCOVERED


def checkerboard(size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """An image whose brightness is its mask: dark where 0, bright where 1."""
    mask = np.zeros((size, size), np.uint8)
    mask[size // 4 : size // 2, size // 4 : -size // 8] = 1
    return np.repeat((60 + 130 * mask)[..., None], 3, axis=2).astype(np.uint8), mask


def test_mask_and_image_stay_aligned():
    image, mask = checkerboard()
    transform = train_transform()
    for key in range(40):
        varied, varied_mask = augment(transform, image, mask, (key,))
        assert set(np.unique(varied_mask)) <= {0, 1, UNCOVERED}
        inside, outside = varied[varied_mask == 1].mean(), varied[varied_mask == 0].mean()
        middle = (inside + outside) / 2
        wrong = (varied.mean(axis=2) > middle) != (varied_mask == 1)
        assert wrong[varied_mask != UNCOVERED].mean() < 0.02


@pytest.mark.parametrize("preset", PRESETS)
def test_augmentation_depends_on_its_key_alone(preset):
    image, mask = checkerboard()
    first, second = train_transform(preset), train_transform(preset)
    second(image=image, mask=mask)  # other calls in between must not matter
    for key in ((0, 1, 2), (0, 1, 3), (5, 0, 0)):
        np.testing.assert_array_equal(augment(first, image, mask, key)[0], augment(second, image, mask, key)[0])
    assert (augment(first, image, mask, (0, 1, 2))[0] != augment(first, image, mask, (0, 1, 3))[0]).any()


def test_transforms_are_sampled_independently():
    """If every transform had the same random stream, a flip would always come with a rotation."""
    image, mask = checkerboard()
    transform = train_transform()
    flipped, rotated = [], []
    for key in range(200):
        _, varied = augment(transform, image, mask, (key,))
        columns = np.flatnonzero((varied == 1).any(axis=0))
        flipped.append(columns.mean() < 63)
        rotated.append((varied == UNCOVERED).any())
    assert 0.35 < np.mean(flipped) < 0.65
    assert 0.35 < np.mean(rotated) < 0.65
    assert abs(np.corrcoef(flipped, rotated)[0, 1]) < 0.25


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_image_and_mask_aligned_also_when_small(preset):
    for size in (128, 32):
        image, mask = checkerboard(size)
        transform = train_transform(preset)
        for key in range(20):
            varied, varied_mask = augment(transform, image, mask, (key,))
            assert varied.shape == image.shape and varied.dtype == np.uint8
            assert set(np.unique(varied_mask)) <= {0, 1, UNCOVERED}
            if preset == "strong" or size < 128:  # its blur, noise and grays move the brightness
                continue
            middle = (varied[varied_mask == 1].mean() + varied[varied_mask == 0].mean()) / 2
            wrong = (varied.mean(axis=2) > middle) != (varied_mask == 1)
            assert wrong[varied_mask < UNCOVERED].mean() < 0.03


def test_jitter_changes_the_size_of_the_pet():
    image, mask = checkerboard()
    sizes = [(augment(train_transform("jitter"), image, mask, (key,))[1] == 1).sum() / mask.sum() for key in range(60)]
    assert min(sizes) < 0.5 and max(sizes) > 1.6 and 0.5 < np.median(sizes) < 1.5


def test_no_augmentation():
    assert train_transform("none") is None


def test_a_pasted_pet_brings_its_class_and_boundary():
    image, mask = np.full((8, 8, 3), 10, np.uint8), np.zeros((8, 8), np.uint8)
    mask[:2] = 1
    other, other_mask = np.full((8, 8, 3), 200, np.uint8), np.full((8, 8), UNCOVERED, np.uint8)
    other_mask[1:4], other_mask[4], other_mask[5] = 2, IGNORE, 0
    pasted, pasted_mask = paste_pet(image, mask, other, other_mask)
    assert pasted_mask[:, 0].tolist() == [1, 2, 2, 2, IGNORE, 0, 0, 0]
    assert pasted[:, 0, 0].tolist() == [10, 200, 200, 200, 200, 10, 10, 10]


def test_uncovered_corners_are_ignored():
    image = np.full((64, 64, 3), 200, np.uint8)
    mask = np.ones((64, 64), np.uint8)
    seen = 0
    for key in range(30):
        varied, varied_mask = augment(train_transform(), image, mask, (key,))
        black = (varied < 20).all(axis=2)
        assert (varied_mask[black] == UNCOVERED).all()
        seen += black.any()
    assert seen > 5


def test_elastic_deformation_is_visible_and_never_folds():
    transform = SmoothElasticTransform()
    largest = []
    for seed in range(20):
        transform.set_random_seed(seed)
        maps = transform.get_params_dependent_on_data({"shape": (256, 256, 3)}, {})
        shift_x = maps["map_x"] - np.arange(256)
        shift_y = maps["map_y"] - np.arange(256)[:, None]
        largest.append(np.hypot(shift_x, shift_y).max())
        assert (np.diff(maps["map_x"], axis=1) > 0).all() and (np.diff(maps["map_y"], axis=0) > 0).all()
    assert 5 < np.median(largest) < 25
