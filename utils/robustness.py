"""Scores on perturbed images: the variants that an evaluation scores, and their summary."""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from utils.dataset import ClassTable
from utils.figures import class_styles, save_figure
from utils.files import format_csv, write_bytes, write_json
from utils.metric import ConfusionMatrix


class Perturbation(Protocol):
    """The part of a perturbation (dataset/perturbation.py) that an evaluation uses."""

    name: str
    unit: str
    amounts: tuple[float, ...]
    draws: int  # number of noise draws: each image is scored with each of them at every level

    def __call__(self, image: Tensor, level: int, noise: Tensor | None) -> Tensor: ...


class Variant(NamedTuple):
    """A perturbation at a severity level above 0, with one draw of its random inputs. `Variant()`: the clean image."""

    perturbation: Perturbation | None = None
    level: int = 0
    draw: int = 0

    def apply(self, batch: dict[str, Any]) -> Tensor:
        """The batch's images (B, 3, H, W) uint8 in this variant; the batch holds the random inputs as `noise/NAME`."""
        if self.perturbation is None:
            return batch["image"]
        noise = batch.get(f"noise/{self.perturbation.name}")
        return self.perturbation(batch["image"], self.level, None if noise is None else noise[:, self.draw])


def list_variants(perturbations: Sequence[Perturbation]) -> list[Variant]:
    """The clean image, then every perturbation at every level above 0 and every draw."""
    return [Variant()] + [
        Variant(perturbation, level, draw)
        for perturbation in perturbations
        for draw in range(perturbation.draws)
        for level in range(1, len(perturbation.amounts))
    ]


def select_levels(counts: Tensor, variants: Sequence[Variant], perturbation: Perturbation) -> list[list[Tensor]]:
    """The counts (C, C) of one perturbation, [level][draw], from `counts` (V, C, C); level 0 is the clean image."""
    of_variant = dict(zip(variants, counts))
    return [
        [of_variant[Variant(perturbation, level, draw) if level else Variant()] for draw in range(perturbation.draws)]
        for level in range(len(perturbation.amounts))
    ]


def score_levels(levels: Sequence[Sequence[Tensor]], class_names: Sequence[str]) -> dict[str, Any]:
    """{"dice": {name: scores}, "iou": ...}: name: a class or "mean"; scores[level][draw]: a score of those counts."""
    table = [[ConfusionMatrix(class_names, counts).scores() for counts in draws] for draws in levels]
    return {
        kind: {name: [[draw[kind][name] for draw in draws] for draws in table] for name in (*class_names, "mean")}
        for kind in ("dice", "iou")
    }


def summarize_levels(scores: dict[str, Any], class_names: Sequence[str]) -> dict[str, float]:
    """`retained_last`, `retained_mean` and `area` of the mean Dice over the levels (docs/metrics.md).

    The mean is over `class_names`, the classes of the truth: a class that occurs only in predictions would change it.
    """
    levels = zip(*(scores["dice"][name] for name in class_names))
    curve = [statistics.fmean(value for draws in level for value in draws) for level in levels]
    clean = curve[0] or math.nan
    area = sum((left + right) / 2 for left, right in itertools.pairwise(curve)) / (len(curve) - 1)  # trapezoids
    return {"retained_last": curve[-1] / clean, "retained_mean": statistics.fmean(curve[1:]) / clean, "area": area}


def summarize_robustness(counts: Tensor, variants: Sequence[Variant], class_table: ClassTable) -> dict[str, Any]:
    """The content of robustness.json from counts (V, C, C): scores and summary of each perturbation, and means."""
    truth = counts[0].sum(dim=1)
    present = [name for name, pixels in zip(class_table.names, truth) if pixels]
    perturbations = dict.fromkeys(variant.perturbation for variant in variants if variant.perturbation)
    summary: dict[str, Any] = {"draws": max(one.draws for one in perturbations), "perturbations": {}}
    for perturbation in perturbations:
        scores = score_levels(select_levels(counts, variants, perturbation), class_table.names)
        about = {"unit": perturbation.unit, "amounts": list(perturbation.amounts)}
        summary["perturbations"][perturbation.name] = about | summarize_levels(scores, present) | scores
    for key in ("retained_last", "retained_mean", "area"):
        summary[key] = statistics.fmean(entry[key] for entry in summary["perturbations"].values())
    return summary


def write_robustness(out: Path, summary: dict[str, Any], class_table: ClassTable, title: str) -> str:
    """Write robustness.json, robustness.csv and robustness.png into `out`; returns the summary as text."""
    write_json(out / "robustness.json", summary)
    columns = ["perturbation", "level", "amount", "draw", "class", "dice", "iou"]
    write_bytes(out / "robustness.csv", format_csv(columns, _rows(summary)))
    save_figure(plot_robustness(summary["perturbations"], class_table, title), out / "robustness.png")
    files = [str(out / f"robustness.{suffix}") for suffix in ("json", "csv", "png")]
    return "\n".join([format_robustness(summary), *files])


def _rows(summary: dict[str, Any]) -> list[list[Any]]:
    """A row per perturbation, level, class and draw."""
    return [
        [name, level, amount, draw, label, *("" if value is None else f"{value:.6f}" for value in pair)]
        for name, entry in summary["perturbations"].items()
        for level, amount in enumerate(entry["amounts"])
        for label in entry["dice"]
        for draw, pair in enumerate(zip(entry["dice"][label][level], entry["iou"][label][level]))
    ]


def format_robustness(summary: dict[str, Any]) -> str:
    """A line per perturbation, the most harmful first, in percent."""
    lines = [f"  {'retained mean Dice, %':26}{'last level':>12}{'levels 1-9':>12}{'area':>8}"]
    entries = sorted(summary["perturbations"].items(), key=lambda item: item[1]["retained_last"])
    for name, entry in [*entries, ("mean of these", summary)]:
        values = (100 * entry[key] for key in ("retained_last", "retained_mean", "area"))
        lines.append(f"  {name:26}" + "{:>12.1f}{:>12.1f}{:>8.1f}".format(*values))
    return "\n".join(lines)


def plot_robustness(perturbations: dict[str, dict[str, Any]], class_table: ClassTable, title: str = "") -> Figure:
    """A panel per perturbation: Dice of each class and their mean over the levels; the band spans the draws."""
    figure, axes = level_panels(perturbations, title)
    styles = class_styles(class_table)
    for axis, entry in zip(axes, perturbations.values()):
        for name, levels in entry["dice"].items():
            plot_levels(axis, levels, name, *styles[name])
    entries = axes[0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=len(styles), frameon=False, fontsize=9)
    return figure


def level_panels(perturbations: dict[str, dict[str, Any]], title: str) -> tuple[Figure, list[Axes]]:
    """An empty panel per perturbation, with its amounts as ticks."""
    rows, columns = math.ceil(len(perturbations) / 4), min(len(perturbations), 4)
    figure = Figure(figsize=(1 + 3 * columns, 0.9 + 2.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in axes[len(perturbations) :]:
        axis.set_visible(False)
    for axis, (name, entry) in zip(axes, perturbations.items()):
        axis.set_title(name.replace("_", " "), fontsize=10)
        ticks = range(0, len(entry["amounts"]), 3)
        axis.set(xticks=ticks, xticklabels=[f"{entry['amounts'][tick]:g}" for tick in ticks], ylim=(0, 1))
        axis.set_xlabel(entry["unit"], fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    for axis in axes[::columns]:
        axis.set_ylabel("Dice", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure, axes[: len(perturbations)]


def plot_levels(axis: Axes, levels: Sequence[Sequence[float | None]], label: str, color: Any, style: Any) -> None:
    """A curve through the mean over the draws of each level, in a band from the lowest to the highest draw."""
    steps = range(len(levels))
    known = [[value for value in level if value is not None] or [np.nan] for level in levels]
    axis.plot(steps, [np.mean(level) for level in known], label=label, color=color, linestyle=style)
    axis.fill_between(steps, list(map(min, known)), list(map(max, known)), color=color, alpha=0.2, linewidth=0)
