"""The class table, label files <-> class masks, and the one way an image or a mask is resized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from utils.files import InputError

CLASSES = ("background", "cat", "dog")
IGNORE = 255  # the boundary band, and corners that a rotation uncovered: counted nowhere
SPECIES = {"cats": 1, "dogs": 2}  # folder name -> class

# VOC colors: background black, cat (128, 0, 0), dog (0, 128, 0), boundary white.
COLORS = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), IGNORE: (255, 255, 255)}
_PALETTE = np.zeros((256, 3), np.uint8)
for _value, _color in COLORS.items():
    _PALETTE[_value] = _color

# Overlays: told apart by color-blind readers too, which the palette's red and green are not.
_TINTS = _PALETTE.copy()
_TINTS[1] = (230, 110, 0)
_TINTS[2] = (0, 115, 200)

_UNKNOWN = 254  # marks file values that stand for no class


def _table(values: dict[int, int]) -> np.ndarray:
    table = np.full(256, _UNKNOWN, np.uint8)
    table[list(values)] = list(values.values())
    return table


_INDEXED = _table({0: 0, 1: 1, 2: 2, IGNORE: IGNORE})
# Copies saved as grey hold the palette's luma: 0.299 * 128 = 38, 0.587 * 128 = 75.
_GREY = _table({0: 0, 1: 1, 2: 2, 38: 1, 75: 2, IGNORE: IGNORE})


def _from_colors(colors: np.ndarray) -> np.ndarray:
    """Classes (...) of colors (..., 3)."""
    classes = np.full(colors.shape[:-1], _UNKNOWN, np.uint8)
    for value, color in COLORS.items():
        classes[(colors == color).all(axis=-1)] = value
    return classes


def pet_pixels(classes: Any) -> Any:
    """Where an array or tensor of classes is pet, of either species."""
    return (classes != 0) & (classes != IGNORE)


def decode_label(label: Image.Image) -> np.ndarray:
    """Classes (H, W) uint8 in {0, 1, 2, 255} of a label saved as indexed, grey or RGB picture.

    InputError lists the values that stand for no class.
    """
    if label.mode in ("RGB", "RGBA"):
        pixels = np.asarray(label.convert("RGB"))
        classes = _from_colors(pixels)
    elif label.mode == "L":
        pixels = np.asarray(label)
        classes = _GREY[pixels]
    elif label.mode == "P":
        # By color where all colors are those of classes: programs that save RGB labels as indexed ones number the
        # colors anew. By index with any other palette.
        pixels = np.asarray(label)
        palette = np.zeros((256, 3), np.uint8)
        entries = np.array(label.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette[: len(entries)] = entries
        classes = _from_colors(palette)[pixels]
        if (classes == _UNKNOWN).any():
            classes = _INDEXED[pixels]
    else:
        raise InputError(f"a label must be an indexed, grey or RGB picture, got mode {label.mode}")
    _check_known(classes, pixels)
    return classes


def decode_trimap(trimap: Image.Image, species: int) -> np.ndarray:
    """Classes (H, W) uint8 of an Oxford-IIIT trimap (1 pet, 2 background, 3 boundary) of a pet of class `species`."""
    if trimap.mode not in ("P", "L"):
        raise InputError(f"a trimap must be a grey picture, got mode {trimap.mode}")
    pixels = np.asarray(trimap)
    classes = _table({1: species, 2: 0, 3: IGNORE})[pixels]
    _check_known(classes, pixels)
    return classes


def encode_label(classes: np.ndarray) -> Image.Image:
    """The indexed picture, with the VOC palette, of classes (H, W) uint8."""
    label = Image.fromarray(classes)
    label.putpalette(_PALETTE.tobytes())
    return label


def overlay(image: np.ndarray, classes: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """The image (H, W, 3) uint8 with cats tinted orange, dogs blue, the boundary white."""
    tinted = image * (1 - opacity) + _TINTS[classes] * opacity
    return np.where((classes != 0)[..., None], tinted, image).astype(np.uint8)


def tint(value: int) -> tuple[float, float, float]:
    """The overlay color of a class, RGB in [0, 1]."""
    return tuple((_TINTS[value] / 255).tolist())


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB. 16-bit grey is scaled: Pillow alone would turn nearly all of it white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """RGB (size, size, 3) uint8: bilinear with antialiasing, the aspect ratio given up (as in the report)."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def rescale_point(x: float, y: float, old: Sequence[int], new: Sequence[int]) -> tuple[float, float]:
    """A point, in pixels, of a picture of `old` (width, height) after resizing it to `new`; pixel centers are whole."""
    return (x + 0.5) * new[0] / old[0] - 0.5, (y + 0.5) * new[1] / old[1] - 0.5


def resize_mask(classes: np.ndarray, size: int) -> np.ndarray:
    """Classes (size, size) uint8: nearest, since classes cannot be averaged."""
    return np.array(Image.fromarray(classes).resize((size, size), Image.Resampling.NEAREST))


def _check_known(classes: np.ndarray, pixels: np.ndarray) -> None:
    unknown = classes == _UNKNOWN
    if unknown.any():
        values = np.unique(pixels[unknown], axis=0)[:5].tolist()
        raise InputError(f"{unknown.sum()} label pixels stand for no class: values {values}")
