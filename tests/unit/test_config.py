"""utils/config.py: flags are the fields of a dataclass."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from tests.conftest import run
from utils.config import TestConfig as ScoreConfig
from utils.config import TrainConfig, from_json, parse, to_json, weighted_terms
from utils.files import InputError, write_json


def test_defaults_are_the_report_recipe():
    config = parse(TrainConfig, "doc", [])
    assert (config.batch_size, config.epochs, config.lr, config.loss) == (64, 50, 1e-4, "cross-entropy")
    assert (config.boundary, config.patience, config.min_delta, config.image_size) == ("background", 3, 1e-3, 256)


def test_values_and_types():
    config = parse(TrainConfig, "doc", ["--data", "x", "--epochs", "3", "--lr", "1e-2", "--compile", "--limit", "9"])
    assert (config.data, config.epochs, config.lr, config.compile, config.limit) == (Path("x"), 3, 0.01, True, 9)
    config = parse(ScoreConfig, "doc", ["--score-size", "256", "--images", "a", "b"])
    assert config.score_size == 256 and config.images == [Path("a"), Path("b")]
    assert parse(ScoreConfig, "doc", []).score_size == "native"


BAD = (
    "--epochs 0, --epochs two, --batch-size -1, --lr nan, --lr -1, --loss hinge, --val-fraction 1, --val-fraction 0, "
    "--device tpu, --seed -1, --epoch 3, extra, --image-size 16, --lr inf, --seed 4294967296"
)


@pytest.mark.parametrize("arguments", [text.split() for text in BAD.split(", ")])
def test_bad_values_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, "doc", arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_json_round_trip(tmp_path):
    config = parse(TrainConfig, "doc", ["--data", "somewhere", "--limit", "8"])
    assert from_json(TrainConfig, to_json(config), source=tmp_path) == {
        field.name: getattr(config, field.name) for field in fields(TrainConfig)
    }


def test_resume_takes_the_settings_of_the_run(tmp_path):
    write_json(tmp_path / "config.json", to_json(TrainConfig(out=tmp_path, lr=0.5, epochs=3)))
    config = parse(TrainConfig, "doc", ["--out", str(tmp_path), "--resume", "--epochs", "7"])
    assert (config.lr, config.epochs, config.resume) == (0.5, 7, True)
    assert parse(TrainConfig, "doc", ["--out", str(tmp_path), "--resume", "--lr", "0.5"]).lr == 0.5
    with pytest.raises(InputError, match=r"--lr is 0\.5 in the run, got 0\.25"):
        parse(TrainConfig, "doc", ["--out", str(tmp_path), "--resume", "--lr", "0.25"])
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert parse(TrainConfig, "doc", ["--out", str(moved), "--resume"]).out == moved
    with pytest.raises(InputError, match="holds no run"):
        parse(TrainConfig, "doc", ["--out", str(tmp_path / "none"), "--resume"])


@pytest.mark.parametrize("script", ["unet/train.py", "unet/test.py", "dataset/dataset_prep.py"])
def test_help_needs_no_heavy_import(script):
    """What makes --help slow is importing torch, albumentations or matplotlib, so that is what is tested."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}', '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        "heavy = {'torch', 'albumentations', 'matplotlib', 'accelerate', 'cv2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    import subprocess
    import sys

    from tests.conftest import ROOT

    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_help_lists_every_flag():
    text = run("unet/train.py", "--help").stdout
    for field in fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "--base-channels" in text


def test_weighted_terms():
    names = ("mse", "ssim", "edge")
    assert weighted_terms("ssim", names) == {"ssim": 1.0}
    assert weighted_terms("mse+0.5*ssim+.25*edge", names) == {"mse": 1.0, "ssim": 0.5, "edge": 0.25}


@pytest.mark.parametrize(
    "text", ["", "l1", "mse+", "mse+mse", "0*mse", "-1*mse", "x*mse", "mse*2", "nan*mse", "mse ssim"]
)
def test_weighted_terms_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected one of mse, ssim, or a weighted sum"):
        weighted_terms(text, ("mse", "ssim"))
