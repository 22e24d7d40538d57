"""autoencoder/: the model, its two stages and their scripts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from autoencoder.model import Autoencoder, AutoencoderSegmenter, Encoder
from tests.conftest import ROOT, TINY, run
from tests.unit.test_train import assert_same_weights, saved_at
from utils.helper import load_checkpoint

TRAIN = ["autoencoder/train.py", *TINY]


@pytest.fixture(scope="session")
def two_stages(prepared, tmp_path_factory) -> Path:
    """The run folder of a tiny autoencoder, trained by the script with skips; 36 px are no multiple of 8."""
    out = tmp_path_factory.mktemp("runs") / "autoencoder"
    result = run(
        *TRAIN, "--data", prepared, "--out", out, "--epochs", 2, "--pretrain-epochs", 2, "--image-size", 36, "--skips",
        "--reconstruction-loss", "mse+0.5*ssim",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for stage in ("reconstruction", "segmentation"):
        assert f"{stage}: epoch 2/2" in result.stderr, "the bar and the log say which stage it is"
    return out


def test_sizes_are_those_of_the_design():
    features = Encoder()(torch.rand(1, 3, 256, 256))
    assert [tuple(part.shape[1:]) for part in features] == [(64, 128, 128), (128, 64, 64), (256, 32, 32)]
    head = AutoencoderSegmenter(Encoder()).head
    shapes = [(part.in_channels, part.out_channels) for part in head.modules() if isinstance(part, nn.Conv2d)]
    assert shapes == [(256, 128), (128, 64), (64, 32), (32, 3)]
    assert not any(isinstance(part, nn.BatchNorm2d) for part in head.modules())


@pytest.mark.parametrize("size", [(64, 64), (67, 75), (16, 130)])
def test_reconstructions_have_the_size_and_range_of_the_image(size):
    image = torch.rand(2, 3, *size)
    reconstruction = Autoencoder(base_channels=4)(image)
    assert reconstruction.shape == image.shape
    assert reconstruction.min() > 0 and reconstruction.max() < 1


def test_every_pixel_is_reconstructed_from_its_surroundings():
    """A change in one corner changes the reconstruction there most: nothing is mirrored, shifted or flattened away."""
    torch.manual_seed(0)
    model = Autoencoder(base_channels=8).eval()
    image = torch.rand(1, 3, 70, 90)
    brighter = image.clone()
    brighter[..., -16:, -16:] += 0.5
    with torch.inference_mode():
        change = (model(brighter) - model(image)).abs().sum(dim=1)[0]
    assert change[-16:, -16:].mean() > 100 * change[:40, :60].mean()


def test_a_frozen_encoder_stays_in_eval_mode():
    model = AutoencoderSegmenter(Encoder(base_channels=4))
    for mode in (True, False, True):
        model.train(mode)
        assert model.head.training == mode and not any(part.training for part in model.encoder.modules())
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_the_second_stage_leaves_the_encoder_as_it_was(two_stages):
    first = load_checkpoint(two_stages / "reconstruction/best.pt", "autoencoder/reconstruction")["model"]
    encoder = {key: value for key, value in first.items() if key.startswith("encoder.")}
    assert any("running_var" in key for key in encoder)
    for file in ("best.pt", "last.pt"):
        second = load_checkpoint(two_stages / "segmentation" / file, "autoencoder")["model"]
        assert encoder.keys() == {key for key in second if key.startswith("encoder.")}
        for key, value in encoder.items():
            assert torch.equal(value, second[key]), key


def test_each_stage_is_a_run_folder(two_stages):
    for stage, epochs, lr in (("reconstruction", 2, 1e-3), ("segmentation", 2, 1e-3)):
        names = {path.name for path in (two_stages / stage).iterdir()}
        assert {"config.json", "split.json", "log.csv", "curves.png", "last.pt", "best.pt"} <= names
        config = json.loads((two_stages / stage / "config.json").read_text())
        assert (config["epochs"], config["lr"]) == (epochs, lr)
        assert len((two_stages / stage / "log.csv").read_text().splitlines()) == 1 + epochs
    assert "val_iou" not in (two_stages / "reconstruction/log.csv").read_text()


def test_scores_and_reconstructions(two_stages, prepared, tmp_path):
    checkpoint = two_stages / "segmentation/best.pt"
    result = run("autoencoder/test.py", "--data", prepared, "--checkpoint", checkpoint, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.json", "images.csv", "masks", "confusion.png", "predictions.png", "reconstruction.json",
        "reconstructions.png",
    }  # fmt: skip
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["model"] == "autoencoder" and metrics["images"] == 12
    reconstruction = json.loads((tmp_path / "reconstruction.json").read_text())
    assert set(reconstruction["mean"]) == {"autoencoder", "mean image", "own mean color", "bilinear 4x4"}
    assert "PSNR (dB)" in result.stdout

    other = tmp_path / "other.pt"
    saved = load_checkpoint(two_stages / "reconstruction/best.pt", "autoencoder/reconstruction")
    saved["model"]["encoder.blocks.0.0.weight"] += 1
    torch.save(saved, other)
    result = run("autoencoder/test.py", "--data", prepared, "--checkpoint", checkpoint, "--reconstruction", other)
    assert result.returncode == 1 and "holds another encoder than" in result.stderr and "Traceback" not in result.stderr


def test_a_checkpoint_alone_is_enough_for_masks(two_stages, originals, tmp_path):
    shutil.copy(two_stages / "segmentation/best.pt", tmp_path / "best.pt")
    picture = next((originals / "images").iterdir())
    result = run(
        "autoencoder/test.py", "--checkpoint", tmp_path / "best.pt", "--images", picture, "--out", tmp_path / "o"
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"o/{picture.stem}_mask.png").exists()


def test_an_untrained_encoder(prepared, tmp_path):
    result = run(*TRAIN, "--data", prepared, "--out", tmp_path, "--epochs", 1, "--encoder", "random")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "reconstruction").exists()
    result = run("autoencoder/test.py", "--data", prepared, "--checkpoint", tmp_path / "segmentation/best.pt")
    assert result.returncode == 0, result.stderr
    assert "the encoder was never trained" in result.stderr
    assert not (tmp_path / "segmentation/test/reconstruction.json").exists()


def test_encoders_that_do_not_fit(two_stages, trained, prepared, tmp_path):
    first = two_stages / "reconstruction/best.pt"
    for encoder, flags, message in [
        (tmp_path / "none.pt", [], "no such checkpoint"),
        (first, ["--base-channels", "4"], "an encoder of 2 base channels, expected 4: give --base-channels 2"),
        (trained / "best.pt", [], "holds a unet model, expected autoencoder/reconstruction"),
        (two_stages / "segmentation/best.pt", [], "holds a autoencoder model, expected autoencoder/reconstruction"),
    ]:
        result = run(*TRAIN, "--data", prepared, "--out", tmp_path / "out", "--encoder", encoder, *flags)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "out").exists(), "a run that could not start leaves nothing"


def test_an_unknown_loss(tmp_path):
    result = run(*TRAIN, "--out", tmp_path / "out", "--reconstruction-loss", "mse+l1")
    assert result.returncode == 2
    assert "expected one of mse, ssim, edge, or a weighted sum of them such as mse+0.5*edge, got 'mse+l1'" in (
        result.stderr
    )


def test_a_second_stage_whose_first_is_gone(two_stages, tmp_path):
    out = shutil.copytree(two_stages, tmp_path / "run")
    shutil.rmtree(out / "reconstruction")
    before = (out / "segmentation/last.pt").read_bytes()
    result = run("autoencoder/train.py", "--out", out, "--resume", "--epochs", 3)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"{out / 'reconstruction/best.pt'}, the encoder that it stands on, is gone" in result.stderr
    assert (out / "segmentation/last.pt").read_bytes() == before and not (out / "reconstruction").exists()


def test_out_that_holds_another_run_is_refused(two_stages, prepared):
    before = (two_stages / "config.json").read_bytes()
    result = run(*TRAIN, "--data", prepared, "--out", two_stages)
    assert result.returncode == 1 and "holds another run (config.json)" in result.stderr
    assert (two_stages / "config.json").read_bytes() == before


def test_killed_in_either_stage_the_run_ends_the_same(prepared, tmp_path):
    """SIGKILL in the first stage, then in the second; the resumed runs go on where they were."""
    flags = ["--data", prepared, "--epochs", 25, "--pretrain-epochs", 25, "--patience", 0, *TINY]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run("autoencoder/train.py", "--out", whole, *flags).returncode == 0
    for stage in ("reconstruction", "segmentation"):
        command = [sys.executable, ROOT / "autoencoder/train.py", "--out", killed, *flags]
        command += ["--resume"] if killed.exists() else []
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        for _ in range(3):  # the checkpoint before the first epoch, and those of two epochs
            before = saved_at(killed / stage)
            while process.poll() is None and saved_at(killed / stage) == before:
                time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        name = {"reconstruction": "autoencoder/reconstruction", "segmentation": "autoencoder"}[stage]
        assert 0 < load_checkpoint(killed / stage / "last.pt", name)["epoch"] < 25
    final = run("autoencoder/train.py", "--out", killed, "--resume")
    assert final.returncode == 0, final.stderr
    assert "reconstruction: epoch" not in final.stderr, "the first stage is over"
    for stage, name in (("reconstruction", "autoencoder/reconstruction"), ("segmentation", "autoencoder")):
        for file in ("best.pt", "last.pt"):
            assert_same_weights(*(load_checkpoint(out / stage / file, name) for out in (whole, killed)))


def test_a_finished_first_stage_is_not_touched_when_the_second_resumes(two_stages, tmp_path):
    """--patience 0 would let a reconstruction that had stopped early go on, under a head that stands on it."""
    out = shutil.copytree(two_stages, tmp_path / "run")
    before = (out / "reconstruction/last.pt").read_bytes()
    result = run("autoencoder/train.py", "--out", out, "--resume", "--epochs", 3, "--patience", 0)
    assert result.returncode == 0, result.stderr
    assert (out / "reconstruction/last.pt").read_bytes() == before
    assert load_checkpoint(out / "segmentation/last.pt", "autoencoder")["epoch"] == 3


def test_a_stage_is_not_resumed_alone(two_stages):
    for stage in ("segmentation", "reconstruction"):
        before = (two_stages / stage / "config.json").read_bytes()
        result = run("autoencoder/train.py", "--out", two_stages / stage, "--resume")
        assert result.returncode == 1 and f"give the whole run, --out {two_stages}" in result.stderr
        assert (two_stages / stage / "config.json").read_bytes() == before
