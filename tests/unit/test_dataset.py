"""utils/dataset.py: label files <-> classes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from utils.dataset import IGNORE, decode_label, decode_trimap, encode_label, overlay, resize_image, resize_mask
from utils.files import InputError

masks = hnp.arrays(
    np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.sampled_from([0, 1, 2, IGNORE])
)


@given(masks, st.sampled_from(["P", "L", "RGB", "RGBA"]))
def test_labels_survive_every_way_of_saving_them(classes, mode):
    np.testing.assert_array_equal(decode_label(encode_label(classes).convert(mode)), classes)


def test_grey_copies_hold_the_luma_of_the_palette():
    grey = encode_label(np.array([[0, 1, 2, IGNORE]], np.uint8)).convert("L")
    assert np.asarray(grey).tolist() == [[0, 38, 75, 255]]


@pytest.mark.parametrize(
    "label",
    [
        Image.fromarray(np.array([[0, 7]], np.uint8)),
        Image.new("RGB", (2, 2), (0, 0, 128)),
        Image.new("I;16", (2, 2), 1),
    ],
)
def test_values_of_no_class_are_an_error(label):
    with pytest.raises(InputError, match=r"no class|mode"):
        decode_label(label)


def test_indexed_labels_with_a_palette_of_their_own_are_read_by_color():
    classes = np.array([[0, 2, 2], [IGNORE, 1, 0]], np.uint8)
    numbered_anew = encode_label(classes).convert("RGB").quantize(8)
    assert not np.array_equal(np.asarray(numbered_anew), classes)
    np.testing.assert_array_equal(decode_label(numbered_anew), classes)
    other = Image.fromarray(classes)
    other.putpalette([7] * 768)  # colors that mean nothing: the indices count
    np.testing.assert_array_equal(decode_label(other), classes)


def test_trimap():
    trimap = Image.fromarray(np.array([[1, 2, 3]], np.uint8))
    assert decode_trimap(trimap, 1).tolist() == [[1, 0, IGNORE]]
    assert decode_trimap(trimap, 2).tolist() == [[2, 0, IGNORE]]
    with pytest.raises(InputError, match=r"values \[0, 4\]"):
        decode_trimap(Image.fromarray(np.array([[0, 4, 1]], np.uint8)), 1)


def test_resizing_a_mask_makes_no_new_class_and_keeps_places():
    classes = np.zeros((40, 60), np.uint8)
    classes[:20, 30:] = 2
    classes[20:, :30] = IGNORE
    small = resize_mask(classes, 16)
    assert set(np.unique(small)) == {0, 2, IGNORE}
    assert (small[:8, 8:] == 2).all() and (small[8:, :8] == IGNORE).all()


def test_image_and_mask_are_resized_to_the_same_place():
    image = np.zeros((50, 90, 3), np.uint8)
    image[10:30, 20:70] = 255
    resized = resize_image(Image.fromarray(image), 32)
    mask = resize_mask((image[..., 0] > 0).astype(np.uint8), 32)
    assert resized.shape == (32, 32, 3)
    assert ((resized[..., 0] > 127) != (mask == 1)).mean() < 0.07


def test_overlay_leaves_background_alone():
    image = np.full((2, 2, 3), 100, np.uint8)
    drawn = overlay(image, np.array([[0, 1], [2, IGNORE]], np.uint8))
    assert (drawn[0, 0] == 100).all() and len(np.unique(drawn.reshape(-1, 3), axis=0)) == 4
