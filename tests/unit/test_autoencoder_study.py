"""autoencoder/study.py: what is run, what is not run again, and the table."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoencoder import study
from tests.conftest import run
from utils.files import InputError, write_json


def scores(mean: float) -> dict:
    iou = {"background": 0.7, "cat": 0.2, "dog": 0.1, "mean": mean}
    return {
        "iou": iou, "dice": iou, "accuracy": iou, "pixel_accuracy": 0.8, "baseline": {"iou": iou}, "epoch": 3,
        "images": 12,
    }  # fmt: skip


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """The commands that the study starts; instead of running, train.py leaves a config and test.py the scores."""
    started = []

    def pretend(command, close_fds):
        started.append(command[1:])
        flags = dict(zip(command[2::2], command[3::2]))
        if command[1].endswith("train.py"):
            write_json(Path(flags["--out"]) / "config.json", {})
        else:
            test = Path(flags["--checkpoint"]).parent / "test"
            write_json(test / "metrics.json", scores(0.4))
            if "unet" not in str(test) and "random" not in str(test):
                write_json(test / "reconstruction.json", {"mean": {"autoencoder": {"psnr": 20.0, "ssim": 0.5}}})
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", pretend)
    return started


def start(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr("sys.argv", ["study.py", *map(str, flags)])
    study.main()


def test_every_run_is_made_once_and_encoders_are_shared(monkeypatch, commands, tmp_path, capsys):
    start(monkeypatch, "--data", "D", "--out", tmp_path, "--seeds", 2, "--epochs", 7)
    training = [command for command in commands if command[0].endswith("train.py")]
    assert len(training) == 2 * 9 and len(commands) == 2 * 2 * 9
    pretrained = [command for command in training if "--pretrain-epochs" in command]
    assert [command[command.index("--reconstruction-loss") + 1] for command in pretrained] == [
        "mse",
        "ssim",
        "edge",
    ] * 2
    reused = [command[command.index("--encoder") + 1] for command in training if "--encoder" in command]
    assert reused.count("random") == 4
    assert {str(tmp_path / f"seed1/{name}/reconstruction/best.pt") for name in ("mse", "ssim", "edge")} <= set(reused)
    for command in training:
        assert command[command.index("--epochs") + 1] == "7" and command[command.index("--patience") + 1] == "0"
    table = capsys.readouterr().out
    assert "| mse | skips | 40.0 ± 0.0 | +0.0 ± 0.0 |" in table and "| 20.0 ± 0.0 | 0.500 ± 0.000 |" in table


def test_what_is_finished_is_kept_and_what_was_stopped_goes_on(monkeypatch, commands, tmp_path):
    start(monkeypatch, "--out", tmp_path, "--seeds", 2)
    commands.clear()
    start(monkeypatch, "--out", tmp_path, "--seeds", 2)
    assert commands == []
    (tmp_path / "seed1/unet/test/metrics.json").unlink()
    start(monkeypatch, "--out", tmp_path, "--seeds", 2)
    assert len(commands) == 2 and commands[0][-1] == "--resume"


def test_other_settings_are_another_study(monkeypatch, commands, tmp_path):
    start(monkeypatch, "--out", tmp_path, "--seeds", 2)
    with pytest.raises(InputError, match="holds a study with other settings"):
        start(monkeypatch, "--out", tmp_path, "--seeds", 2, "--epochs", 3)


def test_spread_and_paired_gain():
    runs = [
        {"name": name, **scores(mean)}
        for name, mean in [("random", 0.30), ("mse", 0.42), ("random", 0.32), ("mse", 0.40)]
    ]
    table = study.format_table(runs)
    assert "| random | report's | 31.0 ± 1.4 |  |" in table
    assert "| mse | report's | 41.0 ± 1.4 | +10.0 ± 2.8 |" in table  # gains of 12 and 8: paired by seed


def test_a_failing_run_ends_the_study(tmp_path):
    result = run("autoencoder/study.py", "--data", tmp_path / "none", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "is not prepared" in result.stderr and "start the study again" in result.stderr
    assert "Traceback" not in result.stderr
