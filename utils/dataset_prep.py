"""Points drawn from a label, and their heatmaps, masks and pictures (report section 9)."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from utils.dataset import IGNORE, ClassTable, foreground

if TYPE_CHECKING:  # preparation starts fast because nothing here imports torch before it is needed
    from torch import Tensor

SIGMA = 10 / 256  # standard deviation of a heatmap, as a share of the image's edge (report section 9)


def random_pixel(where: np.ndarray, rng: np.random.Generator) -> tuple[int, int] | None:
    """(x, y) of a random true pixel of `where` (H, W); None if there is none."""
    pixels = np.flatnonzero(where)
    if not len(pixels):
        return None
    y, x = divmod(int(pixels[rng.integers(len(pixels))]), where.shape[1])
    return x, y


def sample_points(classes: np.ndarray, class_table: ClassTable, rng: np.random.Generator) -> list[tuple[str, int, int]]:
    """One random point (class name, x, y), in pixels, origin top left, in each class that `classes` (H, W) holds."""
    sampled = [(name, random_pixel(classes == value, rng)) for value, name in enumerate(class_table.names)]
    return [(name, *point) for name, point in sampled if point is not None]


def gaussian_heatmaps(points: "Tensor", height: int, width: int) -> "Tensor":
    """Gaussians (N, height, width) at points (N, 2), (x, y) in pixels: maximum 1, standard deviation SIGMA * edge."""
    import torch

    x, y = points[:, 0, None, None], points[:, 1, None, None]
    columns = torch.arange(width, device=points.device, dtype=points.dtype)
    rows = torch.arange(height, device=points.device, dtype=points.dtype)[:, None]
    return torch.exp(-0.5 * (((columns - x) / (SIGMA * width)) ** 2 + ((rows - y) / (SIGMA * height)) ** 2))


def point_mask(classes: np.ndarray, x: int, y: int) -> np.ndarray:
    """The target (H, W) uint8 of a click at (x, y): 1 on its side of the outline, 0 on the other, 255 = boundary."""
    pet = foreground(classes)
    return np.where(classes == IGNORE, IGNORE, pet == pet[y, x]).astype(np.uint8)


def heatmap_and_mask(classes: np.ndarray, x: int, y: int) -> tuple[Image.Image, Image.Image]:
    """A point's heatmap, and its mask (white: clicked side, black: other side, grey: boundary), at the label's size."""
    import torch

    heat = gaussian_heatmaps(torch.tensor([[float(x), float(y)]]), *classes.shape)[0].numpy()
    mask = point_mask(classes, x, y)
    grey = np.select([mask == 1, mask == IGNORE], [255, 128], 0)
    return Image.fromarray((255 * heat).round().astype(np.uint8)), Image.fromarray(grey.astype(np.uint8))
