"""How the benchmarks take time: medians over repeats, what is compared in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


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
