"""autoencoder/reconstruction.py: losses, scores, the trivial reconstructions, and the model that reconstructs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn
from torch.nn import functional as F

from autoencoder import reconstruction
from autoencoder.model import Autoencoder, AutoencoderSegmenter
from autoencoder.reconstruction import (
    LOSSES,
    edge_loss,
    find_autoencoder,
    psnr,
    score_both,
    score_reconstruction,
    ssim,
    trivial_reconstructions,
)
from autoencoder.test import Config
from dataset.pet import make_test_set
from tests.helpers import CPU, assert_same_weights, save_model
from utils import evaluation
from utils.distributed import autocast
from utils.evaluation import ModelTest
from utils.files import InputError, read_json
from utils.helper import load_checkpoint
from utils.loss import WeightedLoss


def smooth_images(size=(48, 40)):
    """Three images with the large areas and edges of a photograph."""
    torch.manual_seed(0)
    return F.interpolate(torch.rand(3, 3, 6, 5), size, mode="bicubic").clamp(0, 1)


def blurred(image):
    return F.avg_pool2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), 5, stride=1)


def noisy(image):
    return (image + 0.1 * torch.randn_like(image)).clamp(0, 1)


@pytest.mark.parametrize("degrade", [blurred, noisy])
def test_ssim_and_psnr_agree_with_scikit_image(degrade):
    target = smooth_images()
    prediction = degrade(target)
    for index, (own_ssim, own_psnr) in enumerate(zip(ssim(prediction, target), psnr(prediction, target))):
        pair = [image[index].permute(1, 2, 0).double().numpy() for image in (target, prediction)]
        # Wang et al. 2004: Gaussian window with sigma 1.5, cut at 11 px, population covariance.
        window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
        assert own_ssim.item() == pytest.approx(structural_similarity(*pair, data_range=1, **window), abs=1e-4)
        assert own_psnr.item() == pytest.approx(peak_signal_noise_ratio(*pair, data_range=1), abs=1e-3)


def test_psnr_by_hand():
    image = torch.full((2, 3, 8, 8), 0.5)
    assert psnr(image + 0.1, image).tolist() == pytest.approx([20, 20], abs=1e-4)
    assert psnr(image, image).tolist() == [100, 100], "not infinite"


@pytest.mark.parametrize("name", [*LOSSES, "mse+0.5*ssim+0.1*edge"])
def test_gradients_agree_with_finite_differences(name):
    loss = WeightedLoss(name, LOSSES)
    torch.manual_seed(0)
    target = torch.rand(1, 3, 13, 12, dtype=torch.float64)
    prediction = torch.rand(1, 3, 13, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda image: loss(image, target).value, (prediction,))


@pytest.mark.parametrize("name", LOSSES)
def test_loss_grows_with_the_error(name):
    image, loss = smooth_images(), LOSSES[name]
    costs = [loss(image, image), loss(0.8 * image + 0.2 * blurred(image), image), loss(blurred(image), image)]
    assert costs[0].item() == pytest.approx(0, abs=1e-6)
    assert costs[0] < costs[1] < costs[2]


def test_edge_loss_by_hand():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 0.8
    assert edge_loss(image + 0.1, image).item() == pytest.approx(0, abs=1e-6), "a constant difference has no edge"
    shifted = image.roll(1, dims=-1)  # moves the edge by a pixel, and wraps one column around
    # Of 15 steps to the right in a row two differ by 0.8 at the edge, and one at the border; none downwards.
    assert edge_loss(shifted[..., 1:], image[..., 1:]).item() == pytest.approx(2 * 0.8**2 / 14)


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


class Negative(nn.Module):
    def forward(self, image):
        return 1 - image


def make_test(data, run, *, reconstruction=None, encoder=None):
    """A test of the second stage in the folder `run`; an untrained first stage is beside it."""
    torch.manual_seed(0)
    first = Autoencoder(base_channels=2).eval()
    segmenter = AutoencoderSegmenter(first.encoder).eval()
    width = {"base_channels": 2}
    save_model(run / "reconstruction/best.pt", first, "autoencoder/reconstruction", width)
    path = save_model(run / "segmentation/best.pt", segmenter, "autoencoder", width, encoder=encoder)
    config = Config(checkpoint=path, data=data, workers=0, batch_size=5, device="cpu", reconstruction=reconstruction)
    return ModelTest(segmenter, load_checkpoint(path), make_test_set(config, 32), config, CPU)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by file name."""
    saved = {}
    for module in (reconstruction, evaluation):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: saved.update({path.name: figure}))
    return saved


def test_scores_of_a_perfect_model_and_the_trivial_ones(prepared, tmp_path, figures):
    test = make_test(prepared, tmp_path)
    out = test.config.results
    out.mkdir()
    text = score_reconstruction(nn.Identity(), Path("first.pt"), test)
    metrics = read_json(out / "reconstruction.json")
    assert (metrics["images"], metrics["size"], metrics["checkpoint"]) == (len(test.test_set), [32, 32], "first.pt")
    assert metrics["mean"]["autoencoder"] == {"psnr": pytest.approx(100), "ssim": pytest.approx(1)}
    assert list(metrics["mean"]) == ["autoencoder", "mean image", "own mean color", "bilinear 4x4"]
    images = np.stack([item["image"].numpy() for item in test.test_set]) / 255
    error = ((images - images.mean(axis=0)) ** 2).mean(axis=(1, 2, 3))
    expected = float(np.mean(-10 * np.log10(error)))
    assert metrics["mean"]["mean image"]["psnr"] == pytest.approx(expected, abs=1e-3)
    assert "PSNR (dB)" in text and f"{expected:.2f}" in text


def test_scores_are_computed_in_float32_at_any_precision(prepared, tmp_path, figures):
    test = make_test(prepared, tmp_path)
    test.config.results.mkdir()
    means = []
    for precision in ("fp32", "bf16"):
        with autocast(CPU, precision):
            score_reconstruction(nn.Identity(), Path("first.pt"), test)
        means.append(read_json(test.config.results / "reconstruction.json")["mean"])
    assert means[0] == means[1]


def test_figure_shows_photograph_and_reconstruction(prepared, tmp_path, figures):
    test = make_test(prepared, tmp_path)
    test.config.results.mkdir()
    score_reconstruction(Negative(), Path("first.pt"), test)
    rows = np.array(figures["reconstructions.png"].axes).reshape(-1, 3)
    assert [axis.get_title() for axis in rows[0]] == ["photograph", "reconstruction", "bilinear 4x4 and back"]
    pixels = {item["name"]: item["image"] for item in test.test_set}
    quality = []
    for row in rows:
        name, db = row[0].get_ylabel().split(": ")[1].split("\n")
        image = pixels[name].permute(1, 2, 0).numpy()
        assert np.array_equal(row[0].images[0].get_array(), image)
        assert np.array_equal(row[1].images[0].get_array(), 255 - image)
        quality.append(float(db.removesuffix(" dB")))
        target = pixels[name][None] / 255
        assert quality[-1] == pytest.approx(psnr(1 - target, target).item(), abs=0.1)
    assert quality == sorted(quality, reverse=True), "best, median, worst"


def test_autoencoder_is_found(prepared, tmp_path):
    """Beside the second stage, where --encoder of the training had it, or where --reconstruction says."""
    other = tmp_path / "moved.pt"
    for options, expected in [
        ({}, tmp_path / "run/reconstruction/best.pt"),
        ({"encoder": str(other)}, other),
        ({"reconstruction": other, "encoder": "gone.pt"}, other),
    ]:
        test = make_test(prepared, tmp_path / "run", **options)
        other.write_bytes((tmp_path / "run/reconstruction/best.pt").read_bytes())
        autoencoder, path = find_autoencoder(test)
        assert path == expected
        assert_same_weights({"model": autoencoder.state_dict()}, load_checkpoint(path))


def test_reconstruction_without_an_autoencoder_is_not_scored(prepared, tmp_path, figures, caplog):
    for encoder, reason in [("random", "the encoder was never trained"), ("gone.pt", "gone.pt is missing")]:
        test = make_test(prepared, tmp_path, encoder=encoder)
        score_both(test)
        assert f"the reconstruction is not scored: {reason}" in caplog.text
        assert not (test.config.results / "reconstruction.json").exists()
        assert read_json(test.config.results / "metrics.json")["model"] == "autoencoder"


def test_autoencoder_with_another_encoder_is_refused(prepared, tmp_path):
    test = make_test(prepared, tmp_path)
    path = tmp_path / "reconstruction/best.pt"
    other = load_checkpoint(path)
    other["model"]["encoder.blocks.0.1.running_mean"] += 1
    torch.save(other, path)
    with pytest.raises(InputError, match=r"holds another encoder than .*: give the right file as --reconstruction"):
        score_both(test)
    with pytest.raises(InputError, match="no such checkpoint"):
        find_autoencoder(make_test(prepared, tmp_path, reconstruction=tmp_path / "none.pt"))
