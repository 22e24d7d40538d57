"""Masks of photographs: `Predictor` converts between a photograph's pixels and a model's, for every model."""

import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from utils.dataset import ClassTable
from utils.distributed import all_gather_objects, rank, world_size
from utils.files import (
    InputError,
    acquire_lock,
    atomic_path,
    fit_name,
    format_csv,
    read_csv,
    remove_leftovers,
    write_bytes,
)
from utils.helper import class_table_of
from utils.image import find_pictures, load_picture, rescale_point, resize_image, to_rgb
from utils.loader import prepare_batch
from utils.machine import is_out_of_memory
from utils.metric import logits_to_classes

JPEG_EDGE = 65_500  # the largest width or height of a JPEG, in pixels


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, C, h, w) at `size` (H, W), bilinear, float32; each channel is contiguous, the faster layout here."""
    return F.interpolate(logits.float().contiguous(), tuple(size), mode="bilinear", align_corners=False)


def with_tta(model: nn.Module, tta: str) -> nn.Module:
    """The model for `--tta`: itself, or its average over the image and the mirror image."""
    return FlipAverage(model) if tta == "flip" else model


class FlipAverage(nn.Module):
    """A model whose probabilities are the mean of those of the image and of its mirror image (`--tta flip`).

    It has the interface of the model: `forward` of a segmenter, `encode` and `decode` of a model prompted by clicks.
    The logits are the logarithms of the mean probabilities, or the log-odds of a single one.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        if hasattr(model, "decode"):
            self.encode, self.decode = self._encode, self._decode

    def forward(self, image: Tensor) -> Tensor:
        return average_logits(self.model(image), self.model(image.flip(-1)).flip(-1))

    def _encode(self, image: Tensor) -> list[Tensor]:
        return [*self.model.encode(image), *self.model.encode(image.flip(-1))]

    def _decode(
        self, features: Sequence[Tensor], points: Tensor, image_size: Sequence[int], negative: Tensor | None = None
    ) -> Tensor:
        half = len(features) // 2
        logits = self.model.decode(features[:half], points, image_size, negative)
        mirrored = [None if one is None else mirror_points(one, image_size[1]) for one in (points, negative)]
        flipped = self.model.decode(features[half:], mirrored[0], image_size, mirrored[1])
        return average_logits(logits, flipped.flip(-1))


def mirror_points(points: Tensor, width: int) -> Tensor:
    """Points (N, 2), (x, y) in pixels, in the mirror image of an image of this width."""
    return torch.stack([width - 1 - points[:, 0], points[:, 1]], dim=1)


def average_logits(*parts: Tensor) -> Tensor:
    """Logits (B, C, H, W) of the mean probabilities of several; C = 1 stands for the second of two classes."""
    if parts[0].shape[1] == 1:
        return torch.stack([part.float().sigmoid() for part in parts]).mean(dim=0).logit(eps=1e-6)
    return torch.stack([part.float().softmax(dim=1) for part in parts]).mean(dim=0).clamp(min=1e-12).log()


class Prediction(NamedTuple):
    """Classes and their probabilities at the photograph's own size, numbered as in `Predictor.class_table`."""

    mask: np.ndarray  # (H, W) uint8
    probabilities: np.ndarray  # (C, H, W) float32, sum 1 over C


class Predictor:
    """Predicts masks of photographs with a model and its checkpoint (`models.load_model`), on the model's device.

    Call `set_image` once per photograph, then `predict`. A model prompted by clicks encodes the photograph once for any
    number of calls of `predict`. Points are (x, y) in pixels of the photograph, origin top left.
    """

    def __init__(self, model: nn.Module, checkpoint: dict[str, Any]):
        self.model = model
        self.class_table: ClassTable = class_table_of(checkpoint)
        self.image_size: int = checkpoint["config"]["image_size"]
        self.device = next(model.parameters()).device
        self.prompted = hasattr(model, "decode")
        self.picture: Image.Image | None = None

    @torch.inference_mode()
    def set_image(self, picture: Image.Image | np.ndarray | str | Path) -> None:
        """Set the photograph: a picture, an array (H, W, 3) uint8 RGB, or a file, which is rotated upright (EXIF)."""
        if isinstance(picture, str | Path):
            picture = load_picture(Path(picture), upright=True)
        elif isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        self.picture = to_rgb(picture)
        image = torch.from_numpy(resize_image(self.picture, self.image_size)).permute(2, 0, 1)[None]  # (1, 3, S, S)
        self._image = prepare_batch({"image": image}, self.device)["image"]
        self._features = self.model.encode(self._image) if self.prompted else None

    @torch.inference_mode()
    def predict(
        self, points: Sequence[Sequence[float]] | None = None, positive: Sequence[bool] | None = None
    ) -> Prediction:
        """The mask of the photograph; for a prompted model the object under the clicks `points` (N, 2).

        `positive` (N,): whether each click is on the object (default: all). A model takes one positive and at most one
        negative click, with the heatmap encoding none. InputError for a point outside the photograph, or clicks that do
        not fit the model.
        """
        if self.picture is None:
            raise InputError("set_image comes before predict")
        if self.prompted:
            logits = self._decode(() if points is None else points, positive)
        elif points is not None and len(points):
            raise InputError("this model is not prompted by clicks: leave the points out")
        else:
            logits = self.model(self._image)
        logits = resize_logits(logits[:, : len(self.class_table)], (self.picture.height, self.picture.width))
        # With a single logit z, softmax over (0, z) gives the probabilities of ground and object.
        both = logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)
        mask = logits_to_classes(logits)[0]
        return Prediction(mask.cpu().numpy(), both.softmax(dim=1)[0].cpu().numpy())

    def _decode(self, points: Sequence[Sequence[float]], positive: Sequence[bool] | None) -> Tensor:
        width, height = self.picture.size
        for x, y in points:
            if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
                place = f"in the photograph, which has {width}x{height} pixels"
                raise InputError(f"the point ({x:g}, {y:g}) is not {place}")
        sides = [True] * len(points) if positive is None else list(positive)
        if len(sides) != len(points) or sides.count(True) != 1 or sides.count(False) > 1:
            got = f"{len(points)} points with positive={sides}"
            raise InputError(f"this model needs one positive click and takes at most one negative click, got {got}")
        size = (self.image_size, self.image_size)
        scaled = [rescale_point(x, y, self.picture.size, size) for x, y in points]
        clicks = {side: torch.tensor([point], device=self.device) for side, point in zip(sides, scaled)}
        return self.model.decode(self._features, clicks[True], size, clicks.get(False))


def save_mask(path: Path, classes: np.ndarray, class_table: ClassTable) -> None:
    """Write classes (H, W) uint8 as an indexed picture with the palette of the class table, atomically."""
    with atomic_path(path) as temporary:
        class_table.encode_label(classes).save(temporary, "PNG", compress_level=1)


def save_overlay(path: Path, pixels: np.ndarray) -> None:
    """Write an overlay (H, W, 3) uint8 atomically to `path` + _overlay.jpg, or .png where a JPEG cannot be so large."""
    kind, options = ("PNG", {}) if max(pixels.shape) > JPEG_EDGE else ("JPEG", {"quality": 92})
    with atomic_path(path.with_name(f"{path.name}_overlay.{'png' if kind == 'PNG' else 'jpg'}")) as temporary:
        Image.fromarray(pixels).save(temporary, kind, **options)


def predict_photographs(
    predictor: Predictor,
    paths: Sequence[Path],
    out: Path,
    point: tuple[float, float] | None = None,
    *,
    overwrite: bool = False,
) -> str:
    """Write NAME_mask.png (indexed) and NAME_overlay.jpg of photographs, files or folders, to `out`; returns a summary.

    The tree below a given folder is kept below `out`, where index.csv names the photograph of each mask. Photographs
    are rotated upright (EXIF); the ranks share them. A prompted model gets the same click `point` (x, y) on each.
    Photographs that cannot be read, or whose mask would replace that of another one (unless `overwrite`), are named in
    an InputError after the others are done.
    """
    if predictor.prompted and point is None:
        raise InputError("this model is prompted by a click: give one as --point X,Y")
    if point is not None and not predictor.prompted:
        raise InputError("--point: this model is not prompted by clicks, leave it out")
    folder = real_path(out)
    if inside := [path for path in paths if folder in (real_path(path), *real_path(path).parents)]:
        raise InputError(f"{inside[0]} is in {out}, where the masks would be written; choose another --out")
    found = find_pictures(paths)
    files = [pair for pair in found.files if folder not in real_path(pair[0]).parents]
    found.passed_over.update({f"file in {out}": len(found.files) - len(files)} if files != found.files else {})
    notes = [line for line in (found.format_passed_over(),) if line]
    if not files:
        raise InputError("\n".join([f"no picture in {', '.join(map(str, paths))}", *notes, *found.problems]))
    busy = f"{out}: another process is writing masks there; wait for it, or choose another --out"
    with acquire_lock(out / ".lock", timeout=0, busy=busy) if rank() == 0 else nullcontext():
        (claims,) = all_gather_objects([claim_masks(files, out, overwrite)] if rank() == 0 else [])
        began = time.time_ns()
        try:
            failed = all_gather_objects(_segment(predictor, claims.masks, out, point))
        finally:
            if rank() == 0:
                release_masks(claims, out, began)
    problems = [*found.problems, *claims.refused, *failed]
    summary = "\n".join([f"{len(claims.masks) - len(failed)} pictures segmented: {out}", *notes])
    if problems:
        raise InputError(f"{summary}\ncould not be segmented:\n  " + "\n  ".join(problems))
    return summary


def _segment(predictor: Predictor, masks: dict[Path, Path], out: Path, point: tuple[float, float] | None) -> list[str]:
    """Write this rank's share of the masks and their overlays; returns the reasons why some are not there."""
    failed = []
    share = list(masks.items())[rank() :: world_size()]
    for mask, photograph in tqdm(share, desc="segment", unit="image", leave=False, disable=rank() != 0):
        try:
            predictor.set_image(photograph)
            classes = predictor.predict([point] if point else None).mask
            overlaid = predictor.class_table.overlay(np.asarray(predictor.picture), classes)
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            reason = "does not fit in memory; scale it down" if isinstance(error, RuntimeError) else str(error)
            failed.append(reason if str(photograph) in reason else f"{photograph}: {reason}")
        else:
            save_mask(out / mask, classes, predictor.class_table)
            save_overlay(out / mask.with_name(mask.name.removesuffix("_mask.png")), overlaid)
    return failed


def real_path(path: Path) -> Path:
    """The path without links; `Path.resolve` would raise at a link that leads to itself."""
    return Path(os.path.realpath(path))


class Claims(NamedTuple):
    """The masks that a call writes."""

    masks: dict[Path, Path]  # mask below the output folder -> photograph
    former: dict[Path, Path]  # the index before
    refused: list[str]  # photographs whose mask would replace that of another one


def claim_masks(files: Sequence[tuple[Path, Path]], out: Path, overwrite: bool) -> Claims:
    """Name the mask of each file (photograph, its path below the given folder), and add them to the index of `out`.

    A mask has its photograph's name without suffix, or with it where two photographs differ only in the suffix. The
    index holds a mask before it is written, so that an interrupted call can be repeated. Under the lock of `out`.
    """
    named = {(photograph.absolute(), below) for photograph, below in files}  # one that is given twice counts once
    stems = Counter(below.with_suffix("") for _, below in named)
    wanted: dict[Path, set[Path]] = {}
    for photograph, below in files:
        stem = below.stem if stems[below.with_suffix("")] == 1 else below.name
        name = fit_name(stem, "_overlay.jpg").removesuffix("_overlay.jpg")
        wanted.setdefault(below.with_name(f"{name}_mask.png"), set()).add(photograph.absolute())
    masks, refused = {}, []
    for folder in {(out / mask).parent for mask in wanted}:
        remove_leftovers(folder)
    index = read_index(out)
    for mask, photographs in wanted.items():
        (first, *others), owner = sorted(photographs), index.get(mask)
        same = owner is not None and real_path(owner) == real_path(first)
        if others:
            hint = "give them in two calls, with another --out each"
            refused.append(f"{first} and {others[0]} would both be {out / mask}: {hint}")
        elif (taken := _written(out / mask)) and not same and not overwrite:
            whose = f"of {owner}" if owner else "there already, perhaps of another photograph"
            refused.append(f"{first}: {taken[0]} is {whose}: choose another --out, or add --overwrite")
        else:
            masks[mask] = first
    write_index(out, index | masks)
    return Claims(masks, index, refused)


def _written(mask: Path) -> list[Path]:
    """Those of a mask and its overlay that exist."""
    stem = mask.name.removesuffix("_mask.png")
    return [
        path for path in (mask, *(mask.with_name(f"{stem}_overlay.{kind}") for kind in ("jpg", "png"))) if path.exists()
    ]


def release_masks(claims: Claims, out: Path, began: int) -> None:
    """Give claimed masks that have not been written since `began`, in ns, back to their former photograph, if any."""
    index = read_index(out)
    for mask in claims.masks:
        path = out / mask
        if not path.exists() or path.stat().st_mtime_ns < began - 2_000_000_000:  # some file systems round to 2 s
            index.pop(mask, None)
            index |= {mask: claims.former[mask]} if path.exists() and mask in claims.former else {}
    write_index(out, index)


def read_index(out: Path) -> dict[Path, Path]:
    """The photograph of each mask in `out`, from its index.csv."""
    path = out / "index.csv"
    rows = read_csv(path) if path.exists() else []
    header = path.read_bytes().splitlines()[:1] if path.exists() else []
    if header not in ([], [b"mask,photograph"]) or any(
        set(row) != {"mask", "photograph"} or None in row.values() for row in rows
    ):
        raise InputError(f"{path} was not written by predict.py: choose another --out")
    return {Path(row["mask"]): Path(row["photograph"]) for row in rows}


def write_index(out: Path, masks: dict[Path, Path]) -> None:
    """Write index.csv, a row per mask in `out`."""
    rows = sorted((mask.as_posix(), str(photograph)) for mask, photograph in masks.items())
    write_bytes(out / "index.csv", format_csv(["mask", "photograph"], rows))
