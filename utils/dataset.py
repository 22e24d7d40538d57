"""The class table: names, numbers and looks of the classes, label files <-> classes, overlays.

Only `PETS` and `CLICKS` say which number, color or folder a class has. Everything else gets its ClassTable from the
data set or the checkpoint.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from utils.files import InputError

IGNORE = 255  # the boundary band: pixels without a class, never scored
UNCOVERED = 254  # in training masks: corners that a rotation or a crop uncovers, which no loss counts
_UNKNOWN = 253  # in lookup tables: a value of a label file that belongs to no class

Color = tuple[int, int, int]


@dataclass(frozen=True)
class ClassRow:
    """One class. `color` is its color in label files, `tint` its color in overlays and plots."""

    name: str
    color: Color
    tint: Color
    line: str  # matplotlib line style
    hatch: str = ""  # of bars, for grey printing
    marker: str = "o"  # of points
    folder: str | None = None  # of prepared images whose pet has this class; None: not a species


@dataclass(frozen=True)
class ClassTable:
    """Classes 0, 1, ... in order, and the look of ignored pixels (value 255). Class 0 is the background.

    InputError when two rows share a name, color or tint, or one has no line style: files or figures would confuse them.
    """

    rows: tuple[ClassRow, ...]
    ignored: ClassRow

    def __post_init__(self) -> None:
        for row in (*self.rows, self.ignored):
            if not isinstance(row.name, str) or any(
                len(color) != 3 or not all(isinstance(part, int) and 0 <= part <= 255 for part in color)
                for color in (row.color, row.tint)
            ):
                raise InputError(f"a class needs a name and colors of three numbers in 0..255, got {row}")
        for field in ("name", "color", "tint"):
            values = [getattr(row, field) for row in (*self.rows, self.ignored)]
            if len(set(values)) < len(values) or not all(values):
                raise InputError(f"every class needs a {field} of its own, got {values}")
        if not all(row.line for row in self.rows):
            raise InputError(f"every class needs a line style, got {[row.line for row in self.rows]}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.rows)

    @property
    def species(self) -> dict[str, int]:
        """Class of each folder of prepared images."""
        return {row.folder: value for value, row in enumerate(self.rows) if row.folder}

    def value(self, name: str) -> int:
        """The number of a class."""
        return self.names.index(name)

    def row(self, value: int) -> ClassRow:
        """The row of a pixel value: a class, or the ignored value."""
        return self.ignored if value == IGNORE else self.rows[value]

    def as_plain_dict(self) -> dict[str, Any]:
        """Lists, strings and numbers only, for checkpoints and JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # tuples become lists

    @classmethod
    def from_plain_dict(cls, plain: dict[str, Any]) -> "ClassTable":
        """Undo `as_plain_dict`."""

        def row(values: dict[str, Any]) -> ClassRow:
            return ClassRow(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

        return cls(tuple(map(row, plain["rows"])), row(plain["ignored"]))

    @property
    def values(self) -> list[int]:
        """All pixel values: the classes, and the ignored value."""
        return [*range(len(self.rows)), IGNORE]

    @cached_property
    def palette(self) -> np.ndarray:
        """Colors (256, 3) uint8 of label files."""
        return _lookup_table({value: self.row(value).color for value in self.values}, np.zeros((256, 3), np.uint8))

    @cached_property
    def tints(self) -> np.ndarray:
        """Colors (256, 3) uint8 of overlays."""
        return _lookup_table({value: self.row(value).tint for value in self.values}, np.zeros((256, 3), np.uint8))

    def plot_color(self, value: int) -> tuple[float, ...]:
        """The tint of a class for matplotlib, RGB in [0, 1]."""
        return tuple((self.tints[value] / 255).tolist())

    def decode_label(self, label: Image.Image) -> np.ndarray:
        """Classes (H, W) uint8 of an indexed, grey or RGB label, with or without alpha: transparent is background.

        InputError lists the values that belong to no class, with their pixels, and those that are known.
        """
        kind = {"P": "P", "PA": "P", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB"}.get(label.mode)
        if kind is None:
            raise InputError(f"a label must be an indexed, grey or RGB picture, got mode {label.mode}")
        _refuse_lossy(label)
        pixels = np.asarray(label)
        if label.mode in ("PA", "LA"):
            pixels = pixels[..., 0]
        if kind == "RGB":
            classes = self._match_colors(pixels[..., :3])
            known = {self.row(value).name: [self.row(value).color] for value in self.values}
        else:
            table, known = self._index_table(label) if kind == "P" else self._grey_table(pixels)
            classes = table[pixels]
        if label.has_transparency_data:
            alpha = np.asarray(label.convert("RGBA"))[..., 3]
            classes = np.where(alpha == 0, 0, classes)
            if kind == "RGB":  # the edge of a soft brush: neither painted nor not
                classes[(alpha > 0) & (alpha < 255)] = _UNKNOWN
        _refuse_unknown(classes, pixels, known)
        return classes

    def _index_table(self, label: Image.Image) -> tuple[np.ndarray, dict[str, list[int]]]:
        """The class of each index of an indexed label, and the known indices by class.

        By color if every color belongs to a class, because programs that save RGB labels as indexed pictures assign new
        indices; by index with any other palette, unless an index has the color of another class. An index beyond the
        palette, or whose color repeats an earlier one, is unknown: such entries fill the palette up. Some programs save
        a grey label with a palette of its greys: if all of these are known values, they count.
        """
        colors = _palette_of(label)
        if (greys := _distinct_greys(label)) is not None:
            used = greys[np.unique(np.asarray(label)[..., 0] if label.mode == "PA" else label)]
            table, known = self._grey_table(used)
            if (table[used] != _UNKNOWN).all():
                return table[greys], known
        _, first = np.unique(colors, axis=0, return_index=True)
        by_color = np.full(256, _UNKNOWN, np.uint8)
        by_color[first] = self._match_colors(colors[first])
        if (by_color[first] != _UNKNOWN).all():
            table = by_color
        else:
            table = _lookup_table({value: value for value in self.values})
            table[(by_color != _UNKNOWN) & (by_color != 0) & (by_color != table)] = _UNKNOWN
            table[len(colors) :] = _UNKNOWN
        indices = {self.row(value).name: np.flatnonzero(table == value).tolist() for value in self.values}
        return table, {name: found for name, found in indices.items() if found}

    def _grey_table(self, pixels: np.ndarray) -> tuple[np.ndarray, dict[str, list[int]]]:
        """The class of each grey value, and the known values by class: the classes themselves, or the luma of their
        colors, as in a label with palette that was saved as grey: (128, 0, 0) becomes 38."""
        by_value = {value: value for value in self.values}
        by_luma = {round(float(self.palette[value] @ (0.299, 0.587, 0.114))): value for value in self.values}
        used = np.unique(pixels).tolist()
        meant = max((by_value, by_luma), key=lambda known: sum(value in known for value in used))
        known = {
            self.row(value).name: sorted({grey for part in (by_value, by_luma) for grey in part if part[grey] == value})
            for value in self.values
        }
        return _lookup_table(meant), known

    def _match_colors(self, colors: np.ndarray) -> np.ndarray:
        """Classes (...) of colors (..., 3)."""
        classes = np.full(colors.shape[:-1], _UNKNOWN, np.uint8)
        for value in self.values:
            classes[(colors == self.palette[value]).all(axis=-1)] = value
        return classes

    def encode_label(self, classes: np.ndarray) -> Image.Image:
        """The indexed picture, with the table's palette, of classes (H, W) uint8."""
        label = Image.fromarray(classes)
        label.putpalette(self.palette.tobytes())
        return label

    def overlay(self, image: np.ndarray, classes: np.ndarray, opacity: float = 0.5) -> np.ndarray:
        """The image (H, W, 3) uint8 with the pixels of every class but the background in the tint of their class."""
        tinted = image * (1 - opacity) + self.tints[classes] * opacity
        return np.where((classes != 0)[..., None], tinted, image).astype(np.uint8)


# Label colors of PASCAL VOC. Tints and line styles that color-blind readers and grey printing keep apart.
PETS = ClassTable(
    (
        ClassRow("background", (0, 0, 0), (119, 119, 119), ":", marker="s"),
        ClassRow("cat", (128, 0, 0), (230, 110, 0), "--", folder="cats"),
        ClassRow("dog", (0, 128, 0), (0, 115, 200), "-.", hatch="//", marker="^", folder="dogs"),
    ),
    ignored=ClassRow("boundary", (255, 255, 255), (255, 255, 255), "", hatch="xx"),
)

# Targets of a click: the object is the side of the pet's outline that was clicked.
CLICKS = ClassTable(
    (
        ClassRow("ground", (0, 0, 0), (119, 119, 119), ":", marker="s"),
        ClassRow("object", (128, 0, 0), (230, 110, 0), "--"),
    ),
    ignored=PETS.ignored,
)


def foreground(classes: Any) -> Any:
    """Where an array or tensor of classes holds a class other than the background, and is not ignored or uncovered."""
    return (classes != 0) & (classes < UNCOVERED)


def decode_trimap(trimap: Image.Image, species: int) -> np.ndarray:
    """Classes (H, W) uint8 of an Oxford-IIIT trimap (1 pet, 2 background, 3 boundary) of a pet of class `species`."""
    if trimap.mode not in ("P", "L"):
        raise InputError(f"a trimap must be a grey picture, got mode {trimap.mode}")
    _refuse_lossy(trimap)
    pixels = np.asarray(trimap)
    greys = _distinct_greys(trimap) if trimap.mode == "P" else None
    if greys is not None and set(greys[np.unique(pixels)]) <= {1, 2, 3}:
        pixels = greys[pixels]
    classes = _lookup_table({1: species, 2: 0, 3: IGNORE})[pixels]
    _refuse_unknown(classes, pixels, {"pet": [1], "background": [2], "boundary": [3]})
    return classes


def _lookup_table(values: dict[int, Any], table: np.ndarray | None = None) -> np.ndarray:
    table = np.full(256, _UNKNOWN, np.uint8) if table is None else table
    table[list(values)] = list(values.values())
    return table


def _palette_of(label: Image.Image) -> np.ndarray:
    """The colors (N, 3) uint8 of an indexed picture."""
    return np.array(label.getpalette("RGB"), np.uint8).reshape(-1, 3)


def _distinct_greys(label: Image.Image) -> np.ndarray | None:
    """The grey (256,) of each index of an indexed picture; None unless all that it uses are greys, no two the same."""
    colors, pixels = _palette_of(label), np.asarray(label)
    used = np.unique(pixels[..., 0] if label.mode == "PA" else pixels)
    if used.max() >= len(colors):
        return None
    greys = colors[used]
    if (greys != greys[:, :1]).any() or len(np.unique(greys[:, 0])) < len(used):
        return None
    return np.pad(colors[:, 0], (0, 256 - len(colors)), constant_values=_UNKNOWN)


def _refuse_lossy(label: Image.Image) -> None:
    """InputError for a label in a format that changes its values. Lossy WebP has RGB only, and shows by its colors."""
    kind = "JPEG" if label.info.get("compression") == "jpeg" else label.format  # a JPEG within a TIFF
    if kind in ("JPEG", "MPO", "JPEG2000", "AVIF", "HEIF"):
        raise InputError(f"a {kind} file, which changes the values of a label; save the label as PNG")


def _refuse_unknown(classes: np.ndarray, pixels: np.ndarray, known: dict[str, list]) -> None:
    """InputError if a pixel of `classes` (H, W) is unknown; lists the values of `pixels` (H, W) or (H, W, channels)."""
    unknown = classes == _UNKNOWN
    if not unknown.any():
        return
    values, counts = np.unique(pixels[unknown], axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:5]
    found = ", ".join(f"{_value_text(values[i].tolist())} ({counts[i]} pixels)" for i in order)
    found += ", ..." if len(counts) > 5 else ""
    meant = ", ".join(f"{name} {' or '.join(map(_value_text, values))}" for name, values in known.items())
    raise InputError(f"{unknown.sum()} pixels belong to no class: {found}; known are {meant}")


def _value_text(value: int | Sequence[int]) -> str:
    return str(value) if isinstance(value, int) else f"({', '.join(map(str, value))})"
