"""One photograph and its label: check them, and write the prepared image and label."""

import hashlib
import io
import os
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataset.originals import BREEDS, Pair, breed_of
from utils.dataset import PETS, ClassTable, decode_trimap
from utils.dataset_prep import sample_points
from utils.files import InputError, atomic_path, write_bytes
from utils.image import load_picture, to_rgb, turn_upright


@dataclass
class Outcome:
    """The result for a pair: left out if `reason` is set, else written under `folder`."""

    pair: Pair
    reason: str = ""
    file: Path | None = None  # that the reason is about (default: the photograph)
    failed: bool = False  # the machine could not read it, so that it is tried again next time
    exif: str = ""  # "stored" or "upright": how it was used, if its EXIF block turns it and its label fits both ways
    folder: str = ""
    converted: str = ""
    pixels: bytes = b""  # hash of the decoded photograph
    points: list[tuple[str, int, int]] = field(default_factory=list)


def process_pair(pair: Pair, **options: Any) -> Outcome:
    """`_process_pair`; a pair that does not fit in memory has failed."""
    try:
        return _process_pair(pair, **options)
    except MemoryError:
        return Outcome(pair, "does not fit in memory; scale it down", pair.image, failed=True)


def _process_pair(
    pair: Pair,
    *,
    base: Path,
    seed: int,
    exif: str | None = None,
    oxford: bool = False,
    class_table: ClassTable = PETS,
) -> Outcome:
    """Check one pair and write its prepared image and label. OSError when a file cannot be written.

    `exif` is `--exif`; `oxford`: it is in Oxford's layout, whose labels were drawn on the stored pixels.
    """
    read = _read_pair(pair, class_table)
    if isinstance(read, Outcome):
        return read
    image, classes = read
    turned, label_size = turn_upright(image), classes.shape[::-1]
    fits = {"stored": image.size == label_size, "upright": turned.size == label_size}
    default = "stored" if oxford or breed_of(pair.name) in BREEDS else "upright"
    fitting = next((name for name in fits if fits[name]), default)
    orientation = exif or (default if fits[default] else fitting)
    chosen = turned if orientation == "upright" else image
    if not fits[orientation]:
        return Outcome(pair, "image is {}x{}, its label {}x{}".format(*chosen.size, *label_size))
    found = [folder for folder, value in class_table.species.items() if (classes == value).any()]
    if len(found) != 1:
        return Outcome(pair, f"{' and '.join(found)} in one label" if found else "no pet in its label", pair.label)

    (folder,) = found
    prepared = base / pair.split / "color" / folder / f"{pair.name}.jpg"
    rgb = to_rgb(chosen)
    changes = [] if image.format == "JPEG" else [f"is a {image.format} picture ({image.mode})"]
    changes += [] if chosen is image else ["its EXIF block turns it"]
    if not changes:
        _link(pair.image, prepared)
    else:
        try:
            content = _encode(rgb, "JPEG", quality=95, subsampling=0)
        except OSError as error:  # not a disk error: the picture has more than 65500 pixels on an edge
            return Outcome(pair, f"cannot be saved as JPEG ({error}); scale it down")
        write_if_changed(prepared, content)
    # Compression level 1 takes less than half of the default's time; labels remain a few kB.
    content = _encode(class_table.encode_label(classes), "PNG", compress_level=1)
    write_if_changed(base / pair.split / "label" / folder / f"{pair.name}.png", content)
    rng = np.random.default_rng([seed, zlib.crc32(pair.name.encode())])  # the points do not depend on other files
    return Outcome(
        pair,
        folder=folder,
        converted=f"{', '.join(changes)}; converted to JPEG" if changes else "",
        exif=orientation if turned is not image and all(fits.values()) and exif is None else "",
        pixels=hashlib.blake2b(rgb.tobytes(), digest_size=16, salt=str(rgb.size).encode()).digest(),
        points=sample_points(classes, class_table, rng),
    )


def _read_pair(pair: Pair, class_table: ClassTable) -> tuple[Image.Image, np.ndarray] | Outcome:
    """The photograph, and the classes (H, W) of its label; the outcome if one of them cannot be used."""
    file = pair.image
    try:
        image = load_picture(pair.image)
        if image.mode != "RGB":
            to_rgb(image)  # raises if its values are no brightness
        file = pair.label
        label = load_picture(pair.label)
        if turn_upright(label) is not label:
            raise InputError("its EXIF block turns it, which is ambiguous for a label; save it without")
        classes = class_table.decode_label(label) if pair.species is None else decode_trimap(label, pair.species)
    except InputError as error:
        return Outcome(pair, str(error).removeprefix(f"{file}: "), file)
    except OSError as error:  # no permission, a failing disk: not a damaged file
        return Outcome(pair, f"cannot be read ({error.strerror}); run again when it can", file, failed=True)
    return image, classes


def _link(original: Path, prepared: Path) -> None:
    if prepared.exists() and prepared.samefile(original):
        return
    with atomic_path(prepared) as temporary:
        try:
            os.link(original.resolve(), temporary)
        except OSError:  # on another file system, or on one without hard links
            shutil.copyfile(original, temporary)


def _encode(picture: Image.Image, picture_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, picture_format, **options)
    return buffer.getvalue()


def write_if_changed(path: Path, content: bytes) -> None:
    """Write `content` unless the file holds it already, so that its time does not change."""
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)
