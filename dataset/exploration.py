"""python dataset/exploration.py BASE_DIR

What a prepared data set holds (report section 1.1), as figures, a summary.json and a table.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import run_script

if TYPE_CHECKING:  # heavy imports come after parsing, so that --help answers at once
    import numpy as np

    from dataset.pet import Record

GRID = 128  # edge of the maps of where pets are
PHOTOGRAPHS = 24  # on the contact sheet


class Measured(NamedTuple):
    """One photograph: breed, species, size, label pixels by class (IGNORE: boundary), and where its pet is."""

    name: str
    breed: str
    species: int
    width: int
    height: int
    pixels: dict[int, int]
    pet: np.ndarray  # (GRID, GRID) bool

    @property
    def pet_share(self) -> float:
        """Share of the pixels that are pet, the boundary left out."""
        from utils.dataset import IGNORE

        known = sum(count for value, count in self.pixels.items() if value != IGNORE)
        return self.pixels.get(self.species, 0) / known if known else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_dir", type=Path, metavar="BASE_DIR", help="folder that dataset/dataset_prep.py prepared")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: BASE_DIR/exploration)")
    parser.add_argument("--seed", type=int, default=0, help="picks the photographs of the contact sheet (default: 0)")
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"--seed: at least 0, got {args.seed}")

    from dataset.pet import find_records, is_synthetic
    from utils.files import InputError, read_json, write_json

    report = args.base_dir / "prep_report.json"
    counts = read_json(report)["counts"] if report.is_file() else {}
    splits = [split for split in ("TrainVal", "Test") if not counts or any(counts[split].values())]
    if not splits:
        raise InputError(f"{args.base_dir} holds no image. See {report} for what was left out.")
    records = {split: find_records(args.base_dir, split) for split in splits}
    measured = {split: measure(split, records[split]) for split in splits}
    summary = summarize(measured)
    out = args.out or args.base_dir / "exploration"
    write_json(out / "summary.json", {"synthetic": is_synthetic(args.base_dir), **summary})
    draw(out, records, measured, summary, args.seed)
    print(format_summary(args.base_dir, summary))
    print("\n".join(str(path) for path in sorted(out.iterdir()) if path.suffix in (".png", ".json")))


def measure(split: str, records: Sequence[Record]) -> list[Measured]:
    """Read every label and the head of every photograph, once, several at a time."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from tqdm import tqdm

    from dataset.pet_heatmap import picture_size
    from utils.dataset import pet_pixels, resize_mask

    def one(record: Record) -> Measured:
        label = record.load_label()
        values, counts = np.unique(label, return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist()))
        breed = record.name.rpartition("_")[0] or record.name
        pet = pet_pixels(resize_mask(label, GRID))
        return Measured(record.name, breed, record.species, *picture_size(record.image), pixels, pet)

    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(one, records), desc=split, total=len(records), unit="image", leave=False))


def summarize(measured: dict[str, list[Measured]]) -> dict[str, Any]:
    """Counts and distributions, as written to summary.json; shares in 0..1."""
    import numpy as np

    from dataset.pet import balance
    from utils.dataset import CLASSES, IGNORE, SPECIES

    everything = [image for images in measured.values() for image in images]
    breeds = Counter((CLASSES[image.species], image.breed) for image in everything)

    def species_counts(images: Sequence[Measured]) -> dict[str, int]:
        return {folder: sum(image.species == value for image in images) for folder, value in SPECIES.items()}

    def pixel_shares(images: Sequence[Measured]) -> dict[str, float]:
        total = sum((Counter(image.pixels) for image in images), Counter())
        names = {**dict(enumerate(CLASSES)), IGNORE: "boundary"}
        return {name: total[value] / total.total() for value, name in names.items()}

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
            for folder, value in SPECIES.items()
        },
    }
    if "TrainVal" in measured and all(summary["images"]["TrainVal"].values()):  # with one species there is no balance
        images = measured["TrainVal"]
        repeated = [images[index] for index in balance(images, range(len(images)))]
        summary["images"]["TrainVal, balanced"] = species_counts(repeated)
        summary["pixel_share"]["TrainVal, balanced"] = pixel_shares(repeated)
    return summary


def draw(
    out: Path,
    records: dict[str, Sequence[Record]],
    measured: dict[str, list[Measured]],
    summary: dict[str, Any],
    seed: int,
) -> None:
    """The figures: species.png, breeds.png, sizes.png, pixels.png, places.png, photographs.png."""
    import numpy as np

    from utils import plot
    from utils.dataset import SPECIES, overlay, to_rgb
    from utils.files import load_picture

    everything = [image for images in measured.values() for image in images]
    groups = {folder: [image for image in everything if image.species == value] for folder, value in SPECIES.items()}
    groups = {folder: images for folder, images in groups.items() if images}
    plot.plot_species(out / "species.png", summary["images"])
    plot.plot_breeds(out / "breeds.png", summary["breeds"])
    plot.plot_sizes(
        out / "sizes.png",
        {folder: [(image.width, image.height) for image in group] for folder, group in groups.items()},
    )
    shares = {folder: [image.pet_share for image in images] for folder, images in groups.items()}
    plot.plot_pixels(out / "pixels.png", summary["pixel_share"], shares)
    places = {folder: np.mean([image.pet for image in images], axis=0) for folder, images in groups.items()}
    plot.plot_places(out / "places.png", places)

    flat = [record for split in records.values() for record in split]
    picked = np.random.default_rng(seed).choice(len(flat), min(PHOTOGRAPHS, len(flat)), replace=False)
    cells = []
    for record in (flat[index] for index in sorted(picked)):
        photo = np.asarray(to_rgb(load_picture(record.image)))
        cells.append((record.name, overlay(photo, record.load_label())))
    plot.plot_sheet(out / "photographs.png", cells)


def format_summary(base: Path, summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""
    lines = [f"{base}: {len(summary['breeds'])} breeds", f"  {'':20}{'cats':>8}{'dogs':>8}{'dogs per cat':>14}"]
    for name, counts in summary["images"].items():
        ratio = f"{counts['dogs'] / counts['cats']:.2f}" if counts["cats"] else "-"
        lines.append(f"  {name:20}{counts['cats']:>8}{counts['dogs']:>8}{ratio:>14}")
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
