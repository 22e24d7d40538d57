"""dataset/synthetic.py: the same seed draws the same files, never among other data; trimaps; colors of the species."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dataset.synthetic import MARKER, draw_dataset, draw_pet
from tests.helpers import state
from utils.files import InputError


def test_the_same_seed_draws_the_same_files(originals, tmp_path):
    draw_dataset(tmp_path, 24, seed=0)
    for path in sorted(originals.rglob("*.*")):
        assert (tmp_path / path.relative_to(originals)).read_bytes() == path.read_bytes(), path.name
    first, _ = draw_pet(1, np.random.default_rng(1))
    second, _ = draw_pet(1, np.random.default_rng(2))
    assert first.shape != second.shape or (first != second).any()


def test_a_second_call_changes_nothing_and_an_interrupted_one_is_completed(tmp_path):
    draw_dataset(tmp_path, 8)
    before = state(tmp_path)
    draw_dataset(tmp_path, 8)
    assert state(tmp_path) == before
    for name in ("annotations/test.txt", "images/synthetic_dog_2.jpg"):
        (tmp_path / name).unlink()
    draw_dataset(tmp_path, 8)
    after = state(tmp_path)
    assert {file: content for file, (_, content) in after.items()} == {
        file: content for file, (_, content) in before.items()
    }


def test_drawings_are_never_mixed_with_other_data(base):
    before = state(base)
    for count, seed in ((25, 0), (24, 1)):
        with pytest.raises(InputError, match=rf"not {count} synthetic pets.* seed {seed}; use another folder"):
            draw_dataset(base, count, seed=seed)
    assert state(base) == before
    (base / MARKER).unlink()
    with pytest.raises(InputError, match="holds other data"):
        draw_dataset(base, 24)
    assert state(base) == {file: content for file, content in before.items() if file != MARKER}


def test_a_boundary_band_separates_pet_and_background(originals):
    for path in (originals / "annotations/trimaps").iterdir():
        trimap = np.asarray(Image.open(path))
        assert set(np.unique(trimap)) == {1, 2, 3}, path.name
        assert 0.04 < (trimap == 1).mean() < 0.6, path.name
        pet, background = trimap == 1, trimap == 2
        for first, second in ((pet, background), (background, pet)):
            assert not (first[1:] & second[:-1]).any(), path.name
            assert not (first[:, 1:] & second[:, :-1]).any(), path.name


def test_color_alone_does_not_separate_the_species():
    """The mean colors of cats and dogs overlap: a nearest-mean classifier on them is about as good as guessing."""
    colors = {}
    for species in (1, 2):
        pictures = [draw_pet(species, np.random.default_rng([species, index])) for index in range(40)]
        colors[species] = np.array([image[trimap == 1].mean(axis=0) for image, trimap in pictures])
    means = {species: values[:20].mean(axis=0) for species, values in colors.items()}
    correct = [
        np.linalg.norm(color - means[species]) < np.linalg.norm(color - means[3 - species])
        for species in (1, 2) for color in colors[species][20:]
    ]  # fmt: skip
    assert np.mean(correct) < 0.7
