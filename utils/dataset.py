"""The class table: names, numbers and looks of the classes, label files <-> classes, overlays.

Only `PETS` and `CLICKS` say which number, color or folder a class has. Everything else gets its ClassTable from the
data set or the checkpoint.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from utils.files import InputError

IGNORE = 255  # the boundary band, and corners that a rotation uncovers: pixels without a class, counted nowhere
_UNKNOWN = 254  # in lookup tables: a value of a label file that belongs to no class

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
        """Classes (H, W) uint8 of an indexed, grey or RGB label. InputError lists values that belong to no class."""
        if label.mode not in ("RGB", "RGBA", "L", "P"):
            raise InputError(f"a label must be an indexed, grey or RGB picture, got mode {label.mode}")
        pixels = np.asarray(label.convert("RGB") if label.mode == "RGBA" else label)
        by_value = {value: value for value in self.values}
        if label.mode in ("RGB", "RGBA"):
            classes = self._match_colors(pixels)
        elif label.mode == "L":
            # A label with palette that was saved as grey has the luma of its colors: (128, 0, 0) becomes 38.
            luma = {round(float(self.palette[value] @ (0.299, 0.587, 0.114))): value for value in self.values}
            classes = _lookup_table(luma | by_value)[pixels]
        else:
            # By color if every color belongs to a class, because programs that save RGB labels as indexed pictures
            # assign new indices; by index with any other palette.
            entries = np.array(label.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.pad(entries, ((0, 256 - len(entries)), (0, 0)))
            classes = self._match_colors(palette)[pixels]
            if (classes == _UNKNOWN).any():
                classes = _lookup_table(by_value)[pixels]
        _check_known(classes, pixels)
        return classes

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
    """Where an array or tensor of classes holds a class other than the background (and is not ignored)."""
    return (classes != 0) & (classes != IGNORE)


def decode_trimap(trimap: Image.Image, species: int) -> np.ndarray:
    """Classes (H, W) uint8 of an Oxford-IIIT trimap (1 pet, 2 background, 3 boundary) of a pet of class `species`."""
    if trimap.mode not in ("P", "L"):
        raise InputError(f"a trimap must be a grey picture, got mode {trimap.mode}")
    pixels = np.asarray(trimap)
    classes = _lookup_table({1: species, 2: 0, 3: IGNORE})[pixels]
    _check_known(classes, pixels)
    return classes


def _lookup_table(values: dict[int, Any], table: np.ndarray | None = None) -> np.ndarray:
    table = np.full(256, _UNKNOWN, np.uint8) if table is None else table
    table[list(values)] = list(values.values())
    return table


def _check_known(classes: np.ndarray, pixels: np.ndarray) -> None:
    unknown = classes == _UNKNOWN
    if unknown.any():
        values = np.unique(pixels[unknown], axis=0)[:5].tolist()
        raise InputError(f"{unknown.sum()} label pixels belong to no class: values {values}")
