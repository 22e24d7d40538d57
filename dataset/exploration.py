"""python dataset/exploration.py BASE_DIR

Describe a prepared data set (report section 1.1): figures, summary.json and a table.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.originals import SPLITS
from utils.config import flag, parse
from utils.dataset import IGNORE, PETS, ClassTable, foreground
from utils.files import read_json, write_json
from utils.image import load_picture, picture_size, resize_mask, to_rgb
from utils.script import run_script

if TYPE_CHECKING:  # heavy imports come after parsing, so that --help answers immediately
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from dataset.pet import Record

GRID = 128  # edge in pixels of the position maps
PHOTOGRAPHS, AUGMENTED, COLUMNS = 24, 4, 6  # photographs on the contact sheet and on the augmented one, and columns


class Measured(NamedTuple):
    """The measurements of one photograph."""

    name: str
    breed: str
    species: int
    width: int
    height: int
    pixels: dict[int, int]  # number of label pixels of each class (IGNORE: boundary)
    pet: np.ndarray  # (GRID, GRID) bool: where the pet is
    class_table: ClassTable = PETS

    @property
    def pet_share(self) -> float:
        """Share of the pixels that are pet, without the boundary."""
        known = sum(count for value, count in self.pixels.items() if value != IGNORE)
        return self.pixels.get(self.species, 0) / known if known else 0.0


Groups = dict[int, list[Measured]]  # the photographs of each species


@dataclass
class Config:
    """The flags."""

    base_dir: Path = flag(None, "folder prepared by dataset/dataset_prep.py", positional=True)
    out: Path | None = flag(None, "folder of the figures (default: BASE_DIR/exploration)")
    seed: int = flag(0, "seed of the contact sheets", low=0)


def main() -> None:
    config = parse(Config, __doc__)
    base = config.base_dir

    from dataset.pet import find_records, is_synthetic
    from utils.figures import save_figure

    report = base / "prep_report.json"
    counts = read_json(report)["counts"] if report.is_file() else {}
    splits = [split for split in counts if any(counts[split].values())] or SPLITS  # of no image: find_records raises
    records = {split: find_records(base, split) for split in splits}
    measured = {split: measure(split, records[split]) for split in splits}
    summary, out = summarize(measured), config.out or base / "exploration"
    write_json(out / "summary.json", {"synthetic": is_synthetic(base), **summary})
    figures = plot_data(measured, summary)
    figures["photographs"] = plot_sheet([record for split in records.values() for record in split], config.seed)
    figures["augmented"] = plot_augmented(records[splits[0]], config.seed)
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    print(format_summary(base, summary))
    print("\n".join(str(path) for path in sorted(out.iterdir()) if path.suffix in (".png", ".json")))


def measure(split: str, records: Sequence[Record]) -> list[Measured]:
    """Read every label and the header of every photograph, in several threads."""

    def one(record: Record) -> Measured:
        label = record.load_label()
        pixels = dict(zip(*(part.tolist() for part in np.unique(label, return_counts=True))))
        breed, size = record.name.rpartition("_")[0] or record.name, picture_size(record.image)
        pet = foreground(resize_mask(label, GRID))
        return Measured(record.name, breed, record.species, *size, pixels, pet, record.class_table)

    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(one, records), desc=split, total=len(records), unit="image", leave=False))


def summarize(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Counts and distributions, as written to summary.json; shares in 0..1."""
    from dataset.pet import balance

    everything = [image for images in measured.values() for image in images]
    class_table = everything[0].class_table
    species = class_table.species
    breeds = Counter((class_table.names[image.species], image.breed) for image in everything)

    def species_counts(images: Sequence[Measured]) -> dict[str, int]:
        return {folder: sum(image.species == value for image in images) for folder, value in species.items()}

    def pixel_shares(images: Sequence[Measured]) -> dict[str, float]:
        total = sum((Counter(image.pixels) for image in images), Counter())
        return {class_table.row(value).name: total[value] / total.total() for value in class_table.values}

    def spread(values: Sequence[float]) -> dict[str, float] | None:
        levels = {"min": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "max": 1}
        return dict(zip(levels, np.quantile(values, list(levels.values())).round(4).tolist())) if values else None

    summary: dict[str, Any] = {
        "images": {split: species_counts(images) for split, images in measured.items()},
        "breeds": {f"{name} ({kind})": count for (kind, name), count in sorted(breeds.items())},
        "width": spread([image.width for image in everything]),
        "height": spread([image.height for image in everything]),
        "aspect_ratio": spread([image.width / image.height for image in everything]),
        "pixel_share": {split: pixel_shares(images) for split, images in measured.items()},
        "pet_share": {
            folder: spread([image.pet_share for image in everything if image.species == value])
            for folder, value in species.items()
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
    table, present = everything[0].class_table, sorted({image.species for image in everything})
    groups = {value: [image for image in everything if image.species == value] for value in present}
    return {
        "species": plot_species(summary["images"], table),
        "breeds": plot_breeds(summary["breeds"], table),
        "sizes": plot_sizes(groups, table),
        "pixels": plot_pixels(summary["pixel_share"], groups, table),
        "places": plot_places(groups, table),
    }


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches with a row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **options)[0])


def bar_style(class_table: ClassTable, value: int, edge: str = "white") -> dict[str, Any]:
    """Color, hatch and edge of a class's bars."""
    return {"color": class_table.plot_color(value), "hatch": class_table.row(value).hatch, "edgecolor": edge}


def plot_species(counts: dict[str, dict[str, int]], class_table: ClassTable) -> Figure:
    """Bars of the number of images per species in each part of the data."""
    figure, [axis] = new_figure(1.5 + 1.8 * len(counts), 3.4)
    width = 0.8 / len(class_table.species)
    for number, (folder, value) in enumerate(class_table.species.items()):
        places = np.arange(len(counts)) + (number - (len(class_table.species) - 1) / 2) * width
        heights = [part[folder] for part in counts.values()]
        bars = axis.bar(places, heights, 0.95 * width, label=folder, **bar_style(class_table, value))
        axis.bar_label(bars, fontsize=8)
    axis.set(xticks=range(len(counts)), xticklabels=counts, ylabel="images")
    axis.margins(y=0.12)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_breeds(counts: dict[str, int], class_table: ClassTable) -> Figure:
    """A bar per breed; breeds are named "Breed (cat)" or "breed (dog)"."""
    figure, [axis] = new_figure(6, 1 + 0.22 * len(counts))
    names = list(counts)[::-1]
    for folder, value in class_table.species.items():
        places = [place for place, name in enumerate(names) if name.endswith(f"({class_table.names[value]})")]
        if places:
            widths = [counts[names[place]] for place in places]
            bars = axis.barh(places, widths, label=folder, **bar_style(class_table, value))
            axis.bar_label(bars, fontsize=7, padding=2)
    axis.set_yticks(range(len(names)), [name.rpartition(" ")[0].replace("_", " ") for name in names], fontsize=8)
    axis.set(xlabel="images", ylim=(-0.6, len(names) - 0.4))
    axis.margins(x=0.12)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_sizes(groups: Groups, class_table: ClassTable) -> Figure:
    """Width against height of the photographs, and the distribution of their aspect ratios, by species."""
    figure, [scatter, histogram] = new_figure(9, 3.6, columns=2)
    for value, images in groups.items():
        row, style = class_table.row(value), {"color": class_table.plot_color(value), "alpha": 0.35, "linestyle": ""}
        sizes = zip(*((image.width, image.height) for image in images))
        scatter.plot(*sizes, row.marker, label=row.folder, markersize=3, **style)
    scatter.set(xlabel="width, pixels", ylabel="height, pixels")
    scatter.legend(frameon=False, fontsize=8)
    ratios = {value: [image.width / image.height for image in images] for value, images in groups.items()}
    bins = np.linspace(min(map(min, ratios.values())) - 0.05, max(map(max, ratios.values())) + 0.05, 31)
    plot_histograms(histogram, ratios, "width / height", bins, class_table)
    return figure


def plot_pixels(shares: dict[str, dict[str, float]], groups: Groups, class_table: ClassTable) -> Figure:
    """The share of pixels of each class in each part of the data, and the share of each photograph that is pet."""
    figure, [bars, histogram] = new_figure(10, 3.6, columns=2)
    left, box = np.zeros(len(shares)), {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for value in class_table.values:
        row, style = class_table.row(value), bar_style(class_table, value, "#777777")
        widths = np.array([100 * part[row.name] for part in shares.values()])
        drawn = bars.barh(range(len(shares)), widths, left=left, label=row.name, linewidth=0.5, **style)
        bars.bar_label(drawn, [f"{width:.0f}" for width in widths], label_type="center", fontsize=8, bbox=box)
        left += widths
    bars.set_yticks(range(len(shares)), list(shares))
    bars.invert_yaxis()
    bars.set(xlabel="share of the pixels, %", xlim=(0, 100))
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=4, frameon=False, fontsize=8)
    percent = {value: [100 * image.pet_share for image in images] for value, images in groups.items()}
    label = "share of the photograph that is pet, %"
    plot_histograms(histogram, percent, label, np.linspace(0, 100, 26), class_table)
    return figure


def plot_places(groups: Groups, class_table: ClassTable) -> Figure:
    """How often a pet covers each position, by species, over width and height in percent."""
    figure, axes = new_figure(1 + 3.4 * len(groups), 3.4, len(groups), sharey=True)
    for axis, (value, images) in zip(axes, groups.items()):
        percent = 100 * np.mean([image.pet for image in images], axis=0)
        image = axis.imshow(percent, cmap="viridis", vmin=0, vmax=100, extent=(0, 100, 100, 0))
        axis.set(title=class_table.row(value).folder, xlabel="width, %")
    axes[0].set_ylabel("height, %")
    figure.colorbar(image, ax=axes, label="photographs with a pet there, %")
    return figure


def plot_histograms(
    axis: Axes, values: dict[int, Sequence[float]], label: str, bins: np.ndarray, class_table: ClassTable
) -> None:
    """Histograms of values by species, on top of each other."""
    for value, group in values.items():
        style = bar_style(class_table, value, class_table.plot_color(value)) | {"alpha": 0.5}
        axis.hist(group, bins, label=class_table.row(value).folder, histtype="stepfilled", **style)
    axis.set(xlabel=label, ylabel="images")
    axis.legend(frameon=False, fontsize=8)


def plot_sheet(records: Sequence[Record], seed: int) -> Figure:
    """A contact sheet of random photographs with their labels laid over them."""
    from utils.figures import plot_grid

    table, cells = records[0].class_table, []
    for record in choose(records, PHOTOGRAPHS, seed):
        photo = np.asarray(to_rgb(load_picture(record.image)))
        cells.append((record.name, table.overlay(photo, record.load_label())))
    return plot_grid(cells, COLUMNS, table)


def plot_augmented(records: Sequence[Record], seed: int, size: int = 256) -> Figure:
    """Random photographs as the model sees them, and the same augmented as in the first epochs, with their masks."""
    from dataset.augmentation import train_transform
    from dataset.pet import PetDataset
    from utils.figures import plot_grid

    chosen = choose(records, AUGMENTED, seed)
    table, cells = records[0].class_table, []
    plain, varied = PetDataset(chosen, size), PetDataset(chosen, size, transform=train_transform(), seed=seed)
    for sample in range(len(chosen)):
        for epoch in range(COLUMNS):
            item = varied[epoch, sample] if epoch else plain[sample]
            overlaid = table.overlay(item["image"].permute(1, 2, 0).numpy(), item["mask"].numpy())
            cells.append((f"epoch {epoch}" if epoch else item["name"], overlaid))
    return plot_grid(cells, COLUMNS, table)


def choose(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """At most `count` random records, in order."""
    indices = np.random.default_rng(seed).choice(len(records), min(count, len(records)), replace=False)
    return [records[index] for index in sorted(indices)]


def format_summary(base: Path, summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    images, shares, spreads = summary["images"], summary["pixel_share"], summary["pet_share"]

    def row(name: str, values: Iterable[Any], form: str) -> str:
        return f"  {name:20}" + "".join(format(value, form) for value in values)

    lines = [f"{base}: {len(summary['breeds'])} breeds", row("", next(iter(images.values())), ">8")]
    lines += [row(split, counts.values(), ">8") for split, counts in images.items()]
    lines.append(row("pixels, %", next(iter(shares.values())), ">12"))
    lines += [row(split, (100 * share for share in part.values()), ">12.1f") for split, part in shares.items()]
    lines.append(row("", summary["width"], ">10"))
    lines += [row(f"{name}, pixels", summary[name].values(), ">10.0f") for name in ("width", "height")]
    lines.append(row("width / height", summary["aspect_ratio"].values(), ">10.2f"))
    lines += [row(f"{folder}, share", part.values(), ">10.2f") for folder, part in spreads.items() if part]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
