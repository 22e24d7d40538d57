"""python dataset/perturbation.py BASE_DIR

Draw one photograph under all perturbations at all severity levels (report section 8.3) as a figure.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import flag, parse
from utils.files import InputError
from utils.image import load_picture, resize_image
from utils.script import run_script

if TYPE_CHECKING:  # the names are known without torch, so that --help answers immediately
    from matplotlib.figure import Figure
    from torch import Tensor

LEVELS = 10
NUM_DRAWS = 3  # how often the random inputs of a perturbation are sampled


@dataclass(frozen=True)
class Perturbation:
    """A perturbation of 8-bit images with ten severity levels; level 0 is the image itself.

    `apply(image, amount, noise)` returns new float images (B, 3, H, W), of which 0..255 is kept. `sample(rng, height,
    width)` draws the random inputs of one image, if any, once for all levels: only the severity differs between levels.
    """

    name: str
    unit: str
    amounts: tuple[float, ...]
    apply: Callable[[Tensor, float, Tensor | None], Tensor]
    sample: Callable[[np.random.Generator, int, int], np.ndarray] | None = None

    @property
    def draws(self) -> int:
        """How often each image is scored per level."""
        return NUM_DRAWS if self.sample else 1

    def __call__(self, image: Tensor, level: int, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) uint8 at a severity level, uint8. `noise` (B, ...) is one draw of `sample_noise`."""
        if level == 0:
            return image
        return self.apply(image.float(), self.amounts[level], noise).round().clamp(0, 255).to(image.dtype)


def sample_noise(
    name: str, perturbations: Sequence[Perturbation], size: int, draws: int = NUM_DRAWS
) -> dict[str, Tensor]:
    """The random inputs for image `name` at `size` x `size`: a tensor (draws, ...) for each perturbation that has any.
    They depend on (draw, image, perturbation) alone, so that every model sees the same perturbed images."""
    import torch

    noise = {}
    for perturbation in perturbations:
        if perturbation.sample:
            key = [zlib.crc32(text.encode()) for text in (name, perturbation.name)]
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

    for _ in range(int(times)):  # the kernel is the product of [1 2 1] / 4 along both axes
        padded = F.pad(image, (0, 0, 1, 1), mode="replicate")
        image = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
        padded = F.pad(image, (1, 1, 0, 0), mode="replicate")
        image = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
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

    def covered(length: int, share: Tensor) -> Tensor:  # along one axis: (B, length)
        room = max(length - int(edge), 0)
        start = (share * (room + 1)).floor().clamp(max=room)[:, None]
        pixels = torch.arange(length, device=image.device)
        return (pixels >= start) & (pixels < start + int(edge))

    rows, columns = covered(image.shape[2], position[:, 1]), covered(image.shape[3], position[:, 0])
    return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _sample_pixel_order(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    # Every pixel gets a different rank between 0 and 1, so that a share of the pixels is exact.
    ranks = rng.permutation(height * width).reshape(height, width)
    return ((ranks + 0.5) / ranks.size).astype(np.float32)


def _salt_and_pepper(image: Tensor, amount: float, ranks: Tensor) -> Tensor:
    """`amount` is the share of pixels that change, half of them to white and half to black, in all three channels."""
    ranks = ranks[:, None]
    return image.masked_fill(ranks < amount / 2, 0).masked_fill(ranks > 1 - amount / 2, 255)


_SHARES = tuple(round(0.02 * step, 2) for step in range(LEVELS))
_ROWS = (
    Perturbation("gaussian_noise", "standard deviation", tuple(range(0, 20, 2)), _gaussian_noise, _sample_normal),
    Perturbation("gaussian_blur", "times a 3x3 kernel", tuple(range(LEVELS)), _gaussian_blur),
    Perturbation("contrast_increase", "factor", (1, 1.01, 1.02, 1.03, 1.04, 1.05, 1.1, 1.15, 1.2, 1.25), _contrast),
    Perturbation("contrast_decrease", "factor", (1, 0.95, 0.9, 0.85, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1), _contrast),
    Perturbation("brightness_increase", "offset", tuple(range(0, 50, 5)), _brightness),
    Perturbation("brightness_decrease", "offset", tuple(range(0, -50, -5)), _brightness),
    Perturbation("occlusion", "edge of the square, pixels", tuple(range(0, 50, 5)), _occlusion, _sample_position),
    Perturbation("salt_and_pepper", "share of the pixels", _SHARES, _salt_and_pepper, _sample_pixel_order),
)
PERTURBATIONS = {perturbation.name: perturbation for perturbation in _ROWS}


def choose_perturbations(names: Sequence[str] | None) -> list[Perturbation]:
    """The perturbations of `--perturb`: none for None, all for an empty list. InputError for an unknown name."""
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
            [perturbed] = perturbation(batch, level, noise.get(perturbation.name))
            show_picture(axis, perturbed.permute(1, 2, 0).numpy())
            axis.set_title(f"{perturbation.amounts[level]:g}", fontsize=8)
        label = f"{perturbation.name.replace('_', ' ')}\n{perturbation.unit}"
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(f"{name} at {len(image)}x{len(image)}", fontsize=9)
    return figure


@dataclass
class Config:
    """The flags of the figure."""

    base_dir: Path = flag(None, "folder prepared by dataset/dataset_prep.py", positional=True)
    image: str | None = flag(None, "name of a photograph of Test, such as Abyssinian_1 (default: the first)")
    image_size: int = flag(256, "edge in pixels of the perturbed image", low=32)
    out: Path | None = flag(None, "the figure (default: BASE_DIR/exploration/perturbations.png)")


def main() -> None:
    config = parse(Config, __doc__)

    from dataset.pet import find_records
    from utils.figures import save_figure

    records = {record.name: record for record in find_records(config.base_dir, "Test")}
    name = config.image or next(iter(records))
    if name not in records:
        raise InputError(f"--image {name}: no image of {config.base_dir / 'Test'}")
    image = resize_image(load_picture(records[name].image), config.image_size)
    out = config.out or config.base_dir / "exploration" / "perturbations.png"
    save_figure(plot_perturbations(image, name, list(PERTURBATIONS.values())), out)
    print(out)


if __name__ == "__main__":
    run_script(main)
