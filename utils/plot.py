"""Figures; the only file that imports matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from utils.dataset import CLASSES, IGNORE, overlay, tint
from utils.files import atomic_path


def save_figure(figure: Figure, path: Path, *, pdf: bool = False) -> None:
    """Write a figure as PNG, with `pdf` also as vector PDF beside it, atomically.

    Figures are made without pyplot: no display, no global state.
    """
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    if pdf:
        with atomic_path(path.with_suffix(".pdf")) as temporary:
            figure.savefig(temporary, format="pdf", dpi=130, metadata={"CreationDate": None})  # same run, same file


def plot_curves(path: Path, rows: Sequence[dict[str, float]]) -> None:
    """Losses, and where the rows have it the IoU per class on the validation images, over the epochs."""
    scored = "val_iou_mean" in rows[0]
    figure = Figure(figsize=(10 if scored else 5, 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 + scored))
    epochs = [row["epoch"] for row in rows]
    axes[0].plot(epochs, [row["train_loss"] for row in rows], label="training", color="#0072b2")
    axes[0].plot(epochs, [row["val_loss"] for row in rows], label="validation", color="#d55e00", linestyle="--")
    best = min(rows, key=lambda row: row["val_loss"])
    axes[0].plot(best["epoch"], best["val_loss"], "o", color="#d55e00", label=f"best.pt (epoch {best['epoch']})")
    axes[0].set(xlabel="epoch", ylabel="loss")
    if scored:
        names = [key.removeprefix("val_iou_") for key in rows[0] if key.startswith("val_iou_")]
        styles = itertools.cycle(LOOKS)
        for name in names:
            color, style = ("#000000", "-") if name == "mean" else next(styles)
            values = [np.nan if row[f"val_iou_{name}"] is None else row[f"val_iou_{name}"] for row in rows]
            axes[1].plot(epochs, values, label=name, color=color, linestyle=style)
        axes[1].set(xlabel="epoch", ylabel="IoU on validation images", ylim=(0, 1))
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    save_figure(figure, path)


# A look for each class: colors that color-blind readers tell apart, dashes that survive grey printing.
LOOKS = (("#777777", ":"), ("#d55e00", "--"), ("#0072b2", "-."))


def plot_robustness(
    path: Path, perturbations: dict[str, dict[str, Any]], class_names: Sequence[str], title: str = ""
) -> None:
    """A panel per perturbation: Dice of each class and their mean over the levels; the band is the spread of draws."""
    figure, axes = draw_levels(perturbations, title)
    for axis, entry in zip(axes, perturbations.values()):
        for label, (color, style) in zip((*class_names, "mean"), (*LOOKS[: len(class_names)], ("#000000", "-"))):
            plot_levels(axis, entry["dice"][label], label, color, style)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save_figure(figure, path)


def draw_levels(perturbations: dict[str, dict[str, Any]], title: str) -> tuple[Figure, list[Axes]]:
    """An empty panel per perturbation, with its amounts as ticks."""
    rows = math.ceil(len(perturbations) / 4)
    columns = min(len(perturbations), 4)
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


def plot_levels(axis: Axes, levels: Sequence[Sequence[float | None]], label: str, color: str, style: Any) -> None:
    """A curve through the means of the draws of each level, in a band from the lowest to the highest draw."""
    values = [[np.nan if value is None else value for value in level] for level in levels]
    steps = range(len(values))
    known = [[value for value in level if not np.isnan(value)] or [np.nan] for level in values]
    axis.plot(steps, [np.mean(level) for level in known], label=label, color=color, linestyle=style)
    axis.fill_between(steps, list(map(min, known)), list(map(max, known)), color=color, alpha=0.2, linewidth=0)


# A look for each of several runs: color (Okabe and Ito's, for the color-blind), dashes and hatch (for grey printing).
RUN_LOOKS = (
    ("#000000", "-", ""), ("#d55e00", "--", "//"), ("#0072b2", "-.", "\\\\"), ("#009e73", ":", "xx"),
    ("#cc79a7", (0, (5, 1)), ".."), ("#e69f00", (0, (3, 1, 1, 1)), "--"), ("#56b4e9", (0, (1, 1)), "++"),
    ("#999999", (0, (8, 2, 1, 2)), "oo"),
)  # fmt: skip


def _look(number: int) -> tuple[str, Any, str]:
    """Color, dashes and hatch of run `number`: after eight the colors come again, with other dashes and hatches."""
    color, _, _ = RUN_LOOKS[number % len(RUN_LOOKS)]
    _, dashes, hatch = RUN_LOOKS[(number + number // len(RUN_LOOKS)) % len(RUN_LOOKS)]
    return color, dashes, hatch


def plot_classes(path: Path, scores: dict[str, dict[str, float | None]], order: Sequence[str], title: str) -> None:
    """A group of bars per class and for the mean, a bar per run: the IoU. `order`: all runs, for the same looks."""
    labels = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    figure = Figure(figsize=(2 + 0.45 * len(labels) * (len(scores) + 1), 3.8), layout="constrained")
    axis = figure.subplots()
    for number, (run, values) in enumerate(scores.items()):
        color, _, hatch = _look(order.index(run))
        places = [place + (number - (len(scores) - 1) / 2) * width for place in range(len(labels))]
        heights = [np.nan if values[label] is None else 100 * values[label] for label in labels]  # None: no such class
        bars = axis.bar(places, heights, 0.92 * width, label=run, color=color, hatch=hatch, edgecolor="white")
        axis.bar_label(bars, ["" if np.isnan(height) else f"{height:.0f}" for height in heights], fontsize=7)
    axis.set(xticks=range(len(labels)), xticklabels=labels, ylabel="IoU, %", ylim=(0, 105))
    _legend_below(figure, [axis])
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path, pdf=True)


def plot_all_curves(path: Path, logs: dict[str, Sequence[dict[str, float]]], order: Sequence[str], title: str) -> None:
    """Loss and mean IoU on the validation images over the epochs, a line per run."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for run, rows in logs.items():
        color, style, _ = _look(order.index(run))
        epochs = [row["epoch"] for row in rows]
        for axis, key, factor in ((axes[0], "val_loss", 1), (axes[1], "val_iou_mean", 100)):
            values = [factor * row.get(key, np.nan) for row in rows]
            axis.plot(epochs, values, label=run, color=color, linestyle=style, marker="." if len(rows) == 1 else "")
    axes[0].set(xlabel="epoch", ylabel="validation loss")
    axes[1].set(xlabel="epoch", ylabel="mean IoU on validation images, %", ylim=(0, 100))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    _legend_below(figure, axes[:1])
    figure.suptitle(title, fontsize=8)
    save_figure(figure, path, pdf=True)


def plot_all_robustness(
    path: Path, swept: dict[str, dict[str, dict[str, Any]]], order: Sequence[str], title: str
) -> None:
    """A panel per perturbation, in it the mean Dice of each run over the levels."""
    panels = {name: entry for perturbations in swept.values() for name, entry in perturbations.items()}
    figure, axes = draw_levels(panels, title)
    for run, perturbations in swept.items():
        color, style, _ = _look(order.index(run))
        for axis, name in zip(axes, panels):
            if name in perturbations:
                plot_levels(axis, perturbations[name]["dice"]["mean"], run, color, style)
    _legend_below(figure, axes)
    save_figure(figure, path, pdf=True)


def plot_comparison(
    path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], headings: Sequence[str], title: str
) -> None:
    """A row per photograph: its caption, then the photograph, the truth and each run's prediction laid over it."""
    figure = draw_pictures(rows, headings, title)
    _explain_tints(figure)
    save_figure(figure, path, pdf=True)


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for everything in `axes`, of which not all hold every run."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(4, len(entries)), frameon=False,
                  fontsize=8)  # fmt: skip


def plot_perturbations(
    path: Path, rows: Sequence[tuple[str, str, Sequence[float], Sequence[np.ndarray]]], title: str
) -> None:
    """A row per (name, unit, amounts, pictures): a picture (H, W, 3) uint8 per level, its amount above it."""
    columns = len(rows[0][3])
    figure = Figure(figsize=(1.6 + 1.1 * columns, 0.5 + 1.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, unit, amounts, pictures) in zip(axes, rows):
        for axis, amount, picture in zip(row, amounts, pictures):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
            axis.set_title(f"{amount:g}", fontsize=8)
        row[0].set_ylabel(f"{name.replace('_', ' ')}\n{unit}", rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9)
    save_figure(figure, path)


# The two species, in bars and points: color, hatch for grey printing, mark.
SPECIES_LOOKS = {"cats": ("#d55e00", "", "o"), "dogs": ("#0072b2", "//", "^")}


def plot_species(path: Path, counts: dict[str, dict[str, int]]) -> None:
    """Bars of the number of cats and dogs in each part of the data."""
    figure = Figure(figsize=(1.5 + 1.8 * len(counts), 3.4), layout="constrained")
    axis = figure.subplots()
    for offset, (folder, (color, hatch, _)) in zip((-0.2, 0.2), SPECIES_LOOKS.items()):
        places = [place + offset for place in range(len(counts))]
        values = [part[folder] for part in counts.values()]
        bars = axis.bar(places, values, 0.38, label=folder, color=color, hatch=hatch, edgecolor="white")
        axis.bar_label(bars, fontsize=8)
    axis.set(xticks=range(len(counts)), xticklabels=counts, ylabel="images")
    axis.margins(y=0.12)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_breeds(path: Path, counts: dict[str, int]) -> None:
    """A bar per breed, named "Breed (cat)" or "breed (dog)"."""
    figure = Figure(figsize=(6, 1 + 0.22 * len(counts)), layout="constrained")
    axis = figure.subplots()
    names = list(counts)[::-1]
    for folder, (color, hatch, _) in SPECIES_LOOKS.items():
        own = [name for name in names if name.endswith(f"({folder[:-1]})")]
        if own:
            bars = axis.barh([names.index(name) for name in own], [counts[name] for name in own], label=folder,
                             color=color, hatch=hatch, edgecolor="white")  # fmt: skip
            axis.bar_label(bars, fontsize=7, padding=2)
    labels = [name.rpartition(" ")[0].replace("_", " ") for name in names]
    axis.set_yticks(range(len(names)), labels, fontsize=8)
    axis.set(xlabel="images", ylim=(-0.6, len(names) - 0.4))
    axis.margins(x=0.12)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    save_figure(figure, path)


def plot_sizes(path: Path, sizes: dict[str, Sequence[tuple[int, int]]]) -> None:
    """Width against height of the photographs, and how many have which aspect ratio."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    scatter, histogram = figure.subplots(1, 2)
    ratios = {folder: [width / height for width, height in pairs] for folder, pairs in sizes.items()}
    for folder, pairs in sizes.items():
        color, _, mark = SPECIES_LOOKS[folder]
        scatter.plot(*zip(*pairs), mark, label=folder, color=color, alpha=0.35, markersize=3, linestyle="")
    scatter.set(xlabel="width, pixels", ylabel="height, pixels")
    scatter.legend(frameon=False, fontsize=8)
    _histograms(histogram, ratios, "width / height", np.linspace(*_limits(ratios), 31))
    save_figure(figure, path)


def plot_pixels(path: Path, shares: dict[str, dict[str, float]], pet_shares: dict[str, Sequence[float]]) -> None:
    """Share of the pixels that each class has in each part of the data, and of each photograph that is pet."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, histogram = figure.subplots(1, 2)
    left = np.zeros(len(shares))
    looks = (("#dddddd", ""), ("#d55e00", ""), ("#0072b2", "//"), ("#ffffff", "xx"))
    for name, (color, hatch) in zip(next(iter(shares.values())), looks):
        values = np.array([100 * part[name] for part in shares.values()])
        drawn = bars.barh(range(len(shares)), values, left=left, label=name, color=color, hatch=hatch,
                          edgecolor="#777777", linewidth=0.5)  # fmt: skip
        bars.bar_label(
            drawn, [f"{value:.0f}" for value in values], label_type="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        left += values
    bars.set_yticks(range(len(shares)), list(shares))
    bars.invert_yaxis()
    bars.set(xlabel="share of the pixels, %", xlim=(0, 100))
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=4, frameon=False, fontsize=8)
    values = {folder: [100 * share for share in group] for folder, group in pet_shares.items()}
    _histograms(histogram, values, "share of the photograph that is pet, %", np.linspace(0, 100, 26))
    save_figure(figure, path)


def plot_places(path: Path, places: dict[str, np.ndarray]) -> None:
    """How often each place of a photograph is pet: maps (H, W) in 0..1 over width and height in percent."""
    figure = Figure(figsize=(1 + 3.4 * len(places), 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(places), sharey=True))
    for axis, (folder, share) in zip(axes, places.items()):
        image = axis.imshow(100 * share, cmap="viridis", vmin=0, vmax=100, extent=(0, 100, 100, 0))
        axis.set(title=folder, xlabel="width, %")
    axes[0].set_ylabel("height, %")
    figure.colorbar(image, ax=list(axes), label="photographs with a pet there, %")
    save_figure(figure, path)


def plot_sheet(path: Path, cells: Sequence[tuple[str, np.ndarray]], columns: int = 6) -> None:
    """A contact sheet of (caption, picture (H, W, 3)); the classes in the pictures are explained below."""
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(2 * columns, 2 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (caption, picture) in zip(axes, cells):
        axis.imshow(picture)
        axis.set_title(caption, fontsize=7)
    _explain_tints(figure)
    save_figure(figure, path)


def _histograms(axis: Axes, values: dict[str, Sequence[float]], label: str, bins: np.ndarray) -> None:
    for folder, group in values.items():
        color, hatch, _ = SPECIES_LOOKS[folder]
        axis.hist(
            group, bins, label=folder, histtype="stepfilled", alpha=0.5, color=color, edgecolor=color, hatch=hatch
        )
    axis.set(xlabel=label, ylabel="images")
    axis.legend(frameon=False, fontsize=8)


def _limits(values: dict[str, Sequence[float]]) -> tuple[float, float]:
    every = [value for group in values.values() for value in group]
    return min(every) - 0.05, max(every) + 0.05


def _explain_tints(figure: Figure) -> None:
    handles = [
        Patch(facecolor=tint(value), edgecolor="#777777", label=label)
        for value, label in ((1, CLASSES[1]), (2, CLASSES[2]), (IGNORE, "boundary, not scored"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def plot_confusion(path: Path, counts: np.ndarray, class_names: Sequence[str], title: str = "") -> None:
    """The confusion matrix (C, C), row = truth: share of each true class, and millions of pixels."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(class_names)
    figure = Figure(figsize=(1.6 + 1.1 * size, 1.2 + 1.0 * size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row in range(size):
        for column in range(size):
            color = "white" if share[row, column] > 0.5 else "black"
            text = f"{share[row, column]:.1%}\n{counts[row, column] / 1e6:.2f} M px"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axis.set(
        xticks=range(size),
        xticklabels=class_names,
        yticks=range(size),
        yticklabels=class_names,
        xlabel="predicted class",
        ylabel="true class",
    )
    figure.suptitle(title, fontsize=8)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    save_figure(figure, path)


def plot_predictions(
    path: Path, rows: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]], title: str = ""
) -> None:
    """A row per example: photograph (H, W, 3), truth and prediction (H, W) laid over it, its caption on the left."""
    pictures = [
        (caption, [photo, overlay(photo, truth), overlay(photo, prediction)])
        for caption, photo, truth, prediction in rows
    ]
    figure = draw_pictures(pictures, ("photograph", "truth", "prediction"), title)
    _explain_tints(figure)
    save_figure(figure, path)


def plot_pictures(
    path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], headings: Sequence[str], title: str = ""
) -> None:
    """A row per example: its caption on the left, then pictures (H, W, 3) uint8 under `headings`."""
    save_figure(draw_pictures(rows, headings, title), path)


def draw_pictures(rows: Sequence[tuple[str, Sequence[np.ndarray]]], headings: Sequence[str], title: str) -> Figure:
    """The figure of `plot_pictures`."""
    figure = Figure(figsize=(2 + 2 * len(headings), 2.1 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    for row, (caption, pictures) in zip(axes, rows):
        for axis, picture in zip(row, pictures):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=8)
    for axis, heading in zip(axes[0], headings):
        axis.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=9)
    return figure
