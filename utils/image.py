"""Images and points in pixels: open a picture, convert it to RGB, resize it.

Points are (x, y), origin top left; the center of the first pixel is (0, 0). Sizes are (width, height) as in Pillow.
"""

import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from utils.files import InputError, is_dir, is_file

# Pillow warns above its limit and raises above twice the limit; `load_picture` raises above the limit, with a remedy.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Pillow refuses a PNG with more than 1 MB of text or color profile, as photo editors write them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28

PICTURE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".avif", ".jp2", ".tif", ".tiff",
}  # fmt: skip
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
try:  # optional: the photographs of iPhones
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()
    PICTURE_SUFFIXES |= HEIF_SUFFIXES
HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
HEIF_HINT = "convert to JPEG, or: pip install pillow-heif"

# Folders in which file servers, archives and desktops keep thumbnails and deleted files.
SYSTEM_FOLDERS = {"@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"}


def load_picture(path: Path, *, upright: bool = False) -> Image.Image:
    """Open and decode a picture in any format that Pillow reads, whatever its suffix.

    `upright` applies the EXIF orientation. Prepared photographs fit their labels as they are stored.
    InputError when it is missing, empty, not a picture, damaged, or above Pillow's decompression-bomb limit. A file
    that the machine cannot read (permission, failing disk, memory) is an OSError or MemoryError that names it: the
    picture may be intact.
    """
    try:
        picture = Image.open(path)
        if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        picture.load()
        return turn_upright(picture) if upright else picture
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise InputError(f"{path}: larger than {limit:.0f} megapixels; scale it down") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: {_describe_unknown(path)}") from None
    except MemoryError:
        raise MemoryError(f"{path}: does not fit in memory; scale it down") from None
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise InputError(f"{path}: damaged or truncated ({error}); replace it with an intact copy") from error


def _describe_unknown(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(12)
    if not start:
        return "an empty file; replace it with a picture"
    if start[4:8] == b"ftyp" and start[8:12] in HEIF_BRANDS:
        return f"a HEIC photograph, which Pillow cannot read; {HEIF_HINT}"
    return "not a picture, or of a kind that Pillow cannot read; convert it to JPEG or PNG"


def turn_upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; the same object if it says nothing."""
    try:
        if picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
            return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # a damaged EXIF block fails in many ways; viewers show such a picture as it is stored
        pass
    return picture


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    with Image.open(path) as picture:
        return picture.size


@dataclass
class FoundPictures:
    """Pictures to work on, and the files and folders that are not among them."""

    files: list[tuple[Path, Path]] = field(default_factory=list)  # (file, its path below the folder that was given)
    passed_over: Counter[str] = field(default_factory=Counter)  # reason -> number of files or folders
    problems: list[str] = field(default_factory=list)  # paths that do not exist or cannot be read

    def format_passed_over(self) -> str:
        """A line with the counted reasons; "" if nothing was passed over."""
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(self.passed_over.items()))
        return reasons and f"{self.passed_over.total()} passed over: {reasons}"


def find_pictures(paths: Sequence[Path]) -> FoundPictures:
    """The files among `paths`, whatever their suffix, and every picture below the folders among them.

    Passed over in folders: hidden files, thumbnails of file servers, links to folders (which may lead in circles),
    files that are no pictures by their suffix, and the masks and overlays of `predict_photographs`.
    """
    found = FoundPictures()

    def report(error: OSError) -> None:
        found.problems.append(f"{error.filename}: {error.strerror}")

    for given in paths:
        if is_file(given):
            found.files.append((given, Path(given.name)))
            continue
        if not is_dir(given):
            found.problems.append(f"{given}: no such file or folder")
            continue
        for folder, subfolders, names in os.walk(given, onerror=report):  # does not follow links to folders
            here = Path(folder)
            subfolders.sort()
            for name in subfolders.copy():
                if reason := _reason_to_skip_folder(here / name):
                    found.passed_over[reason] += 1
                    subfolders.remove(name)
            for name in sorted(names):
                if reason := _reason_to_skip_file(here / name):
                    found.passed_over[reason] += 1
                elif not is_file(here / name):
                    found.problems.append(f"{here / name}: cannot be read, or a link that leads nowhere")
                else:
                    found.files.append((here / name, (here / name).relative_to(given)))
    return found


def _reason_to_skip_folder(path: Path) -> str:
    if path.name.startswith("."):
        return "hidden folder"
    if path.name in SYSTEM_FOLDERS:
        return f"folder {path.name}"
    return "link to a folder (give the folder itself)" if path.is_symlink() else ""


def _reason_to_skip_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if path.name.startswith("."):
        return "hidden file"
    if suffix in HEIF_SUFFIXES - PICTURE_SUFFIXES:
        return f"HEIC photograph ({HEIF_HINT})"
    if suffix not in PICTURE_SUFFIXES:
        return f"file with suffix {suffix!r}"
    return "mask or overlay by its name" if path.stem.endswith(("_mask", "_overlay")) else ""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, as people see it: transparent pixels over white, more than 8 bits scaled to 8.

    Colors under full transparency are arbitrary, and Pillow alone would turn most 16-bit grey white or black.
    InputError for values that are no brightness.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        grey, hidden = np.asarray(image), image.info.get("transparency")
        scaled = _scale_to_8_bits(grey)
        image = Image.fromarray(scaled if hidden is None else np.where(grey == hidden, np.uint8(255), scaled))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError:
        raise InputError(f"a picture of mode {image.mode} cannot be converted; save it as RGB") from None


def _scale_to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values (H, W) as uint8. Their range is 0 to 1 (floats), or 8, 10, 12, 14, 16 or 32 bits: the smallest that
    holds all but a thousandth of the values (hot pixels) with a tenth to spare (overshoot of sharpening)."""
    low, high = float(grey.min()), float(grey.max())
    if not (low >= 0 and math.isfinite(high)):
        raise InputError(f"its values, {low:g} to {high:g}, are no brightness; save it with 8 bits")
    limits = [1.0] if grey.dtype.kind == "f" else []
    limits += [2**bits - 1 for bits in (8, 10, 12, 14, 16, 32)]
    top = float(np.percentile(grey, 99.9))
    limit = next((limit for limit in limits if top <= 1.1 * limit), high)
    return (grey * (255 / limit)).round().clip(0, 255).astype(np.uint8)


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """RGB (size, size, 3) uint8: bilinear with antialiasing, without keeping the aspect ratio (as in the report)."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(classes: np.ndarray, size: int) -> np.ndarray:
    """Classes (size, size) uint8 by nearest-neighbor interpolation, because class numbers cannot be averaged."""
    return np.array(Image.fromarray(classes).resize((size, size), Image.Resampling.NEAREST))


def rescale_point(x: float, y: float, old: Sequence[int], new: Sequence[int]) -> tuple[float, float]:
    """The point (x, y) of a picture of size `old` (width, height) after resizing the picture to `new`."""
    return (x + 0.5) * new[0] / old[0] - 0.5, (y + 0.5) * new[1] / old[1] - 0.5
