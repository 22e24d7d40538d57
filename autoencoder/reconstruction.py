"""How good a reconstruction is: the losses that train an autoencoder, and the scores and pictures that judge it.

Images are (B, 3, H, W) in [0, 1], H and W at least 11 (the window of SSIM).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from utils.config import weighted_terms
from utils.distributed import add_up, gather_samples, rank
from utils.evaluation import pick_examples
from utils.files import write_json
from utils.helper import to_device
from utils.plot import plot_pictures


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB (B,), at most 100 (equal images would be infinite)."""
    return -10 * (prediction - target).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image (B,), in [-1, 1] (Wang et al. 2004: Gaussian window of 11 px, sigma 1.5)."""
    _, local = structural_similarity_index_measure(prediction, target, data_range=1.0, return_full_image=True)
    return local[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # only where the whole window lies inside, as Wang et al. do


def ssim_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean SSIM."""
    return 1 - ssim(prediction, target).mean()


def edge_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference between the image gradients, so that boundaries weigh and flat areas do not.

    A gradient is the step to the next pixel, right and down. Alone it leaves the brightness of an image open. Squared,
    because most gradients are nearly zero: the absolute difference is then least for a flat picture, and training with
    it ended in grey.
    """
    error = prediction - target
    return error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()


# Those that `--reconstruction-loss` knows; autoencoder/train.py names them, too, before anything heavy is imported.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "ssim": ssim_loss, "edge": edge_loss}


class ReconstructionLoss:
    """The loss that `--reconstruction-loss` names: one of LOSSES, or a weighted sum such as "mse+0.5*ssim"."""

    def __init__(self, text: str):
        self.terms = weighted_terms(text, tuple(LOSSES))

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.stack([weight * LOSSES[name](prediction, target) for name, weight in self.terms.items()]).sum()


def trivial_reconstructions(image: Tensor, mean_image: Tensor, factor: int) -> dict[str, Tensor]:
    """What needs no learning: a mean image, each image's own mean color, each image at 1/factor and back, bilinear."""
    small = [max(1, edge // factor) for edge in image.shape[-2:]]
    resize = {"mode": "bilinear", "align_corners": False}
    return {
        "mean image": mean_image.expand_as(image),
        "own mean color": image.mean(dim=(2, 3), keepdim=True).expand_as(image),
        f"bilinear {small[0]}x{small[1]}": F.interpolate(
            F.interpolate(image, small, antialias=True, **resize), image.shape[-2:], **resize
        ),
    }


@torch.inference_mode()
def score_reconstruction(
    model: nn.Module, loader: DataLoader, device: torch.device, out: Path, *, factor: int, details: dict[str, Any]
) -> dict[str, Any]:
    """PSNR and SSIM of a model's reconstructions, means over the images, beside the trivial ones; prints them.

    Writes reconstruction.json (with `details`) and reconstructions.png (best, median and worst by PSNR) into `out`.
    `factor` is by how much the bottleneck is smaller than the image. The mean image is that of the scored images
    themselves: about the best that one picture for all can do.
    """
    total = sum(batch["image"].sum(dim=0, dtype=torch.int64) for batch in loader)
    mean_image = add_up(total.to(device)) / (255 * len(loader.dataset))
    values: dict[str, list[list[float]]] = {}
    for batch in tqdm(loader, desc="reconstruct", leave=False, disable=rank() != 0):
        image = to_device(batch, device)["image"]
        predictions = {"autoencoder": model(image), **trivial_reconstructions(image, mean_image, factor)}
        for name, prediction in predictions.items():
            scores = torch.stack([psnr(prediction, image), ssim(prediction, image)], dim=1)
            values.setdefault(name, []).extend(scores.tolist())
    scores = {name: torch.tensor(gather_samples(loader, pairs)) for name, pairs in values.items()}  # (N, 2)

    means = {name: dict(zip(("psnr", "ssim"), part.mean(dim=0).tolist())) for name, part in scores.items()}
    metrics = {"images": len(loader.dataset), "size": list(mean_image.shape[-2:]), "mean": means, **details}
    if rank() != 0:
        return metrics
    write_json(out / "reconstruction.json", metrics)
    rows = []
    own = scores["autoencoder"][:, 0].tolist()
    for place, index in pick_examples(own):
        batch = to_device({"image": loader.dataset[index]["image"][None]}, device)
        triple = [batch["image"], model(batch["image"])]
        triple.append(list(trivial_reconstructions(batch["image"], mean_image, factor).values())[-1])
        name = loader.dataset.records[index].name
        rows.append((f"{place}: {name}\n{own[index]:.1f} dB", [as_pixels(picture[0]) for picture in triple]))
    headings = ("photograph", "reconstruction", f"{list(scores)[-1]} and back")
    plot_pictures(out / "reconstructions.png", rows, headings)

    print(f"reconstruction of {len(own)} images at {mean_image.shape[-2]}x{mean_image.shape[-1]}:  PSNR (dB)      SSIM")
    for name, part in means.items():
        print(f"  {name:41}{part['psnr']:>8.2f}{part['ssim']:>10.3f}")
    print(f"{out / 'reconstruction.json'}\n{out / 'reconstructions.png'}")
    return metrics


def as_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) in [0, 1] as (H, W, 3) uint8."""
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
