"""utils/distributed.py: several processes give what one gives, and end together."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autoencoder.model import Autoencoder, AutoencoderSegmenter
from clip_seg.model import ClipSegmenter, make_encoder
from point_clip.model import PointClip
from tests.conftest import ROOT, TINY, run
from unet.model import UNet
from utils.files import InputError
from utils.helper import load_checkpoint, pick_device, save_checkpoint
from utils.train import synchronized

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2)  # standalone: at a free port


def save_model(path: Path, model: nn.Module, model_name: str, model_args: dict[str, Any]) -> Path:
    settings = {"seed": 0, "image_size": 32, "encoder": None}
    save_checkpoint(
        path,
        {
            "model_name": model_name,
            "model": model.state_dict(),
            "model_args": model_args,
            "config": settings,
            "epoch": 1,
        },
    )
    return path


def make_unet(folder: Path, clip: Path) -> Path:
    return save_model(folder / "best.pt", UNet(base_channels=2), "unet", {"base_channels": 2})


def make_autoencoder(folder: Path, clip: Path) -> Path:
    width, options = {"base_channels": 2}, {"num_classes": 3, "skips": True}
    first = Autoencoder(**width)
    save_model(folder / "reconstruction/best.pt", first, "autoencoder/reconstruction", width)
    segmenter = AutoencoderSegmenter(first.encoder, 3, skips=True)
    return save_model(folder / "segmentation/best.pt", segmenter, "autoencoder", width | options)


def make_clip_seg(folder: Path, clip: Path) -> Path:
    encoder, encoder_args = make_encoder(str(clip))
    options = {"num_classes": 3, "base_channels": 2, "skips": False}
    model = ClipSegmenter(encoder, **options)
    return save_model(folder / "best.pt", model, "clip_seg", {"encoder": encoder_args, **options})


def make_point_clip(folder: Path, clip: Path) -> Path:
    encoder, encoder_args = make_encoder(str(clip))
    options = {"encoding": "disk", "base_channels": 2, "skips": False}
    return save_model(
        folder / "best.pt", PointClip(encoder, **options), "point_clip", {"encoder": encoder_args, **options}
    )


@pytest.mark.parametrize(
    ("script", "flags", "folder"),
    [
        ("unet", [], ""),
        ("autoencoder", ["--pretrain-epochs", 1], "segmentation"),
        ("clip_seg", ["--skips"], ""),
        ("point_clip", ["--point-encoding", "disk", "--freeze-encoder"], ""),
    ],
)
def test_two_processes_train_one_model(prepared, clip_folder, tmp_path, script, flags, folder):
    """Two epochs: a parameter without a gradient would show in the second."""
    clip = ["--clip-model", clip_folder] if "clip" in script else []
    result = run(
        *TORCHRUN, ROOT / script / "train.py", "--data", prepared, "--out", tmp_path / "run", "--epochs", 2,
        "--batch-size", 3, "--val-fraction", 0.25, "--image-size", 32, "--base-channels", 2, "--workers", 0,
        "--device", "cpu", *flags, *clip, module=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("synthetic drawings") == 1, "one process speaks"
    out = tmp_path / "run" / folder
    assert len(list(csv.DictReader((out / "log.csv").open()))) == 2
    assert json.loads((out / "config.json").read_text())["environment"]["processes"] == 2
    assert load_checkpoint(out / "last.pt", script)["epoch"] == 2


@pytest.mark.parametrize(
    ("script", "make", "files"),
    [
        ("unet", make_unet, ["images.csv", "confusion.png", "predictions.png", "robustness.csv", "robustness.png"]),
        ("autoencoder", make_autoencoder, ["images.csv", "reconstruction.json", "reconstructions.png"]),
        ("clip_seg", make_clip_seg, ["images.csv", "predictions.png"]),
        ("point_clip", make_point_clip, ["images.csv", "predictions.png", "robustness.csv"]),
    ],
)  # fmt: skip
def test_two_processes_score_as_one(prepared, clip_folder, tmp_path, script, make, files):
    torch.manual_seed(0)
    checkpoint = make(tmp_path / "run", clip_folder)
    flags = ["--checkpoint", checkpoint, "--data", prepared, "--workers", 0, "--device", "cpu", "--batch-size", 5]
    flags += ["--perturb", "contrast_decrease", "occlusion"] if "robustness.csv" in files else []
    flags += ["--limit", 11]  # the last batch is one image, which joins the batch before
    alone = run(f"{script}/test.py", "--out", tmp_path / "alone", *flags)
    together = run(*TORCHRUN, ROOT / f"{script}/test.py", "--out", tmp_path / "together", *flags, module=True)
    assert alone.returncode == 0 and together.returncode == 0, alone.stderr + together.stderr
    assert alone.stdout.replace("/alone/", "/together/") == together.stdout, "printed once, the same"

    scores = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("alone", "together")]
    for metrics in scores:
        for key in ("images_per_second", "config", "environment"):
            del metrics[key]
    assert flatten(scores[1]) == pytest.approx(flatten(scores[0]), abs=1e-6)
    for name in (*files, *(f"masks/{path.name}" for path in (tmp_path / "alone/masks").iterdir())):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("alone", "together"))
        assert one == two, name


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, part in value.items() for key, leaf in flatten(part, f"{prefix}/{name}").items()}


def test_pictures_are_shared(prepared, tmp_path):
    checkpoint = make_unet(tmp_path, tmp_path)
    (tmp_path / "pictures").mkdir()
    for path in list((prepared / "Test/color/dogs").iterdir())[:3]:
        (tmp_path / "pictures" / path.name).symlink_to(path)
    (tmp_path / "pictures/broken.jpg").write_bytes(b"no picture")
    result = run(
        *TORCHRUN, ROOT / "unet/test.py", "--checkpoint", checkpoint, "--images", tmp_path / "pictures",
        "--out", tmp_path / "masks", "--device", "cpu", module=True,
    )  # fmt: skip
    assert result.returncode != 0 and "3 pictures segmented" in result.stdout and "broken.jpg" in result.stderr
    assert len(list((tmp_path / "masks").glob("*_mask.png"))) == 3


def test_fewer_images_than_processes(prepared, tmp_path):
    flags = ["--checkpoint", make_unet(tmp_path, tmp_path), "--data", prepared, "--limit", 1, "--device", "cpu"]
    result = run(*TORCHRUN, ROOT / "unet/test.py", *flags, module=True)
    assert result.returncode != 0 and "1 images cannot be shared by 2 processes" in result.stderr


def test_more_processes_than_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match=r"2 processes were started on this machine, which has 1 for --device cuda"):
        pick_device("auto")


def test_batch_norm_of_several_gpus(monkeypatch):
    monkeypatch.setattr("utils.train.world", lambda: 2)
    names, cuda = list(UNet(base_channels=2).state_dict()), torch.device("cuda")
    model = synchronized(UNet(base_channels=2), cuda)
    kinds = {type(module) for module in model.modules()}
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds and list(model.state_dict()) == names
    frozen = synchronized(AutoencoderSegmenter(Autoencoder(base_channels=2).encoder, 3), cuda).train()
    norms = [module for module in frozen.encoder.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms), "frozen statistics stay frozen"
    assert nn.SyncBatchNorm not in {type(module) for module in synchronized(UNet(), torch.device("cpu")).modules()}
    monkeypatch.undo()
    assert nn.SyncBatchNorm not in {type(module) for module in synchronized(UNet(), cuda).modules()}, "alone"


def test_accelerate_launch(prepared, tmp_path):
    result = run(
        "accelerate.commands.launch", "--num_processes", 2, "--cpu", ROOT / "unet/train.py",
        "--data", prepared, "--out", tmp_path / "run", "--epochs", 1, *TINY, module=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "run/last.pt", "unet")["epoch"] == 1
    assert "started one process only; on a CPU torchrun" in result.stderr


def test_an_interrupted_group_ends_and_resumes_with_another_number_of_processes(prepared, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", *TORCHRUN, ROOT / "unet/train.py", "--data", prepared, "--out", out,
               "--epochs", 10_000, "--patience", 0, *TINY]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    group = subprocess.Popen(list(map(str, command)), start_new_session=True, stderr=subprocess.PIPE, env=environment)
    while group.poll() is None:
        if (out / "last.pt").exists() and load_checkpoint(out / "last.pt", "unet")["epoch"]:
            break
        time.sleep(0.1)
    os.killpg(group.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    _, errors = group.communicate(timeout=120)
    assert group.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.killpg(group.pid, 0)  # nobody is left
    stopped = load_checkpoint(out / "last.pt", "unet")["epoch"]
    assert stopped > 0, errors

    resumed = run("unet/train.py", "--out", out, "--resume", "--epochs", stopped + 1)
    assert resumed.returncode == 0, resumed.stderr
    rows = list(csv.DictReader((out / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, stopped + 2))
    assert np.isfinite(float(rows[-1]["train_loss"]))


def test_a_second_stage_with_another_number_of_processes(prepared, tmp_path):
    flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 1, "--pretrain-epochs", 1, *TINY]
    first = run(*TORCHRUN, ROOT / "autoencoder/train.py", *flags, module=True)
    assert first.returncode == 0, first.stderr
    shutil.rmtree(tmp_path / "run/segmentation")
    second = run("autoencoder/train.py", *flags, "--resume")
    assert second.returncode == 0, second.stderr
    for folder in ("", "reconstruction", "segmentation"):
        step = json.loads((tmp_path / "run" / folder / "config.json").read_text())["step"]
        assert step == {"batch_size": 4, "accumulate": 2, "processes": 1}, folder


DYING = """
import os, signal, sys
from pathlib import Path

sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, str(Path(sys.argv[0]).parents[1]))
import dataset.pet
from utils.config import run_script

load = dataset.pet.PetDataset.__getitem__


def die(self, key):
    if key[0] == 2 and self.transform:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
    return load(self, key)


dataset.pet.PetDataset.__getitem__ = die
from unet.train import main

run_script(main)
"""


def test_a_worker_that_dies_ends_the_run(prepared, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 3, *TINY, "--workers", 1]
    result = subprocess.run(
        [sys.executable, *map(str, (tmp_path / "dying.py", ROOT / "unet/train.py", *flags))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1 and "a worker" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert load_checkpoint(tmp_path / "run/last.pt", "unet")["epoch"] == 1
