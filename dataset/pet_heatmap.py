"""Pets with a clicked point: what lies under it is to be segmented (report section 9)."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dataset.pet import PetDataset, Record, find_records
from utils.dataset import CLASSES, IGNORE, pet_pixels, rescale_point
from utils.dataset_prep import prompt_pictures, random_pixel
from utils.files import InputError, atomic_path

log = logging.getLogger(__name__)

MARGIN = 1 / 16  # how far from the other side a click is near the outline, as a share of the image's edge


class Click(NamedTuple):
    """A point of a photograph: x and y in its pixels, origin top left, and whether it lies on the pet."""

    x: float
    y: float
    on_pet: bool


def read_points(records: Sequence[Record]) -> list[list[Click]]:
    """The fixed points of each record, from the points.csv that preparation wrote for its split.

    A photograph without pet or without background has no point of that kind: counted and logged. InputError for a
    name that is not prepared, a class that the photograph does not hold, or a point outside it.
    """
    path = records[0].image.parents[2] / "points.csv"
    again = f"Run: python dataset/dataset_prep.py {path.parents[1]}"
    if not path.is_file():
        raise InputError(f"{path} is missing. {again}")
    prepared = {file.stem for file in (path.parent / "color").glob("*/*.jpg")}
    clicks: dict[str, list[Click]] = {record.name: [] for record in records}
    species = {record.name: CLASSES[record.species] for record in records}
    sizes = {record.name: picture_size(record.image) for record in records}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if rows.fieldnames != ["name", "class", "x", "y"]:
            raise InputError(f"{path} has the columns {rows.fieldnames}, expected name, class, x, y. {again}")
        for row in rows:
            where, name = f"{path}, line {rows.line_num}", row["name"]
            if name not in prepared:
                raise InputError(f"{where}: {name!r} is no image of {path.parent}. {again}")
            if name not in clicks:  # left out by --limit, or on the other side of the split
                continue
            if row["class"] not in (CLASSES[0], species[name]):
                raise InputError(f"{where}: class {row['class']!r}, expected {CLASSES[0]} or {species[name]}. {again}")
            try:
                x, y = float(row["x"]), float(row["y"])
            except (TypeError, ValueError):
                x = y = math.nan
            width, height = sizes[name]
            if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
                raise InputError(
                    f"{where}: ({row['x']}, {row['y']}) is no point of {name}, which is {width}x{height}. {again}"
                )
            clicks[name].append(Click(x, y, row["class"] != CLASSES[0]))
    for on_pet, kind in ((True, "pet"), (False, "background")):
        missing = [name for name, points in clicks.items() if all(point.on_pet != on_pet for point in points)]
        if missing:
            log.info("%s: no point in the %s of %d images (%s, ...)", path, kind, len(missing), missing[0])
    return list(clicks.values())


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    with Image.open(path) as picture:
        return picture.size


def under_click(mask: Tensor, on_pet: Tensor) -> Tensor:
    """Targets (B, H, W) uint8 of clicks: 1 what lies under the click, 0 what does not, 255 where `mask` is.

    `mask` (B, H, W) is in classes, `on_pet` (B,) says of each click whether it is on the pet or beside it.
    """
    target = (pet_pixels(mask) == on_pet[:, None, None]).to(torch.uint8)
    return torch.where(mask == IGNORE, IGNORE, target)


class PetHeatmapDataset(PetDataset):
    """A PetDataset whose items also hold clicks: `point` (K, 2), x and y in pixels of the item's image, `on_pet` (K,).

    With `transform` (training) two clicks are drawn from the augmented mask, on the pet and beside it, so that every
    image teaches that the click matters; each with even chance near the outline, where it is hardest to tell them apart
    (as Xu et al. 2016 draw clicks around an object). In half of these items either click is also the one to `avoid`
    (K, 2) for the other; elsewhere that is NaN. Without (validation) a sample is a photograph with one of its fixed
    points. The heatmaps are drawn by the model.
    """

    def __init__(self, records: Sequence[Record], size: int, **options: Any):
        super().__init__(records, size, **options)
        self.clicks: list[Click] = []
        if self.transform is None:
            picked = list(self.indices)
            points = read_points([records[index] for index in picked])
            self.indices = []
            for index, clicks in zip(picked, points):
                photo = picture_size(records[index].image)
                self.indices += [index] * len(clicks)
                self.clicks += [Click(*rescale_point(x, y, photo, (size, size)), on_pet) for x, y, on_pet in clicks]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        item = super().__getitem__(key)
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        if self.transform is None:
            clicks, avoided = [self.clicks[sample]], False
        else:
            # A stream of its own: the augmentation has drawn from (seed, epoch, sample).
            rng = np.random.default_rng([self.seed, epoch, sample, 1])
            mask = item["mask"].numpy()
            sides = {True: pet_pixels(mask), False: mask == 0}
            kinds = [on_pet for on_pet, where in sides.items() if where.any()]
            if not kinds:
                raise InputError(f"{self.records[self.indices[sample]].label} holds neither pet nor background")
            # Where there is no such thing as a click of the other kind, two of the same.
            clicks = [
                Click(*random_pixel(sides[on_pet] if rng.integers(2) else near(sides, on_pet), rng), on_pet)
                for on_pet in (kinds[0], kinds[-1])
            ]
            avoided = len(kinds) == 2 and bool(rng.integers(2))
        points = torch.tensor([[click.x, click.y] for click in clicks], dtype=torch.float32)
        return item | {
            "point": points,
            "avoid": points.flip(0) if avoided else torch.full_like(points, math.nan),
            "on_pet": torch.tensor([click.on_pet for click in clicks]),
        }


def near(sides: dict[bool, np.ndarray], on_pet: bool) -> np.ndarray:
    """The pixels (H, W) of one side that are near the other, or the whole side where none is."""
    side = sides[on_pet]
    edge = 2 * max(1, round(MARGIN * max(side.shape))) + 1
    found = side & (cv2.dilate(sides[not on_pet].astype(np.uint8), np.ones((edge, edge), np.uint8)) > 0)
    return found if found.any() else side


def save_prompts(base_dir: Path, split: str) -> int:
    """Write every fixed point's heatmap and mask to BASE_DIR/SPLIT/prompt/NAME_{pet,background}_{heatmap,mask}.png.

    Returns the number of points. Pictures have the size of the photograph.
    """
    records = find_records(base_dir, split)
    points = read_points(records)
    for record, clicks in zip(tqdm(records, desc=f"heatmaps {split}", unit="image", leave=False), points):
        label = record.load_label()
        for x, y, on_pet in clicks:
            stem = base_dir / split / "prompt" / f"{record.name}_{'pet' if on_pet else 'background'}"
            for kind, picture in zip(("heatmap", "mask"), prompt_pictures(label, int(x), int(y))):
                with atomic_path(stem.with_name(f"{stem.name}_{kind}.png")) as temporary:
                    picture.save(temporary, "PNG", compress_level=1)
    return sum(map(len, points))
