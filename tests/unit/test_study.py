"""study/run.py: what is run in which order, what is not run again, and a study that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from study import run as study
from tests.conftest import ROOT, TINY, run
from utils.files import InputError, write_json
from utils.helper import load_checkpoint


@pytest.fixture
def commands(monkeypatch, tmp_path) -> list[list[str]]:
    """The commands that the study starts; instead of running, each leaves the files that say it is finished."""
    started = []

    def pretend(command, close_fds):
        started.append([str(Path(command[1]).relative_to(ROOT)), *command[2:]])
        flags = dict(zip(command[2::2], command[3::2]))
        if command[1].endswith("dataset_prep.py"):
            counts = {"TrainVal": {"cats": 4, "dogs": 8}, "Test": {"cats": 4, "dogs": 8}}
            write_json(Path(command[2]) / "prep_report.json", {"counts": counts})
        elif command[1].endswith("train.py"):
            write_json(Path(flags["--out"]) / "config.json", {})
        elif command[1].endswith("test.py"):
            write_json(Path(flags["--checkpoint"]).parent / "test" / "metrics.json", {})
            write_json(Path(flags["--checkpoint"]).parent / "test" / "robustness.json", {})
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", pretend)
    return started


def start(monkeypatch, out: Path, *flags: object) -> None:
    monkeypatch.setattr("sys.argv", ["study.py", "--out", str(out), "--data", str(out / "data"), *map(str, flags)])
    study.main()


def of(commands: list[list[str]], script: str, run_name: str) -> dict[str, str]:
    """Flags of the one `script` of a run."""
    (command,) = [c for c in commands if c[0].endswith(script) and any(f"/{run_name}" in part for part in c[1:3])]
    return dict(zip(command[1::2], command[2::2]))


def test_everything_in_order(monkeypatch, commands, tmp_path, capsys):
    start(monkeypatch, tmp_path, "--seeds", 2, "--epochs", 7, "--clip-random-init", "--base-channels", 8)
    scripts = [command[0] for command in commands]
    assert scripts[:2] == ["dataset/dataset_prep.py", "dataset/exploration.py"] and scripts[-1] == "study/report.py"
    models = [model for model, _ in study.KINDS.values()] * 2
    assert scripts[2:-1] == [f"{model}/{script}" for model in models for script in ("train.py", "test.py")]
    assert all("--perturb" in command for command in commands if command[0].endswith("test.py"))
    assert len([part for part in commands[-1] if "/seed" in part]) == 2 * len(study.KINDS)

    heatmap, disk = (of(commands, "train.py", f"seed1/point-{kind}") for kind in ("heatmap", "disk"))
    assert heatmap["--clip-seg"] == str(tmp_path / "seed1/clip/best.pt") and "--base-channels" not in heatmap
    assert disk["--clip-seg"] == str(tmp_path / "seed1/clip-skips/best.pt") and disk["--base-channels"] == "8"
    second = of(commands, "train.py", "seed0/autoencoder-skips")
    assert second["--encoder"] == str(tmp_path / "seed0/autoencoder/reconstruction/best.pt")
    said = capsys.readouterr().out
    assert "study of 14 runs, 14 not finished: each at most 7 epochs on 12 images" in said
    assert "then 12 test images, each answered 128 times" in said and "seed1/point-disk: ahead" in said


def test_a_model_alone_starts_from_nothing(monkeypatch, commands, tmp_path):
    start(monkeypatch, tmp_path, "--models", "point-disk", "--clip-random-init", "--no-perturb")
    assert "--clip-seg" not in of(commands, "train.py", "seed0/point-disk")
    assert not any("--perturb" in command for command in commands)


def test_what_is_finished_is_kept_and_what_was_stopped_goes_on(monkeypatch, commands, tmp_path, capsys):
    start(monkeypatch, tmp_path, "--models", "unet", "clip", "--clip-random-init")
    commands.clear()
    (tmp_path / "seed0/clip/test/robustness.json").unlink()
    start(monkeypatch, tmp_path, "--models", "unet", "clip", "--clip-random-init", "--workers", 3)
    assert "study of 2 runs, 1 not finished" in capsys.readouterr().out
    trained, scored = commands[2:-1]
    assert trained[0] == "clip_seg/train.py" and trained[-1] == "--resume" and scored[0] == "clip_seg/test.py"


def test_what_cannot_work_is_said_at_the_start(monkeypatch, commands, tmp_path, clip_folder):
    with pytest.raises(InputError, match="--models resnet: there are unet, autoencoder,"):
        start(monkeypatch, tmp_path, "--models", "resnet", "unet")
    assert commands == []
    with pytest.raises(InputError, match=r"no CLIP weights for --clip-model .*nowhere"):
        start(monkeypatch, tmp_path, "--models", "unet", "clip", "--clip-model", tmp_path / "nowhere")
    assert not any("train.py" in command[0] for command in commands), "before hours of other work"
    # What failed left no settings.
    start(monkeypatch, tmp_path, "--models", "unet", "clip", "--clip-model", clip_folder)
    with pytest.raises(InputError, match=r"holds a study with other settings(.|\n)*--epochs was 50, is 3"):
        start(monkeypatch, tmp_path, "--models", "unet", "--clip-model", clip_folder, "--epochs", 3)


def test_two_do_not_work_on_one_study(monkeypatch, commands, tmp_path):
    """Not even when the first was killed and a script of it lives on: it has the lock."""
    first = study.open_study(study.Config(out=tmp_path))
    monkeypatch.setattr(study, "LOCK_SECONDS", 0)
    with pytest.raises(InputError, match="this study is being made by another process"):
        start(monkeypatch, tmp_path, "--models", "unet")
    assert os.get_inheritable(first.fileno())
    first.close()
    start(monkeypatch, tmp_path, "--models", "unet")


def test_a_failing_run_ends_the_study(tmp_path):
    result = run("study/run.py", "--data", tmp_path / "none", "--out", tmp_path / "out", "--models", "unet")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "dataset/dataset_prep.py failed: mend what it says above" in result.stderr


def test_killed_twice_it_ends_the_same(tmp_path):
    """Once in training and once in testing, all of its processes at once; then as if it had never been."""
    data, killed = tmp_path / "data", tmp_path / "killed"
    flags = ["--data", data, "--epochs", 3, "--patience", 0, *TINY]
    flags_of_study = ["--synthetic", 24, "--models", "unet", "--out", killed, "--no-perturb", *flags]
    command = [sys.executable, ROOT / "study/run.py", *flags_of_study]
    for sign in ("best.pt", "test"):
        with subprocess.Popen(
            list(map(str, command)), start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            while not (killed / "seed0/unet" / sign).exists():
                assert process.poll() is None, "it ended before it could be killed"
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGKILL)
    result = run("study/run.py", *flags_of_study)
    assert result.returncode == 0, result.stderr
    assert "study of 1 runs, 1 not finished" in result.stdout and "seed0/unet: begun" in result.stdout
    assert (killed / "report/report.md").exists() and (killed / "exploration/summary.json").exists()
    assert json.loads((killed / "seed0/unet/test/metrics.json").read_text())["images"] == 12

    whole = run("unet/train.py", "--out", tmp_path / "whole", "--seed", 0, *flags)
    assert whole.returncode == 0, whole.stderr
    one, two = (load_checkpoint(out / "best.pt", "unet") for out in (killed / "seed0/unet", tmp_path / "whole"))
    assert one["epoch"] == two["epoch"]
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in two["model"])
