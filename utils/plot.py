"""Figures; the only file that imports matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from utils.dataset import CLASSES, IGNORE, overlay, tint
from utils.files import atomic_path


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically. Figures are made without pyplot: no display, no global state."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


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
        styles = itertools.cycle([("#777777", ":"), ("#d55e00", "--"), ("#0072b2", "-.")])
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
    axis.set_title(title, fontsize=9)
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
    handles = [
        Patch(facecolor=tint(value), edgecolor="#777777", label=label)
        for value, label in ((1, CLASSES[1]), (2, CLASSES[2]), (IGNORE, "boundary, not scored"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
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
