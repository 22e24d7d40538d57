"""How the benchmarks take time and memory: medians over repeats, what is compared in turn."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turn(repeats: int, **works: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each work, one after the other and then in reverse, `repeats` times after a round not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(repeats + 1):
        for name, work in list(works.items())[:: 1 if round_number % 2 else -1]:
            elapsed = timed(work)
            if round_number:
                seconds[name].append(elapsed)
    return seconds


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    return {"median": round(statistics.median(values), digits), "min": round(min(values), digits),
            "max": round(max(values), digits)}  # fmt: skip


def peak_memory(device: torch.device, work: Callable[[], object]) -> float | None:
    """MiB that `work` takes at its peak beyond what there was: of the GPU, or of the process (Linux; else None)."""
    import torch

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

    def resident(line: str) -> int:
        return next(int(row.split()[1]) for row in status.read_text().splitlines() if row.startswith(line))  # in KiB

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or the work would take it without being noticed
    reset.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    return round((resident("VmHWM") - before) / 2**10, 1)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
