"""utils/config.py: flags are the fields of a dataclass; a script's errors and exit codes."""

import argparse
import logging
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from tests.helpers import ROOT
from unet.train import Config as UNetConfig
from utils.config import (
    REMOVED_FLAGS,
    RESUMABLE,
    TrainConfig,
    as_plain_dict,
    flag_name,
    parse,
    restore_fields,
    weighted_sum,
)
from utils.config import TestConfig as ScoreConfig
from utils.files import InputError, write_json
from utils.loss import LOSSES
from utils.script import Terminated, run_script


def test_defaults_are_the_report_recipe():
    config = parse(TrainConfig, "doc", [])
    assert (config.batch_size, config.epochs, config.lr, config.loss) == (64, 50, 1e-4, "cross-entropy")
    assert (config.boundary, config.patience, config.min_delta, config.image_size) == ("background", 3, 1e-3, 256)
    assert config.micro_batch_size is None and config.schedule == "constant"


def test_values_have_the_types_of_the_fields():
    flags = ("--data", "x", "--epochs", "3", "--lr", "1e-2", "--compile", "--limit", "9", "--micro-batch-size", "4")
    config = parse(TrainConfig, "doc", flags)
    assert (config.data, config.epochs, config.lr, config.compile, config.limit) == (Path("x"), 3, 0.01, True, 9)
    assert config.micro_batch_size == 4
    assert parse(TrainConfig, "doc", ["--micro-batch-size", "auto"]).micro_batch_size == "auto"
    assert parse(ScoreConfig, "doc", ["--score-size", "256"]).score_size == 256
    assert parse(ScoreConfig, "doc", ["--images", "a", "~/b"]).images == [Path("a"), Path.home() / "b"]
    assert parse(ScoreConfig, "doc", []).score_size == "native"
    for loss in (*LOSSES, "cross-entropy+0.5*dice", "2*dice"):
        assert parse(TrainConfig, "doc", ["--loss", loss]).loss == loss


BAD = (
    "--epochs 0, --epochs two, --batch-size -1, --lr nan, --lr -1, --loss hinge, --loss 0*dice, --val-fraction 1, "
    "--val-fraction 0, --device tpu, --seed -1, --epoch 3, extra, --image-size 16, --lr inf, --seed 4294967296, "
    "--micro-batch-size some, --micro-batch-size 0, --ema 1.5, --warmup -1, --loss dice+dice, --paste 2, "
    "--augment all, --boundary void, --warmup 50"
)


BAD_FLAGS = [(TrainConfig, text, text.split()[0]) for text in BAD.split(", ")]
BAD_FLAGS += [(ScoreConfig, "--images a --perturb", "--perturb is for scoring a split")]
REMOVED = [flag for name in REMOVED_FLAGS for flag in (f"{name} 2", f"{name}=2")]
BAD_FLAGS += [
    (TrainConfig, flag, r"(?s)no longer exists.*use --micro-batch-size")
    for flag in (*REMOVED, "--batch-size auto", "--batch-size=auto")
]


@pytest.mark.parametrize(("config", "arguments", "message"), BAD_FLAGS)
def test_bad_flags_end_with_code_2(config, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(config, "doc", arguments.split())
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)


def test_a_recipe_is_a_set_of_defaults(tmp_path):
    report, strong = (parse(UNetConfig, "doc", ["--recipe", name]) for name in ("report", "strong"))
    assert report == UNetConfig(), "the defaults are the report's"
    assert (strong.lr, strong.boundary, strong.optimizer) == (1e-3, "ignore", "adamw")
    given = parse(UNetConfig, "doc", ["--recipe", "strong", "--loss", "focal"])
    assert given.loss == "focal" and given.boundary == "ignore", "a flag that is given wins"
    write_json(tmp_path / "config.json", as_plain_dict(given) | {"out": str(tmp_path)})
    resume = ["--out", str(tmp_path), "--resume"]
    assert parse(UNetConfig, "doc", resume).loss == "focal"
    with pytest.raises(InputError, match="--recipe is strong in the run, got report"):
        parse(UNetConfig, "doc", [*resume, "--recipe", "report"])


def test_help_shows_both_recipes(capsys):
    with pytest.raises(SystemExit):
        parse(UNetConfig, "doc", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: adam; with --recipe strong: adamw)" in text


def test_config_survives_json(tmp_path):
    config = parse(TrainConfig, "doc", ["--data", "somewhere", "--limit", "8"])
    write_json(tmp_path / "config.json", as_plain_dict(config))
    assert restore_fields(TrainConfig, as_plain_dict(config), source=tmp_path) == vars(config)


def test_resume_takes_the_settings_of_the_run(tmp_path):
    write_json(tmp_path / "config.json", as_plain_dict(TrainConfig(out=tmp_path, lr=0.5, epochs=3)))
    resume = ["--out", str(tmp_path), "--resume"]
    config = parse(TrainConfig, "doc", [*resume, "--epochs", "7", "--micro-batch-size", "2"])
    assert (config.lr, config.epochs, config.micro_batch_size, config.resume) == (0.5, 7, 2, True)
    assert parse(TrainConfig, "doc", [*resume, "--lr", "0.5"]).lr == 0.5
    with pytest.raises(InputError, match=r"--lr is 0\.5 in the run, got 0\.25"):
        parse(TrainConfig, "doc", [*resume, "--lr", "0.25"])
    with pytest.raises(InputError, match="--batch-size is 64 in the run, got 2"):
        parse(TrainConfig, "doc", [*resume, "--batch-size", "2"])
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert parse(TrainConfig, "doc", ["--out", str(moved), "--resume"]).out == moved
    config = parse(TrainConfig, "doc", ["--out", str(tmp_path / "none"), "--resume", "--lr", "0.25"])
    assert config.resume and config.lr == 0.25, "nothing was saved yet: a scheduler can always give --resume"

    assert {field.name for field in fields(TrainConfig)} >= RESUMABLE


def test_run_of_an_earlier_version_or_another_model_cannot_be_resumed(tmp_path):
    """The --batch-size of the earlier version was that of one process, and --accumulate multiplied it."""
    saved, resume = as_plain_dict(TrainConfig(out=tmp_path)), ["--out", str(tmp_path), "--resume"]
    write_json(tmp_path / "config.json", saved | {"accumulate": 2})
    with pytest.raises(InputError, match=r"config\.json is of an earlier version.*start a new run") as error:
        parse(TrainConfig, "doc", resume)
    assert "\n" not in str(error.value)
    write_json(tmp_path / "config.json", saved)
    with pytest.raises(InputError, match=r"belongs to another model or version \(no .*base_channels"):
        parse(UNetConfig, "doc", resume)


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(UNetConfig, "The doc.", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "The doc." in text
    missing = [field.name for field in fields(UNetConfig) if flag_name(field.name) not in text]
    assert not missing, missing


HELP_OF_ALL = """
import contextlib, io, runpy, sys

for name in ("torch", "albumentations", "matplotlib", "accelerate", "cv2", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        assert stop.code in (0, None), (script, stop.code)
    assert "--help" in text.getvalue(), script
"""


def test_help_needs_no_heavy_import():
    """Importing torch, albumentations or matplotlib takes seconds."""
    paths = [*ROOT.glob("*.py"), *(path for path in ROOT.glob("*/*.py") if path.parent.name != "benchmarks")]
    scripts = [path.relative_to(ROOT) for path in paths if "run_script(main)" in path.read_text(encoding="utf-8")]
    assert Path("unet/train.py") in scripts
    line = [sys.executable, "-c", HELP_OF_ALL, *map(str, scripts)]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_weighted_sum():
    names = ("mse", "ssim", "edge")
    assert weighted_sum("ssim", names) == {"ssim": 1.0}
    assert weighted_sum("mse+0.5*ssim+.25*edge", names) == {"mse": 1.0, "ssim": 0.5, "edge": 0.25}

    for text in ("", "l1", "mse+", "mse+mse", "0*mse", "-1*mse", "x*mse", "mse*2", "nan*mse", "mse ssim"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"expected one of mse, ssim, or a weighted sum"):
            weighted_sum(text, ("mse", "ssim"))


KILLED_WORKER = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("no such folder"), "error: no such folder", ""),
        (FileNotFoundError(2, "No such file", "here.csv"), "error: [Errno 2] No such file: 'here.csv'", ""),
        (KeyboardInterrupt(), 130, "stopped"),
        (Terminated(), 143, "terminated"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. "), 143, ""),
        (KILLED_WORKER, f"error: a worker that loads images was killed ({KILLED_WORKER}). Is memory short? "
         "Use fewer --workers", ""),
        (None, None, ""),
    ],
    ids=repr,
)  # fmt: skip
def test_exit_codes(error, code, message, monkeypatch, capsys):
    """sys.exit prints a text to stderr and ends with code 1."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)

    def main():
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert stop.value.code == code
    assert capsys.readouterr().err.strip() == message


def test_other_errors_keep_their_traceback_and_sigterm_ends_a_script_as_ctrl_c_does(monkeypatch):
    def broken():
        raise RuntimeError("size mismatch")

    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_script(broken)
    with pytest.raises(SystemExit) as stop:
        run_script(lambda: handlers[signal.SIGTERM](signal.SIGTERM, None))
    assert stop.value.code == 128 + signal.SIGTERM and issubclass(Terminated, KeyboardInterrupt)
