"""unet/train.py and unet/test.py in this process: from the flags to the results, and what they refuse."""

from __future__ import annotations

import json
import sys

import pytest

from tests.helpers import TINY, save_model
from unet import test as unet_test
from unet import train as unet_train
from unet.model import UNet
from utils.files import InputError
from utils.helper import load_checkpoint


@pytest.fixture
def run_main(monkeypatch):
    """Calls a script's main with flags."""

    def call(script, *flags: object) -> None:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
        script.main()

    return call


def test_flags_reach_the_run_and_the_scores(run_main, prepared, tmp_path):
    flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 1, *TINY, "--loss", "cross-entropy+0.5*dice"]
    run_main(unet_train, *flags, "--precision", "bf16", "--threads", 1)
    checkpoint = load_checkpoint(tmp_path / "run/best.pt", "unet")
    assert checkpoint["model_args"].items() >= {"num_classes": 3, "base_channels": 2}.items()
    assert checkpoint["config"]["loss"] == "cross-entropy+0.5*dice" and checkpoint["config"]["batch_size"] == 4
    environment = json.loads((tmp_path / "run/config.json").read_text())["environment"]
    assert (environment["precision"], environment["threads"], environment["processes"]) == ("bf16", 1, 1)
    flags = ["--data", prepared, "--checkpoint", tmp_path / "run/best.pt", "--workers", 0, "--device", "cpu"]
    run_main(unet_test, *flags)
    metrics = json.loads((tmp_path / "run/test/metrics.json").read_text())
    assert metrics["environment"]["precision"] == "fp32", "the same scores on every machine"
    assert metrics["model"] == "unet" and metrics["images"] == len(list((prepared / "Test/color").rglob("*.jpg")))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{tmp}"], "is not prepared. Run: python dataset/dataset_prep.py"),
        (["--data", "{data}", "--batch-size", "500"], "fewer than a batch of 500: use --batch-size 14"),
        (["--data", "{data}", "--precision", "fp16"], "fp16 needs a GPU"),
        (["--data", "{data}", "--micro-batch-size", "auto"], "--micro-batch-size auto needs a GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_that_cannot_start_leaves_no_folder(run_main, prepared, tmp_path, flags, message):
    """A folder would be in the way of the next try."""
    flags = [flag.format(tmp=tmp_path, data=prepared) for flag in flags]
    with pytest.raises(InputError) as error:
        run_main(unet_train, "--out", tmp_path / "out", *TINY, *flags)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_missing_and_truncated_checkpoints_are_named(run_main, prepared, tmp_path):
    path = save_model(tmp_path / "cut.pt", UNet(base_channels=2), "unet", {"base_channels": 2})
    path.write_bytes(path.read_bytes()[:5000])
    for name, message in [("none.pt", "none.pt: no such checkpoint"), ("cut.pt", "cut.pt is truncated")]:
        with pytest.raises(InputError, match=message):
            run_main(unet_test, "--data", prepared, "--checkpoint", tmp_path / name, "--device", "cpu")
