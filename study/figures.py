"""Figures of several runs side by side. A run has the same color and dashes in every figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from dataset.pet_heatmap import read_points
from point_clip.scoring import mark_click
from study.runs import Run
from utils.dataset import CLICKS
from utils.figures import plot_pictures
from utils.files import fit_name
from utils.image import load_picture, to_rgb
from utils.robustness import level_panels, plot_levels

# Color (Okabe and Ito's, for color-blind readers), dashes and hatch (for grey printing) of each of several runs.
RUN_STYLES = (
    ("#000000", "-", ""), ("#d55e00", "--", "//"), ("#0072b2", "-.", "\\\\"), ("#009e73", ":", "xx"),
    ("#cc79a7", (0, (5, 1)), ".."), ("#e69f00", (0, (3, 1, 1, 1)), "--"), ("#56b4e9", (0, (1, 1)), "++"),
    ("#999999", (0, (8, 2, 1, 2)), "oo"),
)  # fmt: skip


def run_style(number: int) -> tuple[str, Any, str]:
    """Color, dashes and hatch of run `number`: after eight runs the colors repeat, with other dashes and hatches."""
    color, _, _ = RUN_STYLES[number % len(RUN_STYLES)]
    _, dashes, hatch = RUN_STYLES[(number + number // len(RUN_STYLES)) % len(RUN_STYLES)]
    return color, dashes, hatch


def plot_classes(scores: dict[str, dict[str, float | None]], order: Sequence[str], title: str) -> Figure:
    """The IoU: a group of bars per class and for the mean, a bar per run. A run's style is its place in `order`."""
    labels = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    figure = Figure(figsize=(2 + 0.45 * len(labels) * (len(scores) + 1), 3.8), layout="constrained")
    axis = figure.subplots()
    for number, (run, values) in enumerate(scores.items()):
        color, _, hatch = run_style(order.index(run))
        places = [place + (number - (len(scores) - 1) / 2) * width for place in range(len(labels))]
        heights = [np.nan if values[label] is None else 100 * values[label] for label in labels]  # None: absent class
        bars = axis.bar(places, heights, 0.92 * width, label=run, color=color, hatch=hatch, edgecolor="white")
        axis.bar_label(bars, ["" if np.isnan(height) else f"{height:.0f}" for height in heights], fontsize=7)
    axis.set(xticks=range(len(labels)), xticklabels=labels, ylabel="IoU, %", ylim=(0, 105))
    _legend_below(figure, [axis])
    figure.suptitle(title, fontsize=8)
    return figure


def plot_seeds(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """mIoU and boundary IoU of each experiment, a dot per seed and a line at the mean; `rows` are those of runs.csv."""
    names = list(dict.fromkeys(row["run"].split("/")[-1] for row in rows))
    figure = Figure(figsize=(2 + 0.75 * len(names), 3.8), layout="constrained")
    axis = figure.subplots()
    for key, label, (color, _, _), marker in (
        ("iou", "mIoU", RUN_STYLES[2], "o"),
        ("boundary_iou", "boundary IoU", RUN_STYLES[1], "s"),
    ):
        for place, name in enumerate(names):
            values = [row[key] for row in rows if row["run"].split("/")[-1] == name and row.get(key) is not None]
            axis.plot(
                [place] * len(values), values, marker, color=color, markersize=5, label=label if place == 0 else None
            )
            if values:
                axis.hlines(np.mean(values), place - 0.3, place + 0.3, color=color, linewidth=1)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set(ylabel="%")
    axis.grid(alpha=0.25, axis="y")
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=8)
    return figure


def plot_curves(logs: dict[str, Sequence[dict[str, float]]], order: Sequence[str], title: str) -> Figure:
    """Loss and mean IoU on the validation images over the epochs, a line per run."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    for axis, key, factor in ((losses, "val_loss", 1), (scores, "val_iou_mean", 100)):
        for run, rows in logs.items():
            color, dashes, _ = run_style(order.index(run))
            epochs, values = [row["epoch"] for row in rows], [factor * row.get(key, np.nan) for row in rows]
            axis.plot(epochs, values, label=run, color=color, linestyle=dashes, marker="." if len(rows) == 1 else "")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    losses.set(xlabel="epoch", ylabel="validation loss")
    scores.set(xlabel="epoch", ylabel="mean IoU on validation images, %", ylim=(0, 100))
    _legend_below(figure, [losses])
    figure.suptitle(title, fontsize=8)
    return figure


def plot_robustness(studies: dict[str, dict[str, dict[str, Any]]], order: Sequence[str], title: str) -> Figure:
    """A panel per perturbation: the mean Dice of each run over the levels."""
    panels = {name: entry for perturbations in studies.values() for name, entry in perturbations.items()}
    figure, axes = level_panels(panels, title)
    for run, perturbations in studies.items():
        color, dashes, _ = run_style(order.index(run))
        for axis, name in zip(axes, panels):
            if name in perturbations:
                plot_levels(axis, perturbations[name]["dice"]["mean"], run, color, dashes)
    _legend_below(figure, axes)
    return figure


def plot_examples(rows: Sequence[tuple[str, Any]], runs: Sequence[Run], title: str) -> Figure:
    """A row per (caption, record): the photograph, the truth and each run's mask laid over it.

    A prompted run shows the click on the pet and its mask in the color of the species, or a blank without a click.
    """
    pictures = []
    for caption, record in rows:
        photo = np.asarray(to_rgb(load_picture(record.image)))
        cells = [photo, record.class_table.overlay(photo, record.load_label())]
        for run in runs:
            path = run.folder / "test" / "masks" / fit_name(record.name, ".png")
            if not path.exists():
                cells.append(np.full_like(photo, 255))
                continue
            # A mask that was scored at another size is resized, by nearest neighbor.
            mask = load_picture(path).resize(photo.shape[1::-1], Image.Resampling.NEAREST)
            if run.prompted:
                species = np.where(np.asarray(mask) == CLICKS.value("object"), record.species, 0)
                (click,) = (click for click in read_points([record])[0] if click.on_pet)
                cells.append(mark_click(record.class_table.overlay(photo, species), click.x, click.y))
            else:
                cells.append(run.class_table.overlay(photo, run.class_table.decode_label(mask)))
        pictures.append((caption, cells))
    headings = ["photograph", "truth", *(f"{run.name}\n(a click)" if run.prompted else run.name for run in runs)]
    return plot_pictures(pictures, headings, title, rows[0][1].class_table)


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for the runs of all `axes`; an axis need not have every run."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    style = {"loc": "outside lower center", "ncols": min(4, len(entries)), "frameon": False, "fontsize": 8}
    figure.legend(entries.values(), entries, **style)
