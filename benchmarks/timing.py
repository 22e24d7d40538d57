"""Compare the speed of variants."""

from collections.abc import Callable
from statistics import median

import torch
from torch.utils.benchmark import timer  # waits until the GPU has finished

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare(repeats: int, variants: dict[str, Callable[[], object]], count: int = 1, *, rate: bool = False) -> dict:
    """Seconds of each variant divided by `count`, or with `rate` the inverse; and their ratios to the first variant's.

    Each repeat measures all variants, in alternating order, and forms the ratios; the first one is not counted.
    """
    values: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name in list(variants)[:: 1 if repeat % 2 else -1]:
            began = timer()
            variants[name]()
            seconds = timer() - began
            values[name].append(count / seconds if rate else seconds / count)
    return summarize({name: row[1:] for name, row in values.items()})


def summarize(values: dict[str, list[float]]) -> dict:
    """Median, minimum and maximum of each variant's values, and of their ratios to the first variant's."""
    first, *others = values
    ratios = {f"{name}/{first}": [a / b for a, b in zip(values[name], values[first])] for name in others}
    rows = (values | ratios).items()
    return {name: {f.__name__: float(f"{f(row):.4g}") for f in (median, min, max)} for name, row in rows}
