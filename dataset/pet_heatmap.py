"""Clicks on pets: segment the side of the pet's outline that was clicked (report section 9)."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.pet import PetDataset, Record, find_records
from utils.dataset import CLICKS, UNCOVERED, foreground
from utils.dataset_prep import heatmap_and_mask, random_pixel
from utils.files import InputError, atomic_path, fit_name, read_csv
from utils.image import picture_size, rescale_point

log = logging.getLogger(__name__)

# Half of the random clicks fall within this distance of the outline, as a share of the image's edge.
BORDER_WIDTH = 1 / 16


class Click(NamedTuple):
    """A point: x and y in pixels, origin top left, and whether it is on the pet or on the background."""

    x: float
    y: float
    on_pet: bool


def read_points(records: Sequence[Record]) -> list[list[Click]]:
    """The fixed points of each record, in pixels of its photograph, from the points.csv of the split.

    A missing point is logged. InputError for a name that was not prepared, a class that the photograph does not have,
    or a point outside it.
    """
    path = records[0].image.parents[2] / "points.csv"
    again = f"Run: python dataset/dataset_prep.py {path.parents[1]}"
    if not path.is_file():
        raise InputError(f"{path} is missing. {again}")
    rows = read_csv(path)
    columns = list(rows[0]) if rows else []
    if columns[:4] != ["name", "class", "x", "y"]:
        raise InputError(f"{path} has the columns {columns}, expected name, class, x, y. {again}")
    prepared = {file.stem for file in (path.parent / "color").glob("*/*.jpg")}
    by_name = {record.name: record for record in records}
    clicks: dict[str, list[Click]] = {name: [] for name in by_name}
    for number, row in enumerate(rows, start=2):
        name = row["name"]
        if name not in prepared:
            raise InputError(f"{path}, line {number}: {name!r} is not an image of {path.parent}. {again}")
        if name in by_name:  # others are excluded by --limit, or on the other side of the split
            try:
                clicks[name].append(_read_point(row, by_name[name]))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}. {again}") from None
    for on_pet, kind in ((True, "pet"), (False, "background")):
        missing = [name for name, points in clicks.items() if all(point.on_pet != on_pet for point in points)]
        if missing:
            log.info("%s: no point in the %s of %d images (%s, ...)", path, kind, len(missing), missing[0])
    return list(clicks.values())


def _read_point(row: dict[str, str], record: Record) -> Click:
    background, species = (record.class_table.names[value] for value in (0, record.species))
    if row["class"] not in (background, species):
        raise InputError(f"class {row['class']!r}, expected {background} or {species}")
    try:
        x, y = float(row["x"]), float(row["y"])
    except (TypeError, ValueError):
        x = y = math.nan
    width, height = picture_size(record.image)
    if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
        raise InputError(f"({row['x']}, {row['y']}) is not a point of {record.name}, which is {width}x{height}")
    return Click(x, y, row["class"] == species)


def click_target(mask: Tensor, on_pet: Tensor) -> Tensor:
    """Targets (B, H, W) uint8 of one click on each of the masks (B, H, W): 1 on the clicked side of the outline, 0 on
    the other, 255 and 254 where the mask is. `on_pet` (B,) bool is the clicked side."""
    target = (foreground(mask) == on_pet[:, None, None]).to(torch.uint8)
    return torch.where(mask >= UNCOVERED, mask, target)


class RandomClickDataset(PetDataset):
    """Pets with two random clicks on every augmented image, one on the pet and one on the background, for training.

    Items also have `points` (2, 2), x and y in pixels of the item's image, and `on_pet` (2,) bool. Each click is
    near the outline with probability 1/2 (Xu et al. 2016). With probability 1/2 each click is the negative point of the
    other (RITM, Sofiiuk et al. 2022) in `negative_points` (2, 2), otherwise these are NaN.
    """

    class_table = CLICKS

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        item = super().__getitem__(key)
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng([self.seed, epoch, sample, 1])  # a stream of its own, beside the augmentation's
        mask = item["mask"].numpy()
        sides = {True: foreground(mask), False: mask == 0}
        present = [on_pet for on_pet, side in sides.items() if side.any()]
        if not present:
            raise InputError(f"{self.records[self.indices[sample]].label} holds neither pet nor background")
        clicks = []
        for on_pet in (present[0], present[-1]):  # if only one side is visible, both clicks are on it
            side = sides[on_pet] if rng.integers(2) else border_pixels(sides, on_pet)
            clicks.append(Click(*random_pixel(side, rng), on_pet))
        return item | click_tensors(clicks, opposed=len(present) == 2 and bool(rng.integers(2)))


class FixedClickDataset(PetDataset):
    """Pets with the fixed points of points.csv, for validation: a sample is a photograph with one of its points.

    Items have the keys of RandomClickDataset with one point, (1, 2); `negative_points` are NaN.
    """

    class_table = CLICKS

    def __post_init__(self) -> None:
        super().__post_init__()
        new_size = (self.size, self.size)
        photographs = self.indices
        self.indices, self.clicks = [], []  # one of each per sample
        for index, clicks in zip(photographs, read_points([self.records[index] for index in photographs])):
            old_size = picture_size(self.records[index].image)
            self.indices += [index] * len(clicks)
            self.clicks += [Click(*rescale_point(x, y, old_size, new_size), on_pet) for x, y, on_pet in clicks]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        sample = key[1] if isinstance(key, tuple) else key
        return super().__getitem__(key) | click_tensors([self.clicks[sample]])


def click_tensors(clicks: Sequence[Click], *, opposed: bool = False) -> dict[str, Tensor]:
    """`points`, `negative_points` and `on_pet` of an item; `opposed`: two clicks are each other's negative point."""
    points = torch.tensor([[click.x, click.y] for click in clicks], dtype=torch.float32)
    return {
        "points": points,
        "negative_points": points.flip(0) if opposed else torch.full_like(points, math.nan),
        "on_pet": torch.tensor([click.on_pet for click in clicks]),
    }


def border_pixels(sides: dict[bool, np.ndarray], on_pet: bool) -> np.ndarray:
    """The pixels (H, W) of one side within BORDER_WIDTH of the other side; the whole side if there are none."""
    side = sides[on_pet]
    edge = 2 * max(1, round(BORDER_WIDTH * max(side.shape))) + 1
    found = side & (cv2.dilate(sides[not on_pet].astype(np.uint8), np.ones((edge, edge), np.uint8)) > 0)
    return found if found.any() else side


def save_heatmaps(base_dir: Path, split: str) -> int:
    """Write the heatmap and mask of every fixed point to BASE_DIR/SPLIT/prompt/NAME_{pet,background}_{heatmap,mask}.png
    at the photograph's size; returns the number of points."""
    records = find_records(base_dir, split)
    points = read_points(records)
    for record, clicks in zip(tqdm(records, desc=f"heatmaps {split}", unit="image", leave=False), points):
        label = record.load_label()
        for x, y, on_pet in clicks:
            side = "pet" if on_pet else "background"
            for kind, picture in zip(("heatmap", "mask"), heatmap_and_mask(label, int(x), int(y))):
                name = fit_name(record.name, f"_{side}_{kind}.png")
                with atomic_path(base_dir / split / "prompt" / name) as temporary:
                    picture.save(temporary, "PNG", compress_level=1)
    return sum(map(len, points))
