"""What the tests share: running scripts, tiny data sets, models and checkpoints."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from models import MODELS
from utils.config import TrainConfig
from utils.dataset import PETS
from utils.helper import load_checkpoint, model_state, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT.parent / "shared" / "oxford-pets-sample"  # 600 photographs of Oxford-IIIT Pet in its original layout
CPU = torch.device("cpu")
TINY_CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TINY = ("--image-size", 32, "--base-channels", 2, "--batch-size", 4, "--workers", 0, "--device", "cpu")

# Without PYTHONPATH, as a user would run them.
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
WITHOUT_FCNTL = "import sys, runpy; sys.modules['fcntl'] = None; del sys.argv[0]; "
WITHOUT_FCNTL += "runpy.run_path(sys.argv[0], run_name='__main__')"


def command(script: object, *arguments: object) -> list[str]:
    """The command line of a script of the repository in an interpreter of its own."""
    block = ["-c", WITHOUT_FCNTL] if os.environ.get("WITHOUT_FCNTL") else []
    return [sys.executable, *block, *map(str, (ROOT / str(script), *arguments))]


@cache
def launcher() -> subprocess.Popen:
    process = subprocess.Popen(
        command("tests/launcher.py"), env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.stdin.close)
    return process


def run(
    script: object,
    *arguments: object,
    cwd: Path = Path("/"),
    processes: int = 1,
    module: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository as a user would, from another folder; `processes` as torchrun would start them.

    Where the system can fork, in a fork of tests/launcher.py, else in an interpreter of its own.
    """
    line = [str(script) if module else str(ROOT / str(script)), *map(str, arguments)]
    environments = [environment]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "localhost"}
            group["MASTER_PORT"] = free.getsockname()[1]
        ranks = [{"RANK": rank, "LOCAL_RANK": rank, **group} for rank in range(processes)]
        environments = [{key: str(value) for key, value in rank.items()} | environment for rank in ranks]
    if not hasattr(os, "fork"):
        assert processes == 1
        target = [sys.executable, *(["-m"] if module else []), *line]
        return subprocess.run(target, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("stdout", "stderr")}
        for path in files.values():
            path.touch()
        request = {"command": line, "cwd": str(cwd), "module": module, "environments": environments}
        request |= {name: str(path) for name, path in files.items()}
        launcher().stdin.write(json.dumps(request) + "\n")
        launcher().stdin.flush()
        codes = json.loads(launcher().stdout.readline())
        output, errors = (path.read_text() for path in files.values())
    code = next((code for code in codes if code not in (0, -15)), max(codes, key=abs))
    return subprocess.CompletedProcess(line, code, output, errors)


def succeed(script: object, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`run`, and the script ends with exit code 0."""
    result = run(script, *arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def fail(script: object, *arguments: object, message: str, code: int = 1, **options: Any) -> None:
    """`run`, and the script ends with `code` and an error that contains `message`, without a traceback."""
    result = run(script, *arguments, **options)
    assert result.returncode == code, (result.returncode, result.stderr)
    assert message in result.stderr and "Traceback" not in result.stderr, result.stderr


def train_config(data: Path, out: Path, **settings: Any) -> TrainConfig:
    """The flags of a tiny training."""
    defaults = {"image_size": 32, "batch_size": 4, "workers": 0, "device": "cpu", "val_fraction": 0.25, "lr": 1e-3}
    defaults |= {"precision": "fp32"}  # on every machine
    return TrainConfig(data=data, out=out, **{**defaults, **settings})


def segmentation_step(model, batch):
    """A step whose loss leaves the boundary out, so that it depends on sums over the whole batch."""
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput

    logits = model(batch["image"])
    return StepOutput(SegmentationLoss("cross-entropy", "ignore")(logits, batch["mask"]), logits, batch["mask"])


def scale_loss(output, factor):
    """The output of a step with its loss multiplied by a factor."""
    sums, formula, _ = output.loss
    return output._replace(loss=type(output.loss)(sums, lambda sums: factor * formula(sums), None))


UNET_ARGS = {"num_classes": 3, "base_channels": 2}


def train(data: Path, out: Path, *, step=segmentation_step, model: nn.Module | None = None, **settings: Any) -> dict:
    """Train a tiny U-Net (or `model`) in this process; returns last.pt."""
    from dataset.pet import make_train_sets
    from unet.model import UNet
    from utils.run import start_run
    from utils.train import fit

    run = start_run(train_config(data, out, **settings), "unet")
    train_set, val_set = make_train_sets(run.config)
    fit(model or UNet(**UNET_ARGS), step, train_set, val_set, run, UNET_ARGS)
    return load_checkpoint(out / "last.pt", "unet")


def assert_same_weights(first: dict, second: dict) -> None:
    assert first["model"].keys() == second["model"].keys()
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key


def save_model(path: Path, model: nn.Module, model_name: str, model_args: dict[str, Any], **config: Any) -> Path:
    """A checkpoint of an untrained model."""
    settings = {"seed": 0, "image_size": 32, "encoder": None, **config}
    table = MODELS[model_name].classes if model_name in MODELS else PETS
    checkpoint = {
        "model_name": model_name, "model": model_state(model), "model_args": model_args, "epoch": 1,
        "config": settings, "class_table": table.as_plain_dict(), "scores": {},
    }  # fmt: skip
    save_checkpoint(path, checkpoint)
    return path


def tiny_clip_encoder(**options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A CLIP encoder with random weights, and its arguments in a checkpoint."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from clip_seg.model import ClipEncoder

    encoder = ClipEncoder(CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)), **options)
    arguments = {
        "clip_model": "none", "architecture": TINY_CLIP, "image_size": encoder.image_size,
        "frozen": encoder.frozen, "weights_hash": None,
    }  # fmt: skip
    return encoder, arguments


def left_out(base: Path) -> dict[str, str]:
    """Prepare `base`; the files that were left out, with the reasons."""
    from dataset.dataset_prep import prepare

    report, _ = prepare(base)
    return {row["file"]: row["reason"] for row in report["left_out"]}


def to_report_layout(base: Path, target: Path, mode: str = "P") -> Path:
    """Copy a prepared folder into the report's layout: flat color/ and label/, labels saved in `mode`."""
    for split in ("TrainVal", "Test"):
        for kind in ("color", "label"):
            (target / split / kind).mkdir(parents=True)
        for path in (base / split / "color").rglob("*.jpg"):
            shutil.copy(path, target / split / "color")
        for path in (base / split / "label").rglob("*.png"):
            Image.open(path).convert(mode).save(target / split / "label" / path.name)
    return target


def state(base: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file."""
    return {
        str(path.relative_to(base)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(base.rglob("*")) if path.is_file()
    }  # fmt: skip


def peak_memory(device: torch.device, work) -> float | None:
    """MiB that `work` allocates at its peak: on the GPU, or in this process (None where the system is not Linux)."""
    import ctypes
    import gc

    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def kibibytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, else `work` would use it unnoticed
    reset.write_text("5")  # resets the peak
    before = kibibytes("VmRSS")
    work()
    return round((kibibytes("VmHWM") - before) / 2**10, 1)


def without_batch_norm() -> nn.Module:
    """A segmenter whose loss of a batch is the mean over its images, however they are split."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))


def every_pixel_step(model, batch):
    """A step in which every pixel counts, so that the mean over pixels is the mean over images."""
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput

    logits = model(batch["image"])
    return StepOutput(SegmentationLoss("cross-entropy", "background")(logits, batch["mask"]), logits, batch["mask"])


def pooled_step(model, batch):
    """A step whose loss depends on sums over the whole batch: pixels that count, and overlaps of classes."""
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput

    logits = model(batch["image"])
    loss = SegmentationLoss("cross-entropy+0.5*dice", "ignore")(logits, batch["mask"])
    return StepOutput(loss, logits, batch["mask"])


def photograph(width: int = 40, height: int = 30) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def raise_error(error: BaseException):
    """A function that raises `error`, whatever it is called with."""

    def fail(*_, **__):
        raise error

    return fail


def wait_for_epoch(process: subprocess.Popen, out: Path) -> None:
    """Wait until a training has saved its first epoch; fails when it ends before."""
    while not (out / "last.pt").exists() or not load_checkpoint(out / "last.pt")["epoch"]:
        assert process.poll() is None, "the training ended before its first epoch"
        time.sleep(0.02)


def save_clip_segmenter(path: Path, clip: Path) -> Path:
    """A checkpoint of clip_seg/train.py on the frozen CLIP of the folder `clip`, untrained."""
    from clip_seg.model import ClipSegmenter, make_encoder

    torch.manual_seed(1)
    encoder, encoder_args = make_encoder(str(clip), frozen=True)
    options = {"num_classes": 3, "base_channels": 2, "skips": True}
    flags = {"clip_model": str(clip), "clip_image_size": None, "clip_random_init": False, "freeze_encoder": True}
    model, model_args = ClipSegmenter(encoder, **options), {"encoder": encoder_args, **options}
    return save_model(path, model, "clip_seg", model_args, **flags)
