"""Checkpoints: save them, load them, rebuild a model from one; and the environment that a run was made in."""

import errno
import os
import pickle
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.dataset import PETS, ClassTable
from utils.distributed import world_size
from utils.files import InputError, atomic_path
from utils.machine import is_out_of_memory, usable_cores


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict without the weights of modules with `external_weights = True` (a CLIP from a hub or folder)."""
    external = _external_prefixes(model)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(external)}


def load_model_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `model_state` returned. RuntimeError when other keys are missing or do not fit."""
    external = _external_prefixes(model)
    kept = {key: value for key, value in model.state_dict().items() if key.startswith(external)}
    model.load_state_dict(kept | state)


def _external_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "external_weights", False))


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values atomically, also on power failure. InputError when the disk is full."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch reports a failed write as a RuntimeError
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {path}: {reason}. Free space and continue with --resume") from error


def load_checkpoint(path: Path, model_name: str | None = None, *, default_classes: ClassTable = PETS) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; `model_name` is the expected one (FOLDER or FOLDER/STAGE).

    Checkpoints from before the class table was stored get `default_classes`. InputError when the file is missing,
    truncated, not a checkpoint, of another model, or would execute code on loading.
    """
    if not path.is_file():
        train = f"python {model_name.split('/')[0]}/train.py" if model_name else "run the train.py of a model"
        hint = f"no such checkpoint. Train first: {train}"
        if path.is_dir():
            hint = "a folder without a best.pt: give a checkpoint"
        raise InputError(f"{path}: {hint}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not zipfile.is_zipfile(path):
            raise InputError(f"{path} is truncated or not a checkpoint; use another, or train again") from error
        raise InputError(f"{path} holds more than tensors and plain values and could execute code: refused") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged archive fails in many ways: RuntimeError, EOFError, KeyError, ...
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the machine's trouble
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise InputError(f"{path} is truncated or not a checkpoint ({error}); use another, or train again") from error
    parts = ("model", "model_args", "config")
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(part), dict) for part in parts):
        raise InputError(f"{path} is not a checkpoint of this repository (it has no model, model_args and config)")
    config = checkpoint["config"]
    for part, key, least in ((checkpoint, "epoch", 0), (config, "image_size", 1), (config, "seed", 0)):
        if not isinstance(value := part.get(key), int) or value < least:
            raise InputError(f"{path} is damaged or not of this repository: its {key} is {value!r}")
    if not all(isinstance(value, Tensor) for value in checkpoint["model"].values()):
        raise InputError(f"{path} is damaged or not of this repository: its weights are not all tensors")
    found = checkpoint.get("model_name")
    if found is None or (model_name is not None and found != model_name):
        raise InputError(f"{path} holds a {found} model, expected {model_name}")
    checkpoint.setdefault("class_table", default_classes.as_plain_dict())
    try:
        class_table_of(checkpoint)
    except (TypeError, ValueError, KeyError, AttributeError, InputError) as error:
        raise InputError(f"{path} has a class table that this version cannot read: {error}") from error
    return checkpoint


def find_difference(value: Any, expected: Any, place: str = "") -> str:
    """The first part of `value` whose type, shape or keys are not as in `expected`, as text; "" if there is none.

    Numbers may differ, but not be NaN, and an int may stand for a float. Dicts may have further keys.
    """
    name = place.lstrip(".") or "it"
    if isinstance(expected, Tensor):
        wanted = f"a tensor {tuple(expected.shape)} of {expected.dtype}"
        found = f"a tensor {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)
        return "" if found == wanted else f"{name} is {found[:80]}, expected {wanted}"
    kind = int | float if type(expected) is float else type(expected)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or value != value:  # NaN
        return f"{name} is {repr(value)[:80]}, expected a {type(expected).__name__}"
    if isinstance(expected, dict):
        if missing := [key for key in expected if key not in value]:
            return f"{name} has no {missing[0]}"
        pairs = [(key, value[key], expected[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        if expected and len(value) != len(expected):  # an empty one stands for any
            return f"{name} has {len(value)} entries, expected {len(expected)}"
        pairs = [(number, *pair) for number, pair in enumerate(zip(value, expected))]
    else:
        return ""
    return next(filter(None, (find_difference(one, other, f"{place}.{key}") for key, one, other in pairs)), "")


def class_table_of(checkpoint: dict[str, Any]) -> ClassTable:
    """The class table of a checkpoint that `load_checkpoint` read."""
    return ClassTable.from_plain_dict(checkpoint["class_table"])


def restore_model(
    path: Path, build: Callable, model_name: str, device: torch.device, *, default_classes: ClassTable = PETS
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a model, `build(**model_args)`, on `device` in eval mode; returns it and its checkpoint."""
    checkpoint = load_checkpoint(path, model_name, default_classes=default_classes)
    try:
        model = build(**checkpoint["model_args"])
        load_model_state(model, checkpoint["model"])
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:  # model_args of another version
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path} does not fit {getattr(build, '__name__', model_name)}: {str(error)[:300]}") from error
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """The command, commit, versions, hardware and precision of this process, for config.json and metrics.json."""
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": " ".join(sys.argv),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": hardware,
        "precision": precision,
        "cpus": usable_cores(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
    }
