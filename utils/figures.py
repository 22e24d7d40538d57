"""What all figures share: saving, grids of pictures, and the legend and line styles of the classes."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from utils.dataset import IGNORE, ClassTable
from utils.files import atomic_path

matplotlib.rcParams["text.parse_math"] = False  # "$" in the name of a file is no formula
# A name in a script that the font lacks is shown as boxes; a warning per letter would bury the scores.
warnings.filterwarnings("ignore", message="Glyph .* missing from font")


def save_figure(figure: Figure, path: Path, *, pdf: bool = False) -> None:
    """Write a figure as PNG, with `pdf` also as vector PDF beside it, atomically."""
    FigureCanvasAgg(figure)  # without pyplot: no display and no global state are needed
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    if pdf:
        with atomic_path(path.with_suffix(".pdf")) as temporary:
            figure.savefig(temporary, format="pdf", dpi=130, metadata={"CreationDate": None})  # the same run, same file


def plot_pictures(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    headings: Sequence[str],
    title: str = "",
    class_table: ClassTable | None = None,
) -> Figure:
    """A row per example: caption, then pictures (H, W, 3) uint8 under `headings`; `class_table` adds its legend."""
    figure = Figure(figsize=(2 + 2 * len(headings), 2.1 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    for row, (caption, pictures) in zip(axes, rows):
        for axis, picture in zip(row, pictures):
            show_picture(axis, picture)
        row[0].set_ylabel(caption, rotation=0, ha="right", va="center", fontsize=8)
    for axis, heading in zip(axes[0], headings):
        axis.set_title(heading, fontsize=10)
    figure.suptitle(title, fontsize=9)
    if class_table is not None:
        add_class_legend(figure, class_table)
    return figure


def plot_grid(cells: Sequence[tuple[str, np.ndarray]], columns: int, class_table: ClassTable) -> Figure:
    """A contact sheet of (caption, picture (H, W, 3) uint8)."""
    rows = math.ceil(len(cells) / columns)
    figure = Figure(figsize=(2 * columns, 2 * rows + 0.5), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, (caption, picture) in zip(axes, cells):
        show_picture(axis, picture)
        axis.set_title(caption, fontsize=7)
    for axis in axes[len(cells) :]:
        axis.set_axis_off()
    add_class_legend(figure, class_table)
    return figure


def show_picture(axis: Axes, picture: np.ndarray) -> None:
    """A picture (H, W, 3) uint8 without ticks."""
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[])


def add_class_legend(figure: Figure, class_table: ClassTable) -> None:
    """Explain the tints of all classes but the background below the figure."""
    handles = []
    for value in class_table.values[1:]:
        label = class_table.row(value).name + (", not scored" if value == IGNORE else "")
        handles.append(Patch(facecolor=class_table.plot_color(value), edgecolor="#777777", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)


def class_styles(class_table: ClassTable) -> dict[str, tuple[tuple[float, ...] | str, str]]:
    """Color and line style of each class, and of the mean over them."""
    styles = {row.name: (class_table.plot_color(value), row.line) for value, row in enumerate(class_table.rows)}
    return {**styles, "mean": ("#000000", "-")}
