"""autoencoder/train.py and autoencoder/test.py: the two stages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from autoencoder import train as autoencoder_train
from tests.helpers import ENVIRONMENT, TINY, assert_same_weights, command, fail, succeed, wait_for_epoch
from utils import run as run_module
from utils.files import InputError, acquire_lock, read_csv, read_json
from utils.helper import load_checkpoint

STAGES = {"reconstruction": "autoencoder/reconstruction", "segmentation": "autoencoder"}  # folder -> model name
EPOCHS = {"reconstruction": 3, "segmentation": 2}
DONE = 2  # epochs of each stage: the reconstruction stops early, because its --pretrain-min-delta is out of reach
SETTINGS = [*TINY, "--image-size", 36, "--epochs", EPOCHS["segmentation"], "--skips", "--patience", 1]


@pytest.fixture(scope="module")
def two_stages(prepared, tmp_path_factory) -> Path:
    """The run folder of a tiny autoencoder; 8 does not divide its image size."""
    out = tmp_path_factory.mktemp("runs") / "autoencoder"
    flags = ["--data", prepared, "--out", out, "--reconstruction-loss", "mse+0.5*ssim"]
    flags += ["--pretrain-epochs", EPOCHS["reconstruction"], "--pretrain-min-delta", 10]
    result = succeed("autoencoder/train.py", *flags, *SETTINGS)
    for stage, epochs in EPOCHS.items():
        assert f"{stage}: epoch {DONE}/{epochs}" in result.stderr, "the log says which stage it is"
    return out


def test_each_stage_is_a_run_folder(two_stages):
    for stage, epochs in EPOCHS.items():
        names = {path.name for path in (two_stages / stage).iterdir()}
        assert {"config.json", "split.json", "log.csv", "curves.png", "last.pt", "best.pt"} <= names
        config, log = read_json(two_stages / stage / "config.json"), read_csv(two_stages / stage / "log.csv")
        assert (config["epochs"], config["lr"], len(log)) == (epochs, 1e-3, DONE)
        assert ("val_iou_mean" in log[0]) == (stage == "segmentation")


def test_second_stage_leaves_the_encoder_unchanged(two_stages):
    first = load_checkpoint(two_stages / "reconstruction/best.pt", "autoencoder/reconstruction")["model"]
    encoder = {key: value for key, value in first.items() if key.startswith("encoder.")}
    assert any("running_var" in key for key in encoder)
    for file in ("best.pt", "last.pt"):
        second = load_checkpoint(two_stages / "segmentation" / file, "autoencoder")["model"]
        assert_same_weights(
            {"model": encoder}, {"model": {key: value for key, value in second.items() if key.startswith("encoder.")}}
        )


def test_second_stage_alone_ends_as_after_its_first(two_stages, prepared, tmp_path):
    first = two_stages / "reconstruction/best.pt"
    succeed("autoencoder/train.py", "--data", prepared, "--out", tmp_path, *SETTINGS, "--encoder", first)
    assert not (tmp_path / "reconstruction").exists()
    assert_same_weights(*(load_checkpoint(out / "segmentation/last.pt") for out in (two_stages, tmp_path)))


def test_scores_of_both_stages(two_stages, prepared, tmp_path):
    checkpoint = two_stages / "segmentation/best.pt"
    test = ["autoencoder/test.py", "--data", prepared, "--checkpoint", checkpoint, "--out", tmp_path, "--workers", 0]
    result = succeed(*test)
    assert {path.name for path in tmp_path.glob("[!.]*")} == {
        "metrics.json", "images.csv", "masks", "confusion.png", "predictions.png", "reconstruction.json",
        "reconstructions.png",
    }  # fmt: skip
    assert read_json(tmp_path / "metrics.json")["model"] == "autoencoder"
    means = read_json(tmp_path / "reconstruction.json")["mean"]
    assert set(means) == {"autoencoder", "mean image", "own mean color", "bilinear 4x4"}
    assert "PSNR (dB)" in result.stdout and "IoU" in result.stdout


def test_checkpoint_alone_is_enough_for_masks(two_stages, originals, tmp_path):
    path = shutil.copy(two_stages / "segmentation/best.pt", tmp_path / "best.pt")
    picture = next((originals / "images").iterdir())
    succeed("autoencoder/test.py", "--checkpoint", path, "--images", picture, "--out", tmp_path / "out")
    assert (tmp_path / f"out/{picture.stem}_mask.png").exists()


def test_untrained_encoder(prepared, tmp_path):
    succeed("autoencoder/train.py", "--data", prepared, "--out", tmp_path, *SETTINGS, "--encoder", "random")
    assert not (tmp_path / "reconstruction").exists()
    checkpoint = tmp_path / "segmentation/best.pt"
    test = ["autoencoder/test.py", "--data", prepared, "--checkpoint", checkpoint, "--workers", 0]
    assert "the encoder was never trained" in succeed(*test).stderr
    assert not (tmp_path / "segmentation/test/reconstruction.json").exists()


def test_errors_leave_the_runs_unchanged(two_stages, prepared, tmp_path):
    """Encoders that do not fit are in tests/unit/test_autoencoder.py."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in two_stages.rglob("*") if path.is_file()}

    before, train = files(), ["autoencoder/train.py", "--data", prepared, *TINY]
    first = two_stages / "reconstruction/best.pt"
    message = f"{first} holds an encoder of 2 base channels, expected 4: give --base-channels 2"
    fail(*train, "--out", tmp_path / "out", "--encoder", first, "--base-channels", 4, message=message)
    assert not (tmp_path / "out").exists()
    fail(*train, "--out", two_stages, message="holds another run (config.json)")
    for stage in STAGES:
        message = f"{two_stages / stage} is one stage of a run: give the whole run, --out {two_stages}"
        fail("autoencoder/train.py", "--out", two_stages / stage, "--resume", message=message)
    assert files() == before


def test_refused_training_leaves_the_settings_of_the_running_one(two_stages, monkeypatch):
    before = (two_stages / "config.json").read_bytes()
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0)
    monkeypatch.setattr("sys.argv", ["train.py", "--out", str(two_stages), "--resume", "--epochs", "77"])
    with (
        acquire_lock(two_stages / ".lock"),
        pytest.raises(InputError, match="another process is training into this folder"),
    ):
        autoencoder_train.main()
    assert (two_stages / "config.json").read_bytes() == before


def test_second_stage_resumes_without_its_first(two_stages, tmp_path):
    """--patience 0 must not let the reconstruction, which stopped early, continue under a head that depends on it."""
    out = shutil.copytree(two_stages, tmp_path / "run")
    resume = ["autoencoder/train.py", "--out", out, "--resume", "--patience", 0, "--epochs"]
    before = (out / "reconstruction/last.pt").read_bytes()
    succeed(*resume, 3)
    assert (out / "reconstruction/last.pt").read_bytes() == before
    assert load_checkpoint(out / "segmentation/last.pt", "autoencoder")["epoch"] == 3

    shutil.rmtree(out / "reconstruction")
    before = (out / "segmentation/last.pt").read_bytes()
    fail(*resume, 4, message=f"{out / 'reconstruction/best.pt'}, the encoder that it depends on, is missing")
    assert (out / "segmentation/last.pt").read_bytes() == before and not (out / "reconstruction").exists()


def test_kills_in_both_stages_do_not_change_the_run(prepared, tmp_path):
    """SIGKILL in the first stage, then in the second: the resumed run ends with the same weights."""
    epochs, whole, killed = 6, tmp_path / "whole", tmp_path / "killed"
    flags = ["--data", prepared, "--epochs", epochs, "--pretrain-epochs", epochs, "--patience", 0, *TINY]
    succeed("autoencoder/train.py", "--out", whole, *flags)
    for stage, name in STAGES.items():
        resume = ["--resume"] if killed.exists() else []
        line = command("autoencoder/train.py", "--out", killed, *flags, *resume)
        with subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            wait_for_epoch(process, killed / stage)
            process.kill()
        assert load_checkpoint(killed / stage / "last.pt", name)["epoch"] < epochs
    final = succeed("autoencoder/train.py", "--out", killed, "--resume")
    assert "reconstruction: epoch" not in final.stderr, "the first stage is over"
    for stage, name in STAGES.items():
        for file in ("best.pt", "last.pt"):
            assert_same_weights(*(load_checkpoint(out / stage / file, name) for out in (whole, killed)))
