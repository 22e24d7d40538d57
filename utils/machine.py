"""What this machine gives to a process: its cores and its memory. Nothing heavy is imported here."""

import ctypes
import os

from utils.files import InputError

# Parameters of mallopt, numbered in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Make glibc keep the memory that PyTorch frees, for the tensors of the next step. Call it before importing torch.

    By default glibc returns a large block to the system as soon as it is freed. The next step then gets new pages, each
    cleared by the kernel at first use: half of the time of a training step on a CPU (docs/speed.md). Does nothing on
    other systems, or where the environment already configures malloc. Forked loader workers inherit it.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    if os.name != "posix" or not hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        return
    libc.mallopt(M_MMAP_MAX, 0)  # no mappings of their own for large blocks, which end when the block is freed
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # no return of free memory at the end of the heap


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too short, of the machine or of a GPU: NumPy and PyTorch raise different errors."""
    texts = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def usable_cores() -> int:
    """The cores that this process may use: its CPU affinity, and the CPU quota of a container rounded up."""
    from joblib import cpu_count

    return cpu_count()


def processes_here() -> int:
    """The number of processes that torchrun or accelerate launch started together on this machine."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if not text.isdecimal():
        raise InputError(f"LOCAL_WORLD_SIZE={text} is no number: start the processes with torchrun, or unset it")
    return int(text)


def default_workers(device: str) -> int:
    """Loader workers of a process that computes on `device`, by default.

    On a CPU the model needs the cores: a worker loads a sample thirty times as fast as a core trains on it.
    """
    cores = usable_cores() // processes_here()
    return cores // 8 if device == "cpu" else min(8, max(1, cores))
