"""Images and points in pixels: open a picture, convert it to RGB, resize it.

Points are (x, y), origin top left; the center of the first pixel is (0, 0). Sizes are (width, height) as in Pillow.
"""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils.files import InputError

# Pillow warns above its limit and raises above twice the limit; `load_picture` raises above the limit, with a remedy.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


def load_picture(path: Path, *, upright: bool = False) -> Image.Image:
    """Open and decode a picture in any format that Pillow reads, whatever its suffix.

    `upright` applies the EXIF orientation. Labels match the stored pixels, so training pictures are not rotated.
    InputError when it is missing, empty, not a picture, damaged, or above Pillow's decompression-bomb limit.
    """
    try:
        picture = Image.open(path)
        if picture.width * picture.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        picture.load()
        return ImageOps.exif_transpose(picture) if upright else picture
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Image.DecompressionBombError:
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise InputError(f"{path}: larger than {limit:.0f} megapixels; scale it down") from None
    except UnidentifiedImageError:
        problem = "not a picture" if path.stat().st_size else "an empty file"
        raise InputError(f"{path}: {problem}; replace it with a picture") from None
    except Exception as error:  # decoders raise many kinds of errors on damaged files
        raise InputError(f"{path}: damaged or truncated ({error}); replace it with an intact copy") from error


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height, from the file's header."""
    with Image.open(path) as picture:
        return picture.size


def find_pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among `paths`, and every picture below the folders among them. InputError for a path without any."""
    for path in paths:
        if path.is_dir():
            visible = (file for file in sorted(path.rglob("*")) if file.name[0] != "." and file.is_file())
            below = [file for file in visible if file.suffix.lower() in PICTURE_SUFFIXES]
            if not below:
                raise InputError(f"{path} contains no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")
            yield from below
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{path} does not exist")


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB. 16-bit grey is scaled, because Pillow alone would turn almost all of it white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """RGB (size, size, 3) uint8: bilinear with antialiasing, without keeping the aspect ratio (as in the report)."""
    return np.array(to_rgb(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(classes: np.ndarray, size: int) -> np.ndarray:
    """Classes (size, size) uint8 by nearest-neighbor interpolation, because class numbers cannot be averaged."""
    return np.array(Image.fromarray(classes).resize((size, size), Image.Resampling.NEAREST))


def rescale_point(x: float, y: float, old: Sequence[int], new: Sequence[int]) -> tuple[float, float]:
    """The point (x, y) of a picture of size `old` (width, height) after resizing the picture to `new`."""
    return (x + 0.5) * new[0] / old[0] - 0.5, (y + 0.5) * new[1] / old[1] - 0.5
