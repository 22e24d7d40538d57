"""All models by name, and `load_model` for any checkpoint."""

import importlib
import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from utils.dataset import CLICKS, PETS, ClassTable
from utils.distributed import pick_device
from utils.files import InputError
from utils.helper import load_checkpoint, restore_model


@dataclass(frozen=True)
class Model:
    """A folder with model.py, train.py and test.py; `build` in its model.py makes the network from `model_args`."""

    build: str
    checkpoint: str = "best.pt"  # in a run folder: the segmentation's best epoch
    classes: ClassTable = PETS  # of checkpoints from before the class table was stored


MODELS = {
    "unet": Model("UNet"),
    "autoencoder": Model("build_segmenter", "segmentation/best.pt"),
    "clip_seg": Model("build_segmenter"),
    "point_clip": Model("build_point_clip", classes=CLICKS),
}


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` names: a file, or a run folder. InputError if a folder holds none."""
    if not path.is_dir():
        return path
    for name in dict.fromkeys(model.checkpoint for model in MODELS.values()):
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} holds no best.pt: give the folder of a finished run, or a checkpoint file")


def load_model(
    path: str | Path, device: str | torch.device = "auto", *, clip_model: str | None = None
) -> tuple[nn.Module, dict]:
    """Rebuild the model of any checkpoint, or of a run folder; returns it in eval mode on `device`, and the checkpoint.

    `clip_model` is the hub id or folder of a frozen CLIP whose weights have moved since the training. InputError when
    there is no checkpoint, it is damaged, or its model is not one of MODELS.
    """
    path = find_checkpoint(Path(path))
    name = load_checkpoint(path)["model_name"]
    if name not in MODELS:
        raise InputError(f"{path} holds a {name} model; models.py knows {', '.join(MODELS)}")
    row = MODELS[name]
    build = getattr(importlib.import_module(f"{name}.model"), row.build)  # so that a U-Net needs no transformers
    if clip_model is not None:
        if "clip_model" not in inspect.signature(build).parameters:
            raise InputError(f"--clip-model: {path} holds a {name} model, which has no CLIP")
        build = partial(build, clip_model=clip_model)
    device = pick_device(device) if isinstance(device, str) and ":" not in device else torch.device(device)
    return restore_model(path, build, name, device, default_classes=row.classes)
