"""python dataset/perturbation.py BASE_DIR

Draw one photograph under all perturbations at all severity levels (report section 8.3) as a figure.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import run_script
from utils.files import InputError

if TYPE_CHECKING:  # the names are known without torch, so that --help answers immediately
    from matplotlib.figure import Figure
    from torch import Tensor

LEVELS = 10
NUM_DRAWS = 3  # how often the random inputs of a perturbation are sampled

Sampler = Callable[[np.random.Generator, int, int], np.ndarray]


@dataclass(frozen=True)
class Perturbation:
    """A perturbation of 8-bit images with ten severity levels; level 0 is the image itself.

    `apply(image, amount, noise)` takes float images (B, 3, H, W) in 0..255 and returns new ones; results outside 0..255
    are clipped afterwards. `sample(rng, height, width)` draws the random inputs of one image, if there are any. They
    are drawn once for all levels, so that only the severity changes from level to level.
    """

    name: str
    unit: str
    amounts: tuple[float, ...]
    apply: Callable[[Tensor, float, Tensor | None], Tensor]
    sample: Sampler | None = None

    @property
    def draws(self) -> int:
        """How often each image is scored per level."""
        return NUM_DRAWS if self.sample else 1

    def __call__(self, image: Tensor, level: int, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) uint8 at a severity level, uint8. `noise` (B, ...) is one draw of `sample_noise`."""
        if level == 0:
            return image
        perturbed = self.apply(image.float(), self.amounts[level], noise)
        return perturbed.round().clamp(0, 255).to(image.dtype)


def sample_noise(
    name: str, perturbations: Sequence[Perturbation], size: int, draws: int = NUM_DRAWS
) -> dict[str, Tensor]:
    """The random inputs of the perturbations for image `name` at `size` x `size`: one tensor (draws, ...) for each
    perturbation that has any.

    They depend on (draw, image, perturbation) alone, so that every model sees the same perturbed images.
    """
    import torch

    noise = {}
    for perturbation in perturbations:
        if perturbation.sample:
            key = [zlib.crc32(name.encode()), zlib.crc32(perturbation.name.encode())]
            samples = [perturbation.sample(np.random.default_rng([draw, *key]), size, size) for draw in range(draws)]
            noise[perturbation.name] = torch.from_numpy(np.stack(samples))
    return noise


def _sample_normal(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    # Half precision saves 25 MB per batch on its way from the loader; its 11 bits are enough for noise.
    return rng.standard_normal((3, height, width), dtype=np.float32).astype(np.float16)


def _gaussian_noise(image: Tensor, std: float, noise: Tensor) -> Tensor:
    return image + std * noise.float()


def _gaussian_blur(image: Tensor, times: float, _: None) -> Tensor:
    """A 3x3 binomial kernel, applied `times` times; the image is padded with its border pixels."""
    from torch.nn import functional as F

    for _ in range(int(times)):
        for axis in (2, 3):  # the kernel is the product of [1 2 1] / 4 along both axes
            padding = (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0)
            padded = F.pad(image, padding, mode="replicate")
            size = image.shape[axis]
            before, center, after = (padded.narrow(axis, start, size) for start in range(3))
            image = (before + 2 * center + after) / 4
    return image


def _contrast(image: Tensor, factor: float, _: None) -> Tensor:
    return image * factor


def _brightness(image: Tensor, offset: float, _: None) -> Tensor:
    return image + offset


def _sample_position(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.random(2).astype(np.float32)  # Apple's GPUs have no float64


def _occlusion(image: Tensor, edge: float, position: Tensor) -> Tensor:
    """A black square of `edge` pixels inside the image. `position` (B, 2): x and y as shares of the free room."""
    import torch

    height, width = image.shape[-2:]
    edge_x, edge_y = min(int(edge), width), min(int(edge), height)
    left = (position[:, 0] * (width - edge_x + 1)).floor().clamp(max=width - edge_x)[:, None]  # (B, 1)
    top = (position[:, 1] * (height - edge_y + 1)).floor().clamp(max=height - edge_y)[:, None]
    x = torch.arange(width, device=image.device)
    y = torch.arange(height, device=image.device)
    columns = (x >= left) & (x < left + edge_x)  # (B, W)
    rows = (y >= top) & (y < top + edge_y)
    return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _sample_pixel_order(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    # Every pixel gets a different rank between 0 and 1, so that a share of the pixels is exact.
    ranks = rng.permutation(height * width).reshape(height, width)
    return ((ranks + 0.5) / ranks.size).astype(np.float32)


def _salt_and_pepper(image: Tensor, amount: float, ranks: Tensor) -> Tensor:
    """`amount` is the share of pixels that change, half of them to white and half to black, in all three channels."""
    ranks = ranks[:, None]
    return image.masked_fill(ranks < amount / 2, 0).masked_fill(ranks > 1 - amount / 2, 255)


_STEPS = tuple(range(LEVELS))
_OFFSETS = tuple(5 * step for step in _STEPS)
PERTURBATIONS = {
    perturbation.name: perturbation
    for perturbation in (
        Perturbation("gaussian_noise", "standard deviation", tuple(2 * s for s in _STEPS), _gaussian_noise,
                     _sample_normal),
        Perturbation("gaussian_blur", "times a 3x3 kernel", _STEPS, _gaussian_blur),
        Perturbation("contrast_increase", "factor", (1, 1.01, 1.02, 1.03, 1.04, 1.05, 1.1, 1.15, 1.2, 1.25), _contrast),
        Perturbation("contrast_decrease", "factor", (1, 0.95, 0.9, 0.85, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1), _contrast),
        Perturbation("brightness_increase", "offset", _OFFSETS, _brightness),
        Perturbation("brightness_decrease", "offset", tuple(-offset for offset in _OFFSETS), _brightness),
        Perturbation("occlusion", "edge of the square, pixels", _OFFSETS, _occlusion, _sample_position),
        Perturbation("salt_and_pepper", "share of the pixels", tuple(round(0.02 * s, 2) for s in _STEPS),
                     _salt_and_pepper, _sample_pixel_order),
    )
}  # fmt: skip


def choose_perturbations(names: Sequence[str] | None) -> list[Perturbation]:
    """The perturbations of `--perturb`: none if it was not given (None), all if it names none.

    InputError for an unknown name.
    """
    if names is None:
        return []
    for name in names:
        if name not in PERTURBATIONS:
            raise InputError(f"--perturb {name}: no such perturbation, there are {', '.join(PERTURBATIONS)}")
    return [perturbation for name, perturbation in PERTURBATIONS.items() if name in names or not names]


def plot_perturbations(image: np.ndarray, name: str, perturbations: Sequence[Perturbation]) -> Figure:
    """A row per perturbation: the image (H, W, 3) uint8 at every level, the amount above it."""
    import torch
    from matplotlib.figure import Figure

    from utils.figures import show_picture

    batch = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, H, W)
    noise = sample_noise(name, perturbations, len(image), draws=1)
    figure = Figure(figsize=(1.6 + 1.1 * LEVELS, 0.5 + 1.3 * len(perturbations)), layout="constrained")
    axes = figure.subplots(len(perturbations), LEVELS, squeeze=False)
    for row, perturbation in zip(axes, perturbations):
        for level, axis in enumerate(row):
            perturbed = perturbation(batch, level, noise.get(perturbation.name))
            show_picture(axis, perturbed[0].permute(1, 2, 0).numpy())
            axis.set_title(f"{perturbation.amounts[level]:g}", fontsize=8)
        label = f"{perturbation.name.replace('_', ' ')}\n{perturbation.unit}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"{name} at {len(image)}x{len(image)}", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_dir", type=Path, metavar="BASE_DIR", help="folder prepared by dataset/dataset_prep.py")
    parser.add_argument("--image", help="name of a photograph of Test, such as Abyssinian_1 (default: the first)")
    parser.add_argument("--image-size", type=int, default=256, help="edge in pixels to perturb at (default: 256)")
    parser.add_argument("--out", type=Path, help="the figure (default: BASE_DIR/exploration/perturbations.png)")
    args = parser.parse_args()
    if args.image_size < 32:
        parser.error(f"--image-size: at least 32, got {args.image_size}")

    from dataset.pet import find_records
    from utils.figures import save_figure
    from utils.image import load_picture, resize_image

    records = {record.name: record for record in find_records(args.base_dir, "Test")}
    name = args.image or next(iter(records))
    if name not in records:
        raise InputError(f"--image {name}: no image of {args.base_dir / 'Test'}")
    image = resize_image(load_picture(records[name].image), args.image_size)
    out = args.out or args.base_dir / "exploration" / "perturbations.png"
    save_figure(plot_perturbations(image, name, list(PERTURBATIONS.values())), out)
    print(out)


if __name__ == "__main__":
    run_script(main)
