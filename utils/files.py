"""Files that are written whole or not at all, pictures that are opened safely, and the error a user can mend."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow warns above its limit and raises above twice that; `load_picture` raises above it, and says what to do.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


class InputError(Exception):
    """Something the user can mend: an argument, a file, a shape. Scripts print its text and exit with 1."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it replaces `path` when the block ends well and vanishes when it does not.

    A reader, or a process that takes over after a kill, sees the old file or the new one, never a part of one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}{time.time_ns()}"  # also among the machines that share a folder
    temporary = path.with_name(f".{path.name[:200]}.{unique}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, idle_seconds: float = 0) -> None:
    """Delete the files of `atomic_path` that killed processes left in `folder`, if untouched for `idle_seconds`."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process may have finished it meanwhile
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and time.time() - path.stat().st_mtime >= idle_seconds:
                path.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that the file `path` stands for; waits for the process that has it. One that dies lets it go.

    Where the file system knows no locks, nothing is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict) -> None:
    """Write `content` atomically as indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON file; InputError names it when it is not JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}). Delete it and make it again.") from None


def load_picture(path: Path, *, upright: bool = False) -> Image.Image:
    """Open and fully decode a picture of any format that Pillow reads; its suffix is not believed.

    `upright` turns it as its EXIF orientation says. Labels were drawn over the pixels as they are stored.

    Raises InputError that names the file when it is empty, not a picture, damaged, or so large that decoding it could
    exhaust the memory (Pillow's decompression-bomb limit).
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
        what = "not a picture" if path.stat().st_size else "an empty file"
        raise InputError(f"{path}: {what}; replace or delete it") from None
    except Exception as error:  # the decoders raise whatever their parser trips over in a damaged file
        raise InputError(f"{path}: damaged or truncated ({error}); replace or delete it") from error
