"""Prompt points drawn from a label."""

from __future__ import annotations

import numpy as np

from utils.dataset import CLASSES


def draw_points(classes: np.ndarray, rng: np.random.Generator) -> list[tuple[str, int, int]]:
    """One random point (class name, x, y) inside the pet and one in the background, never on the boundary.

    `classes` (H, W) holds one species. x and y are pixels, origin top left. A class without pixels has no point.
    """
    points = []
    for value, name in enumerate(CLASSES):
        pixels = np.flatnonzero(classes == value)
        if len(pixels):
            y, x = divmod(int(pixels[rng.integers(len(pixels))]), classes.shape[1])
            points.append((name, x, y))
    return points
