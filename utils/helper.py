"""Checkpoints: save, load, rebuild a model from its file; devices; seeding; what a run was made with."""

from __future__ import annotations

import os
import pickle
import platform
import random
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.files import InputError, atomic_path


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name: str) -> torch.device:
    """The device that `--device` names; "auto" is CUDA, else Apple's MPS, else the CPU. InputError if there is none."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, here in available.items() if here)
    if not available[name]:
        raise InputError(f"--device {name}: this machine has none that PyTorch {torch.__version__} can use")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that were started together on this machine
    devices = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": processes}[name]
    if processes > devices:
        raise InputError(
            f"{processes} processes were started on this machine, which has {devices} for --device {name}: "
            f"start {devices}, or give --device cpu"
        )
    return torch.device(name)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors; `image` becomes float in [0, 1], channels last, there."""
    batch = {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }
    batch["image"] = batch["image"].float().div_(255).contiguous(memory_format=torch.channels_last)
    return batch


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of tensors, numbers, strings, lists and dicts, whole or not at all, even when the power fails.

    InputError when the disk is full; the file that was there is then still there.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError of its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {path}: {reason}. Free space and go on with --resume") from error


def load_checkpoint(path: Path, model_name: str) -> dict[str, Any]:
    """Read a checkpoint that `save_checkpoint` wrote for model `model_name` (FOLDER or FOLDER/STAGE), onto the CPU.

    InputError when the file is missing, truncated, not a checkpoint, of another model, or would run code on loading.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint. Train first: python {model_name.split('/')[0]}/train.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} is truncated or not a checkpoint; use another, or train again") from error
        raise InputError(
            f"{path} holds more than tensors and plain values, and loading it could run code: refused"
        ) from error
    except Exception as error:  # a damaged archive fails in many ways: RuntimeError, EOFError, KeyError, ...
        raise InputError(f"{path} is truncated or not a checkpoint ({error}); use another, or train again") from error
    parts = (
        [checkpoint.get(key) for key in ("model", "model_args", "config")] if isinstance(checkpoint, dict) else [None]
    )
    if not all(isinstance(part, dict) for part in parts) or "model_name" not in checkpoint:
        raise InputError(f"{path} is not a checkpoint of this repository (it has no model, model_args and config)")
    if checkpoint["model_name"] != model_name:
        raise InputError(f"{path} holds a {checkpoint['model_name']} model, expected {model_name}")
    return checkpoint


def load_model(
    path: Path, model_class: type[nn.Module], model_name: str, device: torch.device
) -> tuple[nn.Module, dict]:
    """Rebuild a model from its checkpoint alone; returns it in eval mode on `device`, and the checkpoint."""
    checkpoint = load_checkpoint(path, model_name)
    try:
        model = model_class(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        raise InputError(f"{path} does not fit {model_class.__name__}: {error}") from error
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def random_state() -> dict[str, Any]:
    """The state of PyTorch's random generators, for a checkpoint."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`; generators of GPUs that are not here are left out."""
    torch.set_rng_state(state["cpu"])
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """What a run was made with: command, commit, versions, hardware."""
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": " ".join(sys.argv),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "cpus": os.cpu_count(),
    }
