"""python dataset/perturbation.py BASE_DIR

Draw one photograph under the eight perturbations at their ten levels (report section 8.3) as a figure.
"""

from __future__ import annotations

import argparse
import functools
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import run_script
from utils.files import InputError

if TYPE_CHECKING:  # the names are known before torch is imported, so that --help answers at once
    from torch import Tensor

    from utils.robustness import Damage

LEVELS = 10


@dataclass(frozen=True)
class Perturbation:
    """One way to damage 8-bit images, at ten levels; level 0 is the image itself.

    `apply(image, amount, draw)` takes images (B, 3, H, W) in 0..255 as float and returns them anew; what leaves 0..255
    is clipped after it. `draw(rng, height, width)`, where chance is part of it, is all the chance that one image needs:
    the same at every level, so that from one level to the next the damage grows and is not dealt anew.
    """

    name: str
    unit: str
    amounts: tuple[float, ...]
    apply: Callable[[Tensor, float, Tensor | None], Tensor]
    draw: Callable[[np.random.Generator, int, int], np.ndarray] | None = None

    def __call__(self, image: Tensor, level: int, draw: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) uint8 at a level, uint8; `draw` is a batch of what `draw_chance` returned."""
        if level == 0:
            return image
        damaged = self.apply(image.float(), self.amounts[level], draw)
        return damaged.round().clamp(0, 255).to(image.dtype)


def draw_chance(name: str, perturbations: Sequence[Perturbation], size: int, seeds: int) -> dict[str, Tensor]:
    """All the chance in the perturbations of image `name` at `size` x `size`: one tensor (seeds, ...) for each that
    has any. It depends on (seed, image, perturbation) alone, so that every model sees the same damage."""
    import torch

    chance = {}
    for perturbation in perturbations:
        if perturbation.draw:
            key = [zlib.crc32(name.encode()), zlib.crc32(perturbation.name.encode())]
            draws = [perturbation.draw(np.random.default_rng([seed, *key]), size, size) for seed in range(seeds)]
            chance[perturbation.name] = torch.from_numpy(np.stack(draws))
    return chance


def _draw_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    # Half precision: 25 MB less a batch on its way from the loader, and 11 bits of a standard deviation are plenty.
    return rng.standard_normal((3, height, width), dtype=np.float32).astype(np.float16)


def _gaussian_noise(image: Tensor, std: float, noise: Tensor) -> Tensor:
    return image + std * noise.float()


def _gaussian_blur(image: Tensor, times: float, _: None) -> Tensor:
    """A 3x3 binomial kernel, so many times; at the border the image is continued by its edge."""
    from torch.nn import functional as F

    for _ in range(int(times)):
        for axis in (2, 3):  # the kernel is the product of [1 2 1] / 4 along either axis
            padding = (0, 0, 1, 1) if axis == 2 else (1, 1, 0, 0)
            padded = F.pad(image, padding, mode="replicate")
            size = image.shape[axis]
            before, here, after = (padded.narrow(axis, start, size) for start in range(3))
            image = (before + 2 * here + after) / 4
    return image


def _contrast(image: Tensor, factor: float, _: None) -> Tensor:
    return image * factor


def _brightness(image: Tensor, offset: float, _: None) -> Tensor:
    return image + offset


def _draw_place(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.random(2).astype(np.float32)  # Apple's GPUs know no float64


def _occlusion(image: Tensor, edge: float, place: Tensor) -> Tensor:
    """A black square of `edge` pixels, all of it inside the image, at `place` (B, 2): x and y as shares of the room."""
    import torch

    height, width = image.shape[-2:]
    edge_x, edge_y = min(int(edge), width), min(int(edge), height)
    left = (place[:, 0] * (width - edge_x + 1)).floor().clamp(max=width - edge_x)[:, None]  # (B, 1)
    top = (place[:, 1] * (height - edge_y + 1)).floor().clamp(max=height - edge_y)[:, None]
    x = torch.arange(width, device=image.device)
    y = torch.arange(height, device=image.device)
    columns = (x >= left) & (x < left + edge_x)  # (B, W)
    rows = (y >= top) & (y < top + edge_y)
    return image.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _draw_ranks(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    # Every pixel another rank between 0 and 1, so that a share of them is exact to the pixel.
    ranks = rng.permutation(height * width).reshape(height, width)
    return ((ranks + 0.5) / ranks.size).astype(np.float32)


def _salt_and_pepper(image: Tensor, amount: float, ranks: Tensor) -> Tensor:
    """`amount` is the share of pixels that turn, half of them white and half black, in all three channels at once."""
    ranks = ranks[:, None]
    return image.masked_fill(ranks < amount / 2, 0).masked_fill(ranks > 1 - amount / 2, 255)


_STEPS = tuple(range(LEVELS))
_OFFSETS = tuple(5 * step for step in _STEPS)
PERTURBATIONS = {
    perturbation.name: perturbation
    for perturbation in (
        Perturbation("gaussian_noise", "standard deviation", tuple(2 * s for s in _STEPS), _gaussian_noise,
                     _draw_noise),
        Perturbation("gaussian_blur", "times a 3x3 kernel", _STEPS, _gaussian_blur),
        Perturbation("contrast_increase", "factor", (1, 1.01, 1.02, 1.03, 1.04, 1.05, 1.1, 1.15, 1.2, 1.25), _contrast),
        Perturbation("contrast_decrease", "factor", (1, 0.95, 0.9, 0.85, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1), _contrast),
        Perturbation("brightness_increase", "offset", _OFFSETS, _brightness),
        Perturbation("brightness_decrease", "offset", tuple(-offset for offset in _OFFSETS), _brightness),
        Perturbation("occlusion", "edge of the square, pixels", _OFFSETS, _occlusion, _draw_place),
        Perturbation(
            "salt_and_pepper", "share of the pixels", tuple(round(0.02 * s, 2) for s in _STEPS), _salt_and_pepper,
            _draw_ranks,
        ),
    )
}  # fmt: skip


def make_damage(config: Any, image_size: int) -> Damage | None:
    """What a TestConfig's `--perturb` asks for: the perturbations, and a loader whose batches hold their chance."""
    from dataset.pet import make_test_loader
    from utils.robustness import SEEDS, Damage

    ways = choose(config.perturb)
    chance = functools.partial(draw_chance, perturbations=ways, size=image_size, seeds=SEEDS)
    return Damage(ways, make_test_loader(config, image_size, chance=chance)) if ways else None


def check_flags(config: Any) -> None:
    """InputError, before anything is loaded, for a TestConfig whose `--perturb` cannot be done."""
    if config.perturb is not None and config.images:
        raise InputError("--perturb scores a split; with --images there is nothing to score, leave one of them out")
    choose(config.perturb)


def choose(names: Sequence[str] | None) -> list[Perturbation]:
    """The perturbations that `--perturb` names: none when it was not given, all when it names none.

    InputError for a name that is none of them.
    """
    if names is None:
        return []
    for name in names:
        if name not in PERTURBATIONS:
            raise InputError(f"--perturb {name}: no such perturbation, there are {', '.join(PERTURBATIONS)}")
    return [perturbation for name, perturbation in PERTURBATIONS.items() if name in names or not names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_dir", type=Path, metavar="BASE_DIR", help="folder that dataset/dataset_prep.py prepared")
    parser.add_argument("--image", help="name of a photograph of Test, such as Abyssinian_1 (default: the first)")
    parser.add_argument("--image-size", type=int, default=256, help="edge in pixels to perturb at (default: 256)")
    parser.add_argument("--out", type=Path, help="the figure (default: BASE_DIR/exploration/perturbations.png)")
    args = parser.parse_args()
    if args.image_size < 32:
        parser.error(f"--image-size: at least 32, got {args.image_size}")

    # Heavy imports come after parsing, so that --help answers at once.
    import torch

    from dataset.pet import find_records
    from utils.dataset import resize_image
    from utils.files import load_picture
    from utils.plot import plot_perturbations

    records = {record.name: record for record in find_records(args.base_dir, "Test")}
    name = args.image or next(iter(records))
    if name not in records:
        raise InputError(f"--image {name}: no image of {args.base_dir / 'Test'}")
    image = resize_image(load_picture(records[name].image), args.image_size)
    batch = torch.from_numpy(image).permute(2, 0, 1)[None]  # (1, 3, size, size)
    chance = draw_chance(name, list(PERTURBATIONS.values()), args.image_size, seeds=1)

    def pictures(perturbation: Perturbation) -> list[Any]:
        damaged = [perturbation(batch, level, chance.get(perturbation.name)) for level in range(LEVELS)]
        return [picture[0].permute(1, 2, 0).numpy() for picture in damaged]

    out = args.out or args.base_dir / "exploration" / "perturbations.png"
    rows = [(way.name, way.unit, way.amounts, pictures(way)) for way in PERTURBATIONS.values()]
    plot_perturbations(out, rows, f"{name} at {args.image_size}x{args.image_size}")
    print(out)


if __name__ == "__main__":
    run_script(main)
