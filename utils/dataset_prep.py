"""Prompt points drawn from a label, and what is made of them: heatmaps, masks, pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.dataset import CLASSES, IGNORE, pet_pixels

if TYPE_CHECKING:  # preparation starts in a blink because nothing here imports torch before it is asked for
    from torch import Tensor

SIGMA = 10 / 256  # of a heatmap, as a share of the image's edge (report section 9)


def random_pixel(where: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """(x, y) of a random true pixel of `where` (H, W); None if there is none."""
    pixels = np.flatnonzero(where)
    if not len(pixels):
        return None
    y, x = divmod(int(pixels[rng.integers(len(pixels))]), where.shape[1])
    return x, y


def draw_points(classes: np.ndarray, rng: np.random.Generator) -> list[tuple[str, int, int]]:
    """One random point (class name, x, y) inside the pet and one in the background, never on the boundary.

    `classes` (H, W) holds one species. x and y are pixels, origin top left. A class without pixels has no point.
    """
    drawn = [(name, random_pixel(classes == value, rng)) for value, name in enumerate(CLASSES)]
    return [(name, *point) for name, point in drawn if point is not None]


def gaussian_heatmaps(points: Tensor, height: int, width: int) -> Tensor:
    """Heatmaps (N, height, width) of points (N, 2), x and y in pixels: Gaussians with peak 1 at the point.

    Their standard deviation is 10 pixels at 256 (report section 9), along each edge in proportion.
    """
    import torch

    x, y = points[:, 0, None, None], points[:, 1, None, None]
    columns = torch.arange(width, device=points.device, dtype=points.dtype)
    rows = torch.arange(height, device=points.device, dtype=points.dtype)[:, None]
    return torch.exp(-0.5 * (((columns - x) / (SIGMA * width)) ** 2 + ((rows - y) / (SIGMA * height)) ** 2))


def point_mask(classes: np.ndarray, x: int, y: int) -> np.ndarray:
    """What lies under the click (x, y), the pet or the background: 1 there, 0 elsewhere, 255 on the boundary; uint8."""
    pet = pet_pixels(classes)
    return np.where(classes == IGNORE, IGNORE, pet == pet[y, x]).astype(np.uint8)


def prompt_pictures(classes: np.ndarray, x: int, y: int) -> tuple[Image.Image, Image.Image]:
    """A point's heatmap, and its mask (white: under the click, black: not, grey: boundary), at the label's size."""
    import torch

    heat = gaussian_heatmaps(torch.tensor([[float(x), float(y)]]), *classes.shape)[0].numpy()
    mask = point_mask(classes, x, y)
    grey = np.select([mask == 1, mask == IGNORE], [255, 128], 0)
    return Image.fromarray((255 * heat).round().astype(np.uint8)), Image.fromarray(grey.astype(np.uint8))
