"""python dataset/exploration.py BASE_DIR

Describe a prepared data set (report section 1.1): figures, summary.json and a table.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import run_script
from utils.dataset import IGNORE, PETS, ClassTable, foreground
from utils.files import InputError, read_json, write_json

if TYPE_CHECKING:  # heavy imports come after parsing, so that --help answers immediately
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dataset.pet import Record

GRID = 128  # edge in pixels of the position maps
PHOTOGRAPHS = 24  # on the contact sheet
COLUMNS = 6  # of the contact sheet


class Measured(NamedTuple):
    """One photograph: breed, species, size, label pixels by class (IGNORE: boundary), and the position of its pet."""

    name: str
    breed: str
    species: int
    width: int
    height: int
    pixels: dict[int, int]
    pet: np.ndarray  # (GRID, GRID) bool
    class_table: ClassTable = PETS

    @property
    def pet_share(self) -> float:
        """Share of the pixels that are pet, without the boundary."""
        known = sum(count for value, count in self.pixels.items() if value != IGNORE)
        return self.pixels.get(self.species, 0) / known if known else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_dir", type=Path, metavar="BASE_DIR", help="folder prepared by dataset/dataset_prep.py")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: BASE_DIR/exploration)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the contact sheet (default: 0)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed: at least 0, got {args.seed}")

    from dataset.pet import find_records, is_synthetic
    from utils.figures import save_figure

    report = args.base_dir / "prep_report.json"
    counts = read_json(report)["counts"] if report.is_file() else {}
    splits = [split for split in ("TrainVal", "Test") if not counts or any(counts[split].values())]
    if not splits:
        raise InputError(f"{args.base_dir} holds no image. {report} lists the files that were left out.")
    records = {split: find_records(args.base_dir, split) for split in splits}
    measured = {split: measure(split, records[split]) for split in splits}
    summary = summarize(measured)
    out = args.out or args.base_dir / "exploration"
    write_json(out / "summary.json", {"synthetic": is_synthetic(args.base_dir), **summary})
    figures = plot_data(measured, summary)
    figures["photographs"] = plot_sheet([record for split in records.values() for record in split], args.seed)
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    print(format_summary(args.base_dir, summary))
    print("\n".join(str(path) for path in sorted(out.iterdir()) if path.suffix in (".png", ".json")))


def measure(split: str, records: Sequence[Record]) -> list[Measured]:
    """Read every label and the header of every photograph, in several threads."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from utils.image import picture_size, resize_mask

    def one(record: Record) -> Measured:
        label = record.load_label()
        values, counts = np.unique(label, return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist()))
        breed = record.name.rpartition("_")[0] or record.name
        pet = foreground(resize_mask(label, GRID))
        size = picture_size(record.image)
        return Measured(record.name, breed, record.species, *size, pixels, pet, record.class_table)

    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(one, records), desc=split, total=len(records), unit="image", leave=False))


def summarize(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Counts and distributions, as written to summary.json; shares in 0..1."""
    from dataset.pet import balance

    everything = [image for images in measured.values() for image in images]
    class_table = everything[0].class_table
    breeds = Counter((class_table.names[image.species], image.breed) for image in everything)

    def species_counts(images: Sequence[Measured]) -> dict[str, int]:
        return {
            folder: sum(image.species == value for image in images) for folder, value in class_table.species.items()
        }

    def pixel_shares(images: Sequence[Measured]) -> dict[str, float]:
        total = sum((Counter(image.pixels) for image in images), Counter())
        values = (*range(len(class_table)), IGNORE)
        return {class_table.row(value).name: total[value] / total.total() for value in values}

    def spread(values: Sequence[float]) -> dict[str, float] | None:
        if not len(values):
            return None
        names = ("min", "5 %", "median", "95 %", "max")
        return dict(zip(names, np.quantile(values, (0, 0.05, 0.5, 0.95, 1)).round(4).tolist()))

    summary: dict[str, Any] = {
        "images": {split: species_counts(images) for split, images in measured.items()},
        "breeds": {f"{name} ({species})": count for (species, name), count in sorted(breeds.items())},
        "width": spread([image.width for image in everything]),
        "height": spread([image.height for image in everything]),
        "aspect_ratio": spread([image.width / image.height for image in everything]),
        "pixel_share": {split: pixel_shares(images) for split, images in measured.items()},
        "pet_share": {
            folder: spread([image.pet_share for image in everything if image.species == value])
            for folder, value in class_table.species.items()
        },
    }
    if "TrainVal" in measured and all(summary["images"]["TrainVal"].values()):  # one species cannot be balanced
        images = measured["TrainVal"]
        repeated = [images[index] for index in balance(images, range(len(images)))]
        summary["images"]["TrainVal, balanced"] = species_counts(repeated)
        summary["pixel_share"]["TrainVal, balanced"] = pixel_shares(repeated)
    return summary


def plot_data(measured: dict[str, list[Measured]], summary: dict[str, Any]) -> dict[str, Figure]:
    """The figures of the numbers, by name: species, breeds, sizes, pixels, places."""
    everything = [image for images in measured.values() for image in images]
    table = everything[0].class_table
    groups = {value: [image for image in everything if image.species == value] for value in table.species.values()}
    groups = {value: images for value, images in groups.items() if images}
    shares = {value: [image.pet_share for image in images] for value, images in groups.items()}
    return {
        "species": plot_species(summary["images"], table),
        "breeds": plot_breeds(summary["breeds"], table),
        "sizes": plot_sizes({v: [(one.width, one.height) for one in group] for v, group in groups.items()}, table),
        "pixels": plot_pixels(summary["pixel_share"], shares, table),
        "places": plot_places({v: np.mean([one.pet for one in group], axis=0) for v, group in groups.items()}, table),
    }


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def plot_species(counts: dict[str, dict[str, int]], class_table: ClassTable) -> Figure:
    """Bars of the number of images per species in each part of the data."""
    figure = new_figure(1.5 + 1.8 * len(counts), 3.4)
    axis = figure.subplots()
    width = 0.8 / len(class_table.species)
    for number, (folder, value) in enumerate(class_table.species.items()):
        offset = (number - (len(class_table.species) - 1) / 2) * width
        values = [part[folder] for part in counts.values()]
        places = [place + offset for place in range(len(counts))]
        bars = axis.bar(places, values, 0.95 * width, label=folder, **bar_style(class_table, value))
        axis.bar_label(bars, fontsize=8)
    axis.set(xticks=range(len(counts)), xticklabels=counts, ylabel="images")
    axis.margins(y=0.12)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_breeds(counts: dict[str, int], class_table: ClassTable) -> Figure:
    """A bar per breed; breeds are named "Breed (cat)" or "breed (dog)"."""
    figure = new_figure(6, 1 + 0.22 * len(counts))
    axis = figure.subplots()
    names = list(counts)[::-1]
    for folder, value in class_table.species.items():
        own = [name for name in names if name.endswith(f"({class_table.names[value]})")]
        if own:
            places, values = [names.index(name) for name in own], [counts[name] for name in own]
            bars = axis.barh(places, values, label=folder, **bar_style(class_table, value))
            axis.bar_label(bars, fontsize=7, padding=2)
    labels = [name.rpartition(" ")[0].replace("_", " ") for name in names]
    axis.set_yticks(range(len(names)), labels, fontsize=8)
    axis.set(xlabel="images", ylim=(-0.6, len(names) - 0.4))
    axis.margins(x=0.12)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_sizes(sizes: dict[int, Sequence[tuple[int, int]]], class_table: ClassTable) -> Figure:
    """Width against height of the photographs, and the distribution of their aspect ratios, by species."""
    figure = new_figure(9, 3.6)
    scatter, histogram = figure.subplots(1, 2)
    ratios = {value: [width / height for width, height in pairs] for value, pairs in sizes.items()}
    for value, pairs in sizes.items():
        style = {"color": class_table.plot_color(value), "alpha": 0.35, "markersize": 3, "linestyle": ""}
        scatter.plot(*zip(*pairs), class_table.row(value).marker, label=class_table.row(value).folder, **style)
    scatter.set(xlabel="width, pixels", ylabel="height, pixels")
    scatter.legend(frameon=False, fontsize=8)
    every = [ratio for group in ratios.values() for ratio in group]
    bins = np.linspace(min(every) - 0.05, max(every) + 0.05, 31)
    plot_histograms(histogram, ratios, "width / height", bins, class_table)
    return figure


def plot_pixels(
    shares: dict[str, dict[str, float]], pet_shares: dict[int, Sequence[float]], class_table: ClassTable
) -> Figure:
    """The share of pixels of each class in each part of the data, and the share of each photograph that is pet."""
    figure = new_figure(10, 3.6)
    bars, histogram = figure.subplots(1, 2)
    left = np.zeros(len(shares))
    for value in (*range(len(class_table)), IGNORE):
        name = class_table.row(value).name
        values = np.array([100 * part[name] for part in shares.values()])
        style = bar_style(class_table, value) | {"edgecolor": "#777777", "linewidth": 0.5}
        drawn = bars.barh(range(len(shares)), values, left=left, label=name, **style)
        bars.bar_label(
            drawn, [f"{value:.0f}" for value in values], label_type="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        left += values
    bars.set_yticks(range(len(shares)), list(shares))
    bars.invert_yaxis()
    bars.set(xlabel="share of the pixels, %", xlim=(0, 100))
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=4, frameon=False, fontsize=8)
    percent = {value: [100 * share for share in group] for value, group in pet_shares.items()}
    label = "share of the photograph that is pet, %"
    plot_histograms(histogram, percent, label, np.linspace(0, 100, 26), class_table)
    return figure


def plot_places(places: dict[int, np.ndarray], class_table: ClassTable) -> Figure:
    """How often a pet covers each position: maps (H, W) in 0..1 over width and height in percent, by species."""
    figure = new_figure(1 + 3.4 * len(places), 3.4)
    axes = np.atleast_1d(figure.subplots(1, len(places), sharey=True))
    for axis, (value, share) in zip(axes, places.items()):
        image = axis.imshow(100 * share, cmap="viridis", vmin=0, vmax=100, extent=(0, 100, 100, 0))
        axis.set(title=class_table.row(value).folder, xlabel="width, %")
    axes[0].set_ylabel("height, %")
    figure.colorbar(image, ax=list(axes), label="photographs with a pet there, %")
    return figure


def plot_sheet(records: Sequence[Record], seed: int) -> Figure:
    """A contact sheet of random photographs with their labels laid over them."""
    from utils.figures import add_class_legend
    from utils.image import load_picture, to_rgb

    chosen = np.random.default_rng(seed).choice(len(records), min(PHOTOGRAPHS, len(records)), replace=False)
    rows = math.ceil(len(chosen) / COLUMNS)
    figure = new_figure(2 * COLUMNS, 2 * rows + 0.5)
    axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, index in zip(axes, sorted(chosen)):
        record = records[index]
        photo = np.asarray(to_rgb(load_picture(record.image)))
        axis.imshow(record.class_table.overlay(photo, record.load_label()))
        axis.set_title(record.name, fontsize=7)
    add_class_legend(figure, records[0].class_table)
    return figure


def plot_histograms(
    axis: Axes, values: dict[int, Sequence[float]], label: str, bins: np.ndarray, class_table: ClassTable
) -> None:
    """Histograms of values by species, laid over each other."""
    for value, group in values.items():
        style = bar_style(class_table, value) | {"edgecolor": class_table.plot_color(value), "alpha": 0.5}
        axis.hist(group, bins, label=class_table.row(value).folder, histtype="stepfilled", **style)
    axis.set(xlabel=label, ylabel="images")
    axis.legend(frameon=False, fontsize=8)


def bar_style(class_table: ClassTable, value: int) -> dict[str, Any]:
    """Color and hatch of a class's bars."""
    return {"color": class_table.plot_color(value), "hatch": class_table.row(value).hatch, "edgecolor": "white"}


def format_summary(base: Path, summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    species = list(next(iter(summary["images"].values())))
    lines = [f"{base}: {len(summary['breeds'])} breeds", f"  {'':20}" + "".join(f"{folder:>8}" for folder in species)]
    for name, counts in summary["images"].items():
        lines.append(f"  {name:20}" + "".join(f"{counts[folder]:>8}" for folder in species))
    names = list(next(iter(summary["pixel_share"].values())))
    lines.append(f"  {'pixels, %':20}" + "".join(f"{name:>12}" for name in names))
    for split, shares in summary["pixel_share"].items():
        lines.append(f"  {split:20}" + "".join(f"{100 * shares[name]:>12.1f}" for name in names))
    lines.append(f"  {'':20}" + "".join(f"{name:>10}" for name in summary["width"]))
    rows = {"width, pixels": (summary["width"], ".0f"), "height, pixels": (summary["height"], ".0f")}
    rows["width / height"] = (summary["aspect_ratio"], ".2f")
    rows |= {f"{folder}, share": (values, ".2f") for folder, values in summary["pet_share"].items() if values}
    lines += [
        f"  {name:20}" + "".join(f"{v:>10{form}}" for v in values.values()) for name, (values, form) in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
