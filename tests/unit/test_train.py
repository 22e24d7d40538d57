"""utils/train.py: early stopping, log, fit, resume."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dataset.pet import make_train_loaders
from tests.conftest import ROOT, TINY, run
from unet.model import UNet
from utils.config import TrainConfig
from utils.dataset import CLASSES
from utils.files import InputError
from utils.helper import describe_environment, load_checkpoint
from utils.loss import SegmentationLoss, cross_entropy
from utils.metric import validate
from utils.train import EarlyStopping, StepOutput, TrainingLog, fit, make_accelerator

MODEL_ARGS = {"num_classes": 3, "base_channels": 2}


def segmentation_step(model, batch):
    logits = model(batch["image"])
    return StepOutput(cross_entropy(logits, batch["mask"]), logits, batch["mask"])


def train(data: Path, out: Path, *, step=segmentation_step, model: nn.Module | None = None, **settings) -> dict:
    """Train a tiny U-Net in this process; returns last.pt."""
    defaults = {"image_size": 32, "batch_size": 4, "workers": 0, "device": "cpu", "val_fraction": 0.25, "lr": 1e-3}
    config = TrainConfig(data=data, out=out, **{**defaults, **settings})
    accelerator = make_accelerator(config)
    train_loader, val_loader, split = make_train_loaders(config)
    fit(
        model or UNet(**MODEL_ARGS), step, train_loader, val_loader, config,
        accelerator=accelerator, model_name="unet", model_args=MODEL_ARGS, split=split,
    )  # fmt: skip
    return load_checkpoint(out / "last.pt", "unet")


def assert_same_weights(first: dict, second: dict) -> None:
    assert first["model"].keys() == second["model"].keys()
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key


def test_early_stopping():
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    for loss, stop in [(1.0, False), (0.95, False), (0.85, False), (0.84, False), (0.80, True)]:
        stopping.update(loss)
        assert stopping.should_stop == stop, loss
    never = EarlyStopping(patience=0, min_delta=0)
    for _ in range(10):
        never.update(1.0)
    assert not never.should_stop


def test_early_stopping_takes_a_difference_of_exactly_min_delta():
    stopping = EarlyStopping(patience=1, min_delta=0.5)
    stopping.update(1.0)
    stopping.update(0.5)
    assert stopping.best == 0.5 and not stopping.should_stop


def test_log_goes_on_where_it_was(tmp_path):
    first = TrainingLog(tmp_path)
    first.add({"epoch": 1, "val_loss": 0.5})
    first.add({"epoch": 2, "val_loss": 0.4})
    again = TrainingLog(tmp_path, first.rows[:1])  # epoch 2 was logged, but its checkpoint was not written
    again.add({"epoch": 2, "val_loss": 0.3})
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert rows == [{"epoch": "1", "val_loss": "0.5"}, {"epoch": "2", "val_loss": "0.3"}]


def test_a_run_is_a_folder(trained):
    assert {path.name for path in trained.iterdir() if "tfevents" not in path.name} == {
        "config.json", "split.json", "log.csv", "curves.png", "last.pt", "best.pt"
    }  # fmt: skip
    assert any("tfevents" in path.name for path in trained.iterdir())
    rows = list(csv.DictReader((trained / "log.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("train_loss", "val_loss", "val_iou_mean"))
    best = torch.load(trained / "best.pt", weights_only=True)
    lowest = min(rows, key=lambda row: float(row["val_loss"]))
    assert best["epoch"] == int(lowest["epoch"]) and best["scores"]["val_loss"] == float(lowest["val_loss"])
    config = json.loads((trained / "config.json").read_text())
    assert config["base_channels"] == 2 and config["model_args"] == {"num_classes": 3, "base_channels": 2}
    assert config["environment"]["torch"] == torch.__version__


def test_resumed_is_uninterrupted_bit_for_bit(prepared, tmp_path):
    whole = train(prepared, tmp_path / "whole", epochs=4, patience=0)
    train(prepared, tmp_path / "parts", epochs=2, patience=0)
    torch.manual_seed(99)
    parts = train(prepared, tmp_path / "parts", epochs=4, patience=0, resume=True)
    assert_same_weights(whole, parts)
    assert parts["stopping"] == whole["stopping"] and parts["best_loss"] == whole["best_loss"]
    losses = [[(row["epoch"], row["train_loss"], row["val_loss"]) for row in run["log"]] for run in (whole, parts)]
    assert losses[0] == losses[1]
    for moment in ("exp_avg", "exp_avg_sq"):
        for state, same in zip(whole["optimizer"]["state"].values(), parts["optimizer"]["state"].values()):
            assert torch.equal(state[moment], same[moment])


def test_the_random_stream_goes_on_too(prepared, tmp_path):
    class Dropout(nn.Sequential):
        def __init__(self):
            super().__init__(UNet(**MODEL_ARGS), nn.Dropout2d(0.3))

    torch.manual_seed(1)
    whole = train(prepared, tmp_path / "whole", model=Dropout(), epochs=3, patience=0)
    torch.manual_seed(1)
    train(prepared, tmp_path / "parts", model=Dropout(), epochs=1, patience=0)
    assert_same_weights(
        whole, train(prepared, tmp_path / "parts", model=Dropout(), epochs=3, patience=0, resume=True, workers=2)
    )


def test_workers_do_not_change_the_run(prepared, tmp_path):
    runs = [train(prepared, tmp_path / str(workers), workers=workers, epochs=2, patience=0) for workers in (0, 1, 2)]
    assert_same_weights(runs[0], runs[1])
    assert_same_weights(runs[0], runs[2])


def test_ten_kills_do_not_change_the_run(prepared, tmp_path):
    """SIGKILL at random moments: what is on disk always loads, and the resumed run ends with the same weights."""
    arguments = ["--data", prepared, "--epochs", 40, "--patience", 0, *TINY]
    began = time.perf_counter()
    assert run("unet/train.py", "--out", tmp_path / "whole", *arguments).returncode == 0
    seconds = time.perf_counter() - began

    out, chance, epochs = tmp_path / "killed", random.Random(0), []
    for attempt in range(10):
        command = [sys.executable, ROOT / "unet/train.py", "--out", out, *arguments]
        command += ["--resume"] if (out / "config.json").exists() else []
        before = saved_at(out)
        process = subprocess.Popen(
            list(map(str, command)),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if attempt % 2:  # somewhere in the epochs
            while process.poll() is None and saved_at(out) == before:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
        else:  # anywhere, while it imports and sets up, too
            time.sleep(chance.uniform(0, seconds))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for file in ("last.pt", "best.pt"):
            if (out / file).exists():
                epochs.append(load_checkpoint(out / file, "unet")["epoch"])
    assert max(epochs) > 0

    final = run("unet/train.py", "--out", out, "--resume")
    assert final.returncode == 0, final.stderr
    for file in ("last.pt", "best.pt"):
        whole, killed = (load_checkpoint(folder / file, "unet") for folder in (tmp_path / "whole", out))
        assert whole["epoch"] == killed["epoch"]
        assert_same_weights(whole, killed)
    assert [row["epoch"] for row in csv.DictReader((out / "log.csv").open())] == [str(epoch) for epoch in range(1, 41)]
    assert not list(out.glob(".*.tmp")), "what the kills left behind is swept up"


def saved_at(out: Path) -> int:
    return (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0


def test_ctrl_c_leaves_a_run_that_resumes(prepared, tmp_path):
    steps = []

    def interrupted(model, batch):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return segmentation_step(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(prepared, tmp_path / "run", step=interrupted, epochs=2)
    assert load_checkpoint(tmp_path / "run/last.pt", "unet")["epoch"] == 0
    assert_same_weights(
        train(prepared, tmp_path / "run", epochs=2, resume=True), train(prepared, tmp_path / "whole", epochs=2)
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(prepared, tmp_path, bad):
    steps = []

    def diverging(model, batch):
        steps.append(1)
        output = segmentation_step(model, batch)
        return output._replace(loss=output.loss * bad) if len(steps) > 6 else output

    with pytest.raises(InputError, match=r"loss .* is (nan|inf).*last\.pt holds the last good epoch.*lower --lr"):
        train(prepared, tmp_path, step=diverging, epochs=5, val_fraction=0.1)
    last = load_checkpoint(tmp_path / "last.pt", "unet")
    assert last["epoch"] == 1 and all(torch.isfinite(value).all() for value in last["model"].values())


def test_early_stopping_ends_the_run_and_resume_keeps_it_ended(prepared, tmp_path):
    last = train(prepared, tmp_path, epochs=9, patience=2, min_delta=100)
    assert last["epoch"] == 3, "the first epoch is the best, two more are no better"
    assert train(prepared, tmp_path, epochs=9, patience=2, min_delta=100, resume=True)["epoch"] == 3


def test_validation_loss_is_over_the_whole_set(prepared):
    """A last batch that is smaller must not weigh as much as the others."""
    model, criterion = UNet(**MODEL_ARGS), SegmentationLoss("cross-entropy", "background")

    def step(model, batch):
        return StepOutput(criterion(model(batch["image"]), batch["mask"]))

    losses = []
    for batch_size in (1, 4, 6):  # 6 validation images
        config = TrainConfig(data=prepared, image_size=32, batch_size=batch_size, workers=0, val_fraction=0.5)
        _, loader, _ = make_train_loaders(config)
        losses.append(validate(model, step, loader, torch.device("cpu"), CLASSES)[0])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_frozen_parameters_are_not_in_the_optimizer(prepared, tmp_path):
    model = UNet(**MODEL_ARGS)
    for parameter in model.encoder.parameters():
        parameter.requires_grad_(False)
    last = train(prepared, tmp_path, model=model, epochs=1)
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(last["optimizer"]["param_groups"][0]["params"]) == trainable


def test_out_that_holds_another_run_is_refused(prepared, trained):
    before = (trained / "last.pt").read_bytes()
    result = run("unet/train.py", "--data", prepared, "--out", trained, *TINY)
    assert result.returncode == 1 and "holds another run" in result.stderr and "Traceback" not in result.stderr
    assert (trained / "last.pt").read_bytes() == before


def test_resume_from_a_copy_of_best(prepared, tmp_path):
    train(prepared, tmp_path, epochs=1)
    (tmp_path / "best.pt").replace(tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"cannot be resumed from: it has no optimizer"):
        train(prepared, tmp_path, epochs=2, resume=True)


def test_out_that_cannot_be_a_folder(prepared, tmp_path):
    (tmp_path / "file").touch()
    result = run("unet/train.py", "--data", prepared, "--out", tmp_path / "file", *TINY)
    assert result.returncode == 1 and str(tmp_path / "file") in result.stderr and "Traceback" not in result.stderr


WITHOUT_BATCH_NORM = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from torch import nn

from dataset.pet import make_train_loaders
from utils.config import TrainConfig, parse
from utils.loss import SegmentationLoss
from utils.distributed import leave
from utils.train import StepOutput, fit, make_accelerator

config = parse(TrainConfig, "", sys.argv[2:])
accelerator = make_accelerator(config)
train_loader, val_loader, split = make_train_loaders(config)
model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
criterion = SegmentationLoss(config.loss, config.boundary)  # every pixel counts, so that the mean of means is the mean


def step(model, batch):
    logits = model(batch["image"])
    return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])


fit(model, step, train_loader, val_loader, config,
    accelerator=accelerator, model_name="unet", model_args={}, split=split)
leave()
"""


@pytest.fixture(scope="module")
def train_without_batch_norm(prepared, tmp_path_factory) -> Callable[..., Path]:
    """Trains a network without batch norm on 12 images, alone or in several processes; returns the run folder."""
    folder = tmp_path_factory.mktemp("without-batch-norm")
    (folder / "train.py").write_text(WITHOUT_BATCH_NORM)

    def start(name: str, batch_size: int, *flags: object, processes: int = 1) -> Path:
        launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", processes) if processes > 1 else ()
        result = run(
            *launcher, folder / "train.py", ROOT,
            "--data", prepared, "--out", folder / name, "--batch-size", batch_size, "--epochs", 2, "--lr", 1e-2,
            "--val-fraction", 0.25, "--image-size", 32, "--workers", 0, "--device", "cpu", *flags, module=processes > 1,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return folder / name

    return start


def test_however_a_batch_is_cut_the_losses_are_those_of_the_whole(train_without_batch_norm):
    def losses(out: Path) -> list[list[float]]:
        rows = csv.DictReader((out / "log.csv").open())
        return [[float(row["train_loss"]), float(row["val_loss"])] for row in rows]

    def resumed(name: str, batch_size: int, before: int, now: int) -> Path:
        train_without_batch_norm(name, batch_size, "--epochs", 1, processes=before)
        return train_without_batch_norm(name, batch_size, "--resume", processes=now)

    whole = losses(train_without_batch_norm("whole", 10))
    assert whole[1][0] < whole[0][0]
    for out in (
        train_without_batch_norm("two-processes", 5, processes=2),
        train_without_batch_norm("accumulated", 5, "--accumulate", 2),
        resumed("two-then-one", 5, before=2, now=1),
        resumed("one-then-two", 10, before=1, now=2),
    ):
        assert np.abs(np.subtract(losses(out), whole)).max() < 1e-5, (out, losses(out), whole)


def test_a_cosine_schedule_also_when_resumed(prepared, tmp_path):
    settings = {"schedule": "cosine", "patience": 0, "lr": 1e-2}
    straight = train(prepared, tmp_path / "straight", epochs=4, **settings)
    assert [row["lr"] for row in straight["log"]] == pytest.approx([1e-2, 0.853553e-2, 0.5e-2, 0.146447e-2], rel=1e-5)
    stopped, calls = tmp_path / "stopped", itertools.count(1)

    def stop_in_third_epoch(model, batch):
        if next(calls) > 8:  # an epoch is three batches and one to validate
            raise KeyboardInterrupt
        return segmentation_step(model, batch)

    with pytest.raises(KeyboardInterrupt):
        train(prepared, stopped, epochs=4, step=stop_in_third_epoch, **settings)
    assert load_checkpoint(stopped / "last.pt", "unet")["epoch"] == 2
    assert_same_weights(straight, train(prepared, stopped, epochs=4, resume=True, **settings))


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_it_is_the_same_run(prepared, tmp_path):
    def run_with(**settings) -> dict:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        # All images in a batch: another size would be compiled again.
        return train(prepared, tmp_path / str(settings), model=model, epochs=2, batch_size=12, **settings)

    plain, fast = run_with(), run_with(compile=True)
    assert fast["model"].keys() == plain["model"].keys(), "the names are those of the model itself"
    for one, two in zip(plain["log"], fast["log"], strict=True):
        for loss in ("train_loss", "val_loss"):
            assert two[loss] == pytest.approx(one[loss], rel=1e-4)


def test_compile_without_a_compiler(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    result = run("unet/train.py", "--data", prepared, "--out", tmp_path / "out", "--compile", *TINY)
    assert result.returncode == 1 and "install g++" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out/config.json").exists()


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_environment(torch.device("cpu"))["commit"] is None


def test_resume_with_other_data_is_refused(originals, prepared, tmp_path):
    from dataset.dataset_prep import prepare
    from dataset.synthetic import draw_dataset

    train(prepared, tmp_path / "run", epochs=1)
    draw_dataset(tmp_path / "other", 30, seed=1)
    prepare(tmp_path / "other")
    with pytest.raises(InputError, match="are not those that"):
        train(tmp_path / "other", tmp_path / "run", epochs=2, resume=True)


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        make_accelerator(TrainConfig(device="cpu", precision="fp16"))
