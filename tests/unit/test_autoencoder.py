"""autoencoder/: the model beyond the contract of test_models.py, and the flags that choose an encoder."""

from __future__ import annotations

import re
from pathlib import Path

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


def test_frozen_encoder_stays_in_eval_mode():
    model = AutoencoderSegmenter(Encoder(base_channels=4))
    for mode in (True, False, True):
        model.train(mode)
        assert model.head.training == mode and not any(part.training for part in model.encoder.modules())


def save_autoencoder(path: Path, base_channels: int = 2) -> Path:
    model_args = {"base_channels": base_channels}
    return save_model(path, Autoencoder(**model_args), "autoencoder/reconstruction", model_args)


def test_encoder_comes_from_the_checkpoint_of_a_first_stage(tmp_path):
    path = save_autoencoder(tmp_path / "best.pt")
    state = torch.load(path, weights_only=True)["model"]
    encoder = load_encoder(path, Config(base_channels=2)).state_dict()
    assert encoder and all(torch.equal(value, state[f"encoder.{key}"]) for key, value in encoder.items())


def test_encoders_that_do_not_fit(tmp_path):
    first = save_autoencoder(tmp_path / "first.pt")
    unet = save_model(tmp_path / "unet.pt", UNet(base_channels=2), "unet", {"base_channels": 2})
    segmenter = AutoencoderSegmenter(Encoder(base_channels=2))
    second = save_model(tmp_path / "second.pt", segmenter, "autoencoder", {"base_channels": 2})
    for path, base_channels, message in [
        (tmp_path / "none.pt", 2, "none.pt: no such checkpoint"),
        (first, 4, "holds an encoder of 2 base channels, expected 4: give --base-channels 2"),
        (unet, 2, "holds a unet model, expected autoencoder/reconstruction"),
        (second, 2, "holds a autoencoder model, expected autoencoder/reconstruction"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            load_encoder(path, Config(base_channels=base_channels))


def test_unknown_reconstruction_loss_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(Config, "", ["--reconstruction-loss", "mse+l1"])
    assert stopped.value.code == 2
    message = "expected one of mse, ssim, edge, or a weighted sum of them such as mse+0.5*edge, got 'mse+l1'"
    assert message in capsys.readouterr().err
