"""The albumentations pipeline that varies training images. Evaluation has none: it takes images as they are."""

import os
import random
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the import, which would ask the network for a newer version

import albumentations as A
import cv2
import numpy as np

from utils.dataset import IGNORE, UNCOVERED, foreground

cv2.setNumThreads(0)  # the loader's workers are the parallelism; without workers, make_loader sets the threads


class SmoothElasticTransform(A.ElasticTransform):
    """Elastic deformation (Simard et al. 2003) whose displacements are drawn on a coarse grid and interpolated.

    albumentations draws one displacement per pixel and blurs, which is slow at a strength that shows. A grid of `cells`
    x `cells` displacements up to `magnitude` of the edge, enlarged bicubically, is as smooth and several times faster.
    """

    def __init__(self, cells: int = 4, magnitude: float = 0.04, **options: Any):
        super().__init__(**options)
        self.cells = cells
        self.magnitude = magnitude

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        height, width = params["shape"][:2]
        grid = self.random_generator.uniform(-self.magnitude, self.magnitude, (self.cells, self.cells, 2))
        shift = cv2.resize(grid.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
        return {
            "map_x": shift[..., 0] * width + np.arange(width, dtype=np.float32),
            "map_y": shift[..., 1] * height + np.arange(height, dtype=np.float32)[:, None],
        }


def _report() -> list[A.BasicTransform]:
    """Flip, rotation, elastic deformation, color jitter (report section 2)."""
    return [
        A.HorizontalFlip(p=0.5),
        A.Rotate(limit=15, p=0.5, **UNCOVER),
        SmoothElasticTransform(border_mode=cv2.BORDER_REFLECT_101, p=0.5),
        A.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.05, p=0.5),
    ]


def _jitter() -> list[A.BasicTransform]:
    """The report's, and a scale of 0.5 to 2.0 with a shift: a crop, or a smaller picture with an uncovered margin."""
    scale = A.Affine(
        scale=(0.5, 2.0), balanced_scale=True, keep_ratio=True, translate_percent=(-0.25, 0.25), p=0.7, **UNCOVER
    )
    return [scale, *_report()]


def _strong() -> list[A.BasicTransform]:
    """Jitter with stronger colors, and sometimes blur, noise or grayscale."""
    *others, _ = _jitter()
    noise = [A.GaussianBlur(blur_limit=(3, 7)), A.GaussNoise(std_range=(0.02, 0.1))]
    color = A.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8)
    return [*others, color, A.OneOf(noise, p=0.3), A.ToGray(p=0.1)]


UNCOVER = {"border_mode": cv2.BORDER_CONSTANT, "fill": 0, "fill_mask": UNCOVERED}  # how a transform fills new corners
PRESETS = {"report": _report, "jitter": _jitter, "strong": _strong}  # of `--augment`


def train_transform(preset: str = "report") -> A.Compose | None:
    """The transform of `--augment`, None for "none". Corners that it uncovers are 254 in the mask."""
    return None if preset == "none" else A.Compose(PRESETS[preset]())


def paste_pet(
    image: np.ndarray, mask: np.ndarray, other: np.ndarray, other_mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and mask (H, W) with the pet of another image, and its boundary, over them."""
    pet = foreground(other_mask) | (other_mask == IGNORE)
    return np.where(pet[..., None], other, image), np.where(pet, other_mask, mask)


def augment(
    transform: A.Compose, image: np.ndarray, mask: np.ndarray, key: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Apply `transform` to image (H, W, 3) and mask (H, W), both uint8; the outcome depends on `key` alone."""
    # Not set_random_seed: in albumentations 2.0.8 it gives every transform the same stream, so that a flip would always
    # come with a rotation. One shared generator keeps their draws independent.
    generator = np.random.default_rng(key)
    transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
    varied = transform(image=image, mask=mask)
    return varied["image"], varied["mask"]
