"""dataset/synthetic.py."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dataset.synthetic import draw_dataset, draw_pet


def test_the_seed_decides(originals, tmp_path):
    draw_dataset(tmp_path, 24, seed=0)
    for path in sorted(originals.rglob("*.*")):
        assert (tmp_path / path.relative_to(originals)).read_bytes() == path.read_bytes()
    first, _ = draw_pet(1, np.random.default_rng(1))
    second, _ = draw_pet(1, np.random.default_rng(2))
    assert first.shape != second.shape or (first != second).any()


def test_trimaps_have_a_pet_with_a_band_around_it(originals):
    for path in (originals / "annotations/trimaps").iterdir():
        trimap = np.asarray(Image.open(path))
        assert set(np.unique(trimap)) == {1, 2, 3}
        assert 0.04 < (trimap == 1).mean() < 0.6
        # No pet pixel touches the background: the band lies between them.
        pet, ground = trimap == 1, trimap == 2
        assert not (pet[1:] & ground[:-1]).any() and not (pet[:, 1:] & ground[:, :-1]).any()


def test_color_alone_does_not_tell_the_species():
    """The mean colors of cats and of dogs overlap: nearest-mean on them is about as good as guessing."""
    colors = {}
    for species in (1, 2):
        pictures = [draw_pet(species, np.random.default_rng([species, index])) for index in range(60)]
        colors[species] = np.array([image[trimap == 1].mean(axis=0) for image, trimap in pictures])
    means = {species: values[:30].mean(axis=0) for species, values in colors.items()}
    right = [
        np.linalg.norm(color - means[species]) < np.linalg.norm(color - means[3 - species])
        for species in (1, 2) for color in colors[species][30:]
    ]  # fmt: skip
    assert np.mean(right) < 0.7
