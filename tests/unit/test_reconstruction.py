"""autoencoder/reconstruction.py: losses, scores and the trivial reconstructions."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch.nn import functional as F

from autoencoder.reconstruction import (
    LOSSES,
    ReconstructionLoss,
    edge_loss,
    psnr,
    score_reconstruction,
    ssim,
    trivial_reconstructions,
)
from dataset.pet import make_test_loader
from utils.config import TestConfig as ScoreConfig


def smooth_images(seed: int = 0, size: tuple[int, int] = (48, 40)) -> torch.Tensor:
    """Three images with the large areas and edges of a photograph."""
    torch.manual_seed(seed)
    return F.interpolate(torch.rand(3, 3, 6, 5), size, mode="bicubic").clamp(0, 1)


def blurred(image: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


@pytest.mark.parametrize("spoil", [blurred, lambda image: (image + 0.1 * torch.randn_like(image)).clamp(0, 1)])
def test_ssim_and_psnr_agree_with_scikit_image(spoil):
    target = smooth_images()
    prediction = spoil(target)
    for index, (own_ssim, own_psnr) in enumerate(zip(ssim(prediction, target), psnr(prediction, target))):
        pair = [image[index].permute(1, 2, 0).double().numpy() for image in (target, prediction)]
        # Wang et al. 2004: Gaussian window with sigma 1.5, cut at 11 px, population covariance.
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        assert own_ssim.item() == pytest.approx(structural_similarity(*pair, data_range=1, **window), abs=1e-4)
        assert own_psnr.item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=1), abs=1e-3)


def test_psnr_by_hand():
    image = torch.full((2, 3, 8, 8), 0.5)
    assert psnr(image + 0.1, image).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert psnr(image, image).tolist() == [100, 100], "and not infinite"


@pytest.mark.parametrize("name", [*LOSSES, "mse+0.5*ssim+0.1*edge"])
def test_gradients_are_those_of_the_loss(name):
    loss = ReconstructionLoss(name)
    torch.manual_seed(0)
    target = torch.rand(1, 3, 13, 12, dtype=torch.float64)
    prediction = torch.rand(1, 3, 13, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: loss(image, target), (prediction,))


@pytest.mark.parametrize("name", LOSSES)
def test_equal_images_cost_nothing_and_worse_ones_more(name):
    image, loss = smooth_images(), LOSSES[name]
    costs = [loss(image, image), loss(0.8 * image + 0.2 * blurred(image), image), loss(blurred(image), image)]
    assert costs[0].item() == pytest.approx(0, abs=1e-6)
    assert costs[0] < costs[1] < costs[2]


def test_the_edge_loss_is_about_edges():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 0.8
    assert edge_loss(image + 0.1, image).item() == pytest.approx(0, abs=1e-6), "brightness is left open"
    shifted = image.roll(1, dims=-1)  # moves the edge by a pixel, and wraps one column around
    # Of 15 steps to the right in a row two differ by 0.8 at the edge, and one at the border; none downwards.
    assert edge_loss(shifted[..., 1:], image[..., 1:]).item() == pytest.approx(2 * 0.8**2 / 14)


def test_a_weighted_sum_is_the_sum_of_its_parts():
    image, other = smooth_images(0), smooth_images(1)
    parts = LOSSES["mse"](other, image) + 0.5 * LOSSES["ssim"](other, image) + 2 * LOSSES["edge"](other, image)
    assert ReconstructionLoss("mse+0.5*ssim+2*edge")(other, image).item() == pytest.approx(parts.item(), rel=1e-6)


def test_trivial_reconstructions():
    image = smooth_images(size=(32, 32))
    trivial = trivial_reconstructions(image, image.mean(dim=0), 8)
    assert list(trivial) == ["mean image", "own mean color", "bilinear 4x4"]
    assert all(prediction.shape == image.shape for prediction in trivial.values())
    assert trivial["own mean color"][1, 2].unique().item() == pytest.approx(image[1, 2].mean().item())
    assert torch.equal(trivial["mean image"][0], trivial["mean image"][2])
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    inside = trivial_reconstructions(ramp, ramp[0], 8)["bilinear 4x4"][..., 6:-6]
    torch.testing.assert_close(inside, ramp[..., 6:-6], atol=0.02, rtol=0)


class Identity(nn.Module):
    def forward(self, image):
        return image


def test_scores_of_a_perfect_model_and_the_trivial_ones(prepared, tmp_path, capsys):
    loader = make_test_loader(ScoreConfig(data=prepared, workers=0, batch_size=5), 32)
    metrics = score_reconstruction(Identity(), loader, torch.device("cpu"), tmp_path, factor=8, details={"of": "it"})
    assert metrics == json.loads((tmp_path / "reconstruction.json").read_text())
    assert (metrics["images"], metrics["size"], metrics["of"]) == (12, [32, 32], "it")
    assert metrics["mean"]["autoencoder"] == {"psnr": pytest.approx(100), "ssim": pytest.approx(1)}
    images = np.stack([item["image"].numpy() for item in map(loader.dataset.__getitem__, range(12))]) / 255
    error = ((images - images.mean(axis=0)) ** 2).mean(axis=(1, 2, 3))
    assert metrics["mean"]["mean image"]["psnr"] == pytest.approx(float(np.mean(-10 * np.log10(error))), abs=1e-3)
    assert (tmp_path / "reconstructions.png").stat().st_size > 10_000
    assert "own mean color" in capsys.readouterr().out
