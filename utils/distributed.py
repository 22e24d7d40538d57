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
from utils.machine import processes_here, usable_cores

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of `--device` ("auto": CUDA, else Apple's MPS, else the CPU). InputError if there are too few."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available.get(name):
        raise InputError(f"--device {name}: this machine has none that PyTorch {torch.__version__} can use")
    processes = processes_here()
    devices = {"cuda": torch.cuda.device_count(), "mps": 1, "cpu": processes}[name]
    if processes > devices:
        found = f"{processes} processes were started on this machine, which has {devices} for --device {name}"
        raise InputError(f"{found}: start {devices}, or give --device cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of `--precision`: fp32, bf16 or fp16; "auto" is the fastest. InputError for fp16 on a CPU."""
    native = has_native_bf16(device)
    if name == "auto":
        return "bf16" if native else "fp16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; on the CPU use bf16 or fp32")
    if name == "bf16" and not native and device.type != "mps":
        log.warning("--precision bf16: this machine only emulates bfloat16; fp32 is faster on it")
    return name


def has_native_bf16(device: torch.device) -> bool:
    """Whether the hardware itself multiplies in bfloat16: a CUDA GPU, or an x86 CPU with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a model computes in `precision`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def set_threads(threads: int | None) -> None:
    """Set PyTorch's threads to `--threads`. InputError if there are fewer cores.

    The default is OMP_NUM_THREADS, unless torchrun has set it (to 1), else this process's share of the cores. It does
    not depend on the loader's workers, so that they change no result: rounding depends on the number of threads.
    """
    cores = usable_cores()
    if threads is not None and threads > cores:
        raise InputError(f"--threads {threads}: this process may use {cores} core(s)")
    if threads is None and "OMP_NUM_THREADS" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    torch.set_num_threads(threads or max(1, cores // processes_here()))


def init_distributed(device: str, threads: int | None = None) -> torch.device:
    """Join the processes that were started together, set the threads; returns the device that `--device` asks for."""
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent and os.environ.get("WORLD_SIZE", "1") != "1":
        hint = "start the processes with torchrun, or unset it"
        raise InputError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but not {', '.join(absent)}: {hint}")
    state = PartialState(cpu=pick_device(device).type == "cpu")
    if not dist.is_initialized() and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ:
        log.warning("accelerate launch started one process only; on a CPU torchrun --nproc_per_node starts several")
    set_threads(threads)  # afterwards, because accelerate sets them, too
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
