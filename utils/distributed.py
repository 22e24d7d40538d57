"""Several processes that share the work, each with its share of the images: torchrun or accelerate launch starts them.

A process that is alone has all of them: rank 0 of 1, and nothing to gather.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader

from utils.helper import pick_device

log = logging.getLogger(__name__)


def join(device: str) -> torch.device:
    """Join the processes that were started together; returns the device of this one, as `--device` asks for."""
    state = PartialState(cpu=pick_device(device).type == "cpu")
    if not dist.is_initialized() and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        log.warning("accelerate launch started one process only; on a CPU torchrun --nproc_per_node starts several")
    return state.device


def leave() -> None:
    """Part from the other processes when all is done. (After an error this could wait for them forever.)"""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; that one writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors."""
    if world() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(values: Sequence[Any]) -> list[Any]:
    """The processes' lists of plain values, one after the other."""
    if world() == 1:
        return list(values)
    parts: list[Any] = [None] * world()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


def gather_samples(loader: DataLoader, values: Sequence[Any]) -> list[Any]:
    """A plain value for each sample of a loader's data set, in its order, from those of the samples loaded here."""
    samples = [sample for keys in loader.batch_sampler for _, sample in keys]
    return [value for _, value in sorted(gather(list(zip(samples, values, strict=True))), key=itemgetter(0))]
