"""autoencoder/: the model beyond the contract of test_models.py, and the flags that choose an encoder."""

import pytest
import torch
from torch import nn

from autoencoder.model import Autoencoder, AutoencoderSegmenter, Encoder
from autoencoder.train import Config, load_encoder
from tests.helpers import save_model
from unet.model import UNet
from utils.config import parse
from utils.files import InputError


def test_sizes_are_those_of_the_design():
    features = Encoder()(torch.rand(1, 3, 256, 256))
    assert [tuple(part.shape[1:]) for part in features] == [(64, 128, 128), (128, 64, 64), (256, 32, 32)]
    head = AutoencoderSegmenter(Encoder()).head
    shapes = [(part.in_channels, part.out_channels) for part in head.modules() if isinstance(part, nn.Conv2d)]
    assert shapes == [(256, 128), (128, 64), (64, 32), (32, 3)]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in head.modules())


def test_reconstructions_have_the_range_of_images():
    reconstruction = Autoencoder(base_channels=4)(torch.rand(2, 3, 67, 75))
    assert reconstruction.min() > 0 and reconstruction.max() < 1


def test_every_pixel_is_reconstructed_from_its_surroundings():
    """A change in one corner changes the reconstruction there most: nothing is mirrored, shifted or averaged away."""
    torch.manual_seed(0)
    model = Autoencoder(base_channels=8).eval()
    image = torch.rand(1, 3, 70, 90)
    brighter = image.clone()
    brighter[..., -16:, -16:] += 0.5
    with torch.inference_mode():
        change = (model(brighter) - model(image)).abs().sum(dim=1)[0]
    assert change[-16:, -16:].mean() > 100 * change[:40, :60].mean()


def test_encoders_that_do_not_fit(tmp_path):
    """tests/scripts/test_autoencoder_scripts.py has one of another width."""
    unet = save_model(tmp_path / "unet.pt", UNet(base_channels=2), "unet", {"base_channels": 2})
    segmenter = AutoencoderSegmenter(Encoder(base_channels=2))
    second = save_model(tmp_path / "second.pt", segmenter, "autoencoder", {"base_channels": 2})
    for path, message in [
        (tmp_path / "none.pt", r"none\.pt: no such checkpoint"),
        (unet, "holds a unet model, expected autoencoder/reconstruction"),
        (second, "holds a autoencoder model, expected autoencoder/reconstruction"),
    ]:
        with pytest.raises(InputError, match=message):
            load_encoder(path, Config(base_channels=2))


def test_unknown_reconstruction_loss_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "", ["--reconstruction-loss", "mse+l1"])
    assert stopped.value.code == 2
    message = "expected one of mse, ssim, edge, or a weighted sum of them such as mse+0.5*edge, got 'mse+l1'"
    assert message in capsys.readouterr().err
