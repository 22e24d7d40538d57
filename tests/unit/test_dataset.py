"""utils/dataset.py: label files <-> classes, overlays. test_class_table.py has the table itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from utils.dataset import IGNORE, PETS, decode_trimap, foreground
from utils.files import InputError

masks = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from([0, 1, 2, IGNORE])
)


@given(masks, st.sampled_from(["P", "L", "RGB", "RGBA"]))
def test_labels_survive_saving_in_every_mode(classes, mode):
    np.testing.assert_array_equal(PETS.decode_label(PETS.encode_label(classes).convert(mode)), classes)


def test_grey_copies_hold_the_luma_of_the_palette():
    grey = PETS.encode_label(np.array([[0, 1, 2, IGNORE]], np.uint8)).convert("L")
    assert np.asarray(grey).tolist() == [[0, 38, 75, 255]]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (
            Image.fromarray(np.array([[0, 7]], np.uint8)),
            r"1 pixels .* no class: 7 \(1 pixels\); known are background 0, cat 1 or 38,",
        ),
        (
            Image.new("RGB", (2, 2), (0, 0, 128)),
            r"\(0, 0, 128\) \(4 pixels\); known are .* cat \(128, 0, 0\)",
        ),
        (Image.new("I;16", (2, 2), 1), r"must be an indexed, grey or RGB picture, got mode I;16"),
    ],
    ids=["index", "color", "mode"],
)
def test_label_values_of_no_class_are_an_error(label, message):
    with pytest.raises(InputError, match=message):
        PETS.decode_label(label)


def test_indexed_labels_are_read_by_color_if_all_colors_are_known():
    classes = np.array([[0, 2, 2], [IGNORE, 1, 0]], np.uint8)
    renumbered = PETS.encode_label(classes).convert("RGB").quantize(8)
    assert not np.array_equal(np.asarray(renumbered), classes)
    np.testing.assert_array_equal(PETS.decode_label(renumbered), classes)
    other = Image.fromarray(classes)
    other.putpalette([7] * 768)  # unknown colors: the indices count
    np.testing.assert_array_equal(PETS.decode_label(other), classes)


def test_trimap():
    trimap = Image.fromarray(np.array([[1, 2, 3]], np.uint8))
    assert decode_trimap(trimap, 1).tolist() == [[1, 0, IGNORE]]
    assert decode_trimap(trimap, 2).tolist() == [[2, 0, IGNORE]]
    with pytest.raises(InputError, match=r"no class: 0 \(1 pixels\), 4 \(1 pixels\); known are pet 1"):
        decode_trimap(Image.fromarray(np.array([[0, 4, 1]], np.uint8)), 1)


def test_foreground_is_every_class_but_the_background():
    assert foreground(np.array([0, 1, 2, IGNORE], np.uint8)).tolist() == [False, True, True, False]


def test_overlay_tints_everything_but_the_background():
    image = np.full((2, 2, 3), 100, np.uint8)
    drawn = PETS.overlay(image, np.array([[0, 1], [2, IGNORE]], np.uint8))
    tints = [PETS.row(value).tint for value in (1, 2, IGNORE)]
    expected = [(100, 100, 100), *(tuple((100 + channel) // 2 for channel in tint) for tint in tints)]
    assert [tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()] == expected
