"""Resized images and masks of a split, memory-mapped from one file."""

import errno
import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from utils.files import InputError, acquire_lock, atomic_path, remove_leftovers
from utils.image import load_picture, resize_image, resize_mask

if TYPE_CHECKING:
    from dataset.pet import Record

log = logging.getLogger(__name__)

CACHE_VERSION = 2  # increase when the content of a cache file changes


class Cache:
    """The images and masks of `records`, resized once: `cache[i]` is image (size, size, 3), mask (size, size), uint8.

    The file is in `folder` (default: BASE_DIR/cache, or a temporary folder where BASE_DIR cannot be written). Its name
    holds a hash of everything that determines its content (names, sizes and times of the files, the class table,
    `size`), so changed data or classes make a new file.
    """

    def __init__(self, records: Sequence["Record"], size: int, folder: Path | None = None):
        split_dir = records[0].image.parents[2]
        self.size = size
        self.shape = (len(records), size * size * 4)  # RGB, then the mask
        states = [(r.name, r.species, *_state(r.image), *_state(r.label)) for r in records]
        classes = records[0].class_table.as_plain_dict()
        key = hashlib.sha256(repr((CACHE_VERSION, size, classes, states)).encode()).hexdigest()[:16]
        self._prefix = f"{split_dir.name}-{len(records)}x{size}-"
        self._pixels: np.memmap | None = None
        base = split_dir.parent.resolve()
        # Outside of the data several data sets can share a folder: each has a subfolder.
        subfolder = f"{base.name}-{hashlib.sha256(os.fsencode(base)).hexdigest()[:8]}"
        user = os.getuid() if hasattr(os, "getuid") else "user"
        temporary = Path(tempfile.gettempdir()) / f"pet-cache-{user}" / subfolder
        places = [folder / subfolder] if folder else [split_dir.parent / "cache", temporary]
        for place in places:
            self.path = place / f"{self._prefix}{key}.u8"
            try:
                self._provide(records)
                return
            except PermissionError as error:
                reason = error
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise InputError(
                        f"cannot write the cache {self.path}: {error}. Free space, or give another folder as --cache"
                    ) from error
                reason = error
            if place != places[-1]:
                log.warning("%s cannot be written (%s): the cache is in %s", place, reason.strerror, temporary)
        raise InputError(f"cannot write the cache {self.path}: {reason}. Give a folder as --cache") from reason

    def _provide(self, records: Sequence["Record"]) -> None:
        """Build the file unless it is there. OSError when it cannot be written."""
        if self._is_complete():
            return
        folder = self.path.parent
        with acquire_lock(folder / ".lock"):
            if self._is_complete():  # another process built it in the meantime
                return
            remove_leftovers(folder)
            self._build(records)
            for outdated in folder.glob(f"{self._prefix}*.u8"):
                if outdated != self.path:
                    outdated.unlink(missing_ok=True)

    def _is_complete(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == math.prod(self.shape)  # a copy may be cut short

    def _build(self, records: Sequence["Record"]) -> None:
        def load(record: "Record") -> bytes:
            try:
                image, label = load_picture(record.image), record.load_label()
            except OSError as error:  # not to be taken for a cache that cannot be written
                raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
            return resize_image(image, self.size).tobytes() + resize_mask(label, self.size).tobytes()

        # Written, not mapped: on a full disk a write raises an error, a write to a mapped page kills the process.
        with atomic_path(self.path) as temporary, temporary.open("wb") as file, ThreadPoolExecutor() as pool:
            chunks = (records[start : start + 64] for start in range(0, len(records), 64))  # for constant memory
            contents = chain.from_iterable(pool.map(load, chunk) for chunk in chunks)
            file.writelines(tqdm(contents, f"cache {self.size}x{self.size}", len(records), leave=False, unit="image"))
            file.flush()
            os.fsync(file.fileno())  # else a power failure could leave a file of the right size full of zeros

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._pixels is None:  # opened at first use, so that each loader worker maps the file itself
            try:
                self._pixels = np.memmap(self.path, np.uint8, "r", shape=self.shape)
            except (FileNotFoundError, ValueError):  # a file that is too short is a ValueError
                raise InputError(
                    f"{self.path} has been deleted or cut short; start again (a training with --resume)"
                ) from None
        image, mask = np.split(np.array(self._pixels[index]), [3 * self.size**2])
        return image.reshape(self.size, self.size, 3), mask.reshape(self.size, self.size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a pickled memmap would contain all pixels


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns
