"""Several processes that share the work, as torchrun or accelerate launch start them; alone: rank 0 of world size 1."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from torch import distributed as dist

from utils.files import InputError

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of `--device` ("auto": CUDA, else Apple's MPS, else the CPU). InputError if there are too few."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available.get(name):
        raise InputError(f"--device {name}: this machine has none that PyTorch {torch.__version__} can use")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # started together on this machine
    devices = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": processes}[name]
    if processes > devices:
        found = f"{processes} processes were started on this machine, which has {devices} for --device {name}"
        raise InputError(f"{found}: start {devices}, or give --device cpu")
    return torch.device(name)


def init_distributed(device: str) -> torch.device:
    """Join the processes that were started together; returns this process's device, as `--device` asks for."""
    state = PartialState(cpu=pick_device(device).type == "cpu")
    if not dist.is_initialized() and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        log.warning("accelerate launch started one process only; on a CPU torchrun --nproc_per_node starts several")
    return state.device


def destroy_distributed() -> None:
    """Destroy the process group. Only after success: after an error it could wait forever for the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0. Rank 0 writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def print_once(text: str) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(text)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of the tensors of all ranks."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_gather_objects(values: Sequence[Any]) -> list[Any]:
    """The lists of plain values of all ranks, concatenated."""
    if world_size() == 1:
        return list(values)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]
