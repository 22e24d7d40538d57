"""Resized images and masks of a split, memory-mapped from one file."""

import hashlib
import math
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

CACHE_VERSION = 2  # increase when the content of a cache file changes


class Cache:
    """The images and masks of `records`, resized once: `cache[i]` is image (size, size, 3), mask (size, size), uint8.

    The file is in BASE_DIR/cache. Its name holds a hash of everything that determines its content (names, sizes and
    times of the files, the class table, `size`), so changed data or classes make a new file.
    """

    def __init__(self, records: Sequence["Record"], size: int):
        split_dir = records[0].image.parents[2]
        self.size = size
        self.shape = (len(records), size * size * 4)  # RGB, then the mask
        states = [(r.name, r.species, *_state(r.image), *_state(r.label)) for r in records]
        classes = records[0].class_table.as_plain_dict()
        key = hashlib.sha256(repr((CACHE_VERSION, size, classes, states)).encode()).hexdigest()[:16]
        folder = split_dir.parent / "cache"
        prefix = f"{split_dir.name}-{len(records)}x{size}-"
        self.path = folder / f"{prefix}{key}.u8"
        self._pixels: np.memmap | None = None
        if self._is_complete():
            return
        try:
            with acquire_lock(folder / f".{prefix}{key}.lock"):
                if self._is_complete():  # another process built it in the meantime
                    return
                remove_leftovers(folder, idle_seconds=600)  # a younger one may still be written to
                self._build(records)
                for outdated in [*folder.glob(f"{prefix}*.u8"), *folder.glob(f".{prefix}*.lock")]:
                    if key not in outdated.name:
                        outdated.unlink(missing_ok=True)
        except OSError as error:
            problem = f"cannot write the cache {self.path}: {error}"
            raise InputError(f"{problem}. Free space or change the permissions.") from error

    def _is_complete(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == math.prod(self.shape)  # a copy may be cut short

    def _build(self, records: Sequence["Record"]) -> None:
        def load(record: "Record") -> bytes:
            image = load_picture(record.image)
            return resize_image(image, self.size).tobytes() + resize_mask(record.load_label(), self.size).tobytes()

        # Written, not mapped: on a full disk a write raises an error, a write to a mapped page kills the process.
        with atomic_path(self.path) as temporary, temporary.open("wb") as file, ThreadPoolExecutor() as pool:
            chunks = (records[start : start + 64] for start in range(0, len(records), 64))  # for constant memory
            contents = chain.from_iterable(pool.map(load, chunk) for chunk in chunks)
            file.writelines(tqdm(contents, f"cache {self.size}x{self.size}", len(records), leave=False, unit="image"))

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._pixels is None:  # opened at first use, so that each loader worker maps the file itself
            self._pixels = np.memmap(self.path, np.uint8, "r", shape=self.shape)
        image, mask = np.split(np.array(self._pixels[index]), [3 * self.size**2])
        return image.reshape(self.size, self.size, 3), mask.reshape(self.size, self.size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a pickled memmap would contain all pixels


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns
