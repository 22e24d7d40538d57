"""The prepared pets as PyTorch data: data set and cache, train/validation split, species balance, loaders."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from dataset.augmentation import augment, train_transform
from utils.dataset import CLASSES, SPECIES, decode_label, resize_image, resize_mask
from utils.distributed import rank, world
from utils.files import InputError, atomic_path, load_picture, locked, read_json, remove_leftovers

log = logging.getLogger(__name__)

CACHE_VERSION = 1  # raise when what a cache holds changes


@dataclass(frozen=True)
class Record:
    """One prepared pet: its files and its class (1 cat, 2 dog)."""

    name: str
    species: int
    image: Path
    label: Path

    def load_label(self) -> np.ndarray:
        """Classes (H, W) uint8 at the photograph's own size."""
        label = load_picture(self.label)
        try:
            return decode_label(label)
        except InputError as error:
            raise InputError(f"{self.label}: {error}. Run dataset/dataset_prep.py again") from error


def find_records(base_dir: Path, split: str, limit: int | None = None) -> list[Record]:
    """The pets of a split, sorted by name; with `limit`, so many of them spread evenly over that order.

    InputError when `base_dir` is not prepared, or an image has lost its label.
    """
    report = base_dir / "prep_report.json"
    if not report.is_file():
        raise InputError(
            f"{base_dir.absolute()} is not prepared. Run: python dataset/dataset_prep.py {base_dir} "
            "(--download fetches the data)"
        )
    counts = read_json(report)["counts"][split]
    records = []
    for folder, species in SPECIES.items():
        images = [path for path in (base_dir / split / "color" / folder).glob("*.jpg") if path.name[0] != "."]
        if len(images) != counts[folder]:
            raise InputError(
                f"{base_dir / split / 'color' / folder} holds {len(images)} images, prepared were {counts[folder]}. "
                f"Copy the folder again, or run: python dataset/dataset_prep.py {base_dir}"
            )
        for image in images:
            label = base_dir / split / "label" / folder / f"{image.stem}.png"
            if not label.is_file():
                raise InputError(f"{image} has no label {label}. Run: python dataset/dataset_prep.py {base_dir}")
            records.append(Record(image.stem, species, image, label))
    if not records:
        raise InputError(f"{base_dir / split} holds no image. See {report} for what was left out.")
    records.sort(key=lambda record: record.name)
    if limit and limit < len(records):
        records = [records[i] for i in np.linspace(0, len(records) - 1, limit).round().astype(int)]
    return records


def is_synthetic(base_dir: Path) -> bool:
    """Whether the pets were drawn by dataset/synthetic.py, so that scores compare with nothing."""
    return bool(read_json(base_dir / "prep_report.json").get("synthetic"))


class Cache:
    """All images and masks of `records` at `size` x `size`, decoded and resized once, memory-mapped from one file.

    The file lies beside the data. Its name holds a hash of what went into it (the files' names, sizes and times, the
    size), so a change of the data makes a new one. `cache[i]` is image (size, size, 3) and mask (size, size), uint8.
    """

    def __init__(self, records: Sequence[Record], size: int):
        split_dir = records[0].image.parents[2]
        self.size = size
        self.shape = (len(records), size * size * 4)  # RGB, then the mask
        states = [(r.name, r.species, *(x for path in (r.image, r.label) for x in _state(path))) for r in records]
        key = hashlib.sha256(repr((CACHE_VERSION, size, states)).encode()).hexdigest()[:16]
        folder = split_dir.parent / "cache"
        prefix = f"{split_dir.name}-{len(records)}x{size}-"
        self.path = folder / f"{prefix}{key}.u8"
        self._pixels: np.memmap | None = None
        if self._is_whole():
            return
        try:
            with locked(folder / f".{prefix}{key}.lock"):
                if self._is_whole():  # another process made it meanwhile
                    return
                remove_leftovers(folder, idle_seconds=600)  # a younger one may be another process's, at work
                self._build(records)
                for outdated in [*folder.glob(f"{prefix}*.u8"), *folder.glob(f".{prefix}*.lock")]:
                    if key not in outdated.name:
                        outdated.unlink(missing_ok=True)
        except OSError as error:
            hint = "Free space or change the permissions."
            raise InputError(f"cannot write the cache {self.path}: {error}. {hint}") from error

    def _is_whole(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == math.prod(self.shape)  # a copy may be cut short

    def _build(self, records: Sequence[Record]) -> None:
        def load(record: Record) -> bytes:
            image = load_picture(record.image)
            return resize_image(image, self.size).tobytes() + resize_mask(record.load_label(), self.size).tobytes()

        # Written, not mapped: on a full disk a write fails with an error, a mapped page kills the process.
        with (
            atomic_path(self.path) as temporary,
            temporary.open("wb") as file,
            ThreadPoolExecutor() as pool,
            tqdm(total=len(records), desc=f"cache {self.size}x{self.size}", unit="image", leave=False) as bar,
        ):
            for start in range(0, len(records), 64):  # in chunks, so that memory stays constant
                for content in pool.map(load, records[start : start + 64]):
                    file.write(content)
                    bar.update()

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if self._pixels is None:  # opened late: each worker maps the file itself
            self._pixels = np.memmap(self.path, np.uint8, "r", shape=self.shape)
        pixels = np.array(self._pixels[index])
        area = self.size * self.size
        return pixels[: 3 * area].reshape(self.size, self.size, 3), pixels[3 * area :].reshape(self.size, self.size)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}  # a pickled memmap would carry all pixels along


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


class PetDataset(Dataset):
    """Pets as dicts of `image` (3, size, size) uint8 RGB, `mask` (size, size) uint8 with 255 = ignored, and `name`.

    `indices` picks from the records, repeats allowed: a sample is a position in `indices`. With `transform` a sample is
    augmented, depending on (seed, epoch, sample) alone. With `label_size` each item also has `label`, the classes at
    the photograph's own size ("native") or at so many pixels square, for scoring. With `chance` it has as `chance/KEY`
    what that draws for its name: in the workers, because it takes time.

    Items are asked for by (epoch, sample), or by sample alone for epoch 0.
    """

    def __init__(
        self,
        records: Sequence[Record],
        size: int,
        *,
        cache: Cache | None = None,
        indices: Sequence[int] | None = None,
        transform: A.Compose | None = None,
        seed: int = 0,
        label_size: str | int | None = None,
        chance: Callable[[str], dict[str, torch.Tensor]] | None = None,
    ):
        self.records = records
        self.cache = cache or Cache(records, size)
        self.indices = range(len(records)) if indices is None else indices
        self.transform = transform
        self.seed = seed
        self.label_size = label_size
        self.chance = chance

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        index = self.indices[sample]
        image, mask = self.cache[index]
        if self.transform is not None:
            image, mask = augment(self.transform, image, mask, (self.seed, epoch, sample))
        item = {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),  # (3, size, size)
            "mask": torch.from_numpy(np.ascontiguousarray(mask)),
            "name": self.records[index].name,
        }
        if self.label_size is not None:
            label = self.records[index].load_label()
            item["label"] = label if self.label_size == "native" else resize_mask(label, self.label_size)
        if self.chance is not None:
            item |= {f"chance/{key}": draws for key, draws in self.chance(item["name"]).items()}
        return item


def split_records(records: Sequence[Record], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and validation indices: drawn by image, stratified by species, at least one of each on each side."""
    rng = np.random.default_rng(seed)
    train: list[int] = []
    val: list[int] = []
    for species in SPECIES.values():
        members = [index for index, record in enumerate(records) if record.species == species]
        if len(members) < 2:
            raise InputError(
                f"{records[0].image.parents[2]} holds {len(members)} {CLASSES[species]} image(s); training needs at "
                "least 2 of each species, one of them to validate. Add some, or leave --limit out."
            )
        order = rng.permutation(members).tolist()
        count = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        val += order[:count]
        train += order[count:]
    return sorted(train), sorted(val)


def balance(records: Sequence[Record], indices: Sequence[int]) -> list[int]:
    """`indices` with those of the rarer species repeated until there are as many of each (report section 2)."""
    groups = [[index for index in indices if records[index].species == species] for species in SPECIES.values()]
    most = max(map(len, groups))
    return [index for group in groups for index in np.resize(group, most).tolist()]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, sample) keys: every sample once per epoch, in an order that depends on (seed, epoch) alone.

    With several processes, `rank` of `world` takes every world-th key of each batch of `batch_size * world`. All have
    the same number of batches: a rest too small for each to have a part of it joins the batch before.
    """

    def __init__(self, samples: int, batch_size: int, *, shuffle: bool, seed: int = 0, rank: int = 0, world: int = 1):
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world = world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self.samples, self.batch_size * self.world)
        return max(whole + (rest >= self.world), int(self.rank < self.samples))

    @property
    def sizes(self) -> list[int]:
        """Samples of each batch, those of all processes together."""
        whole = [self.batch_size * self.world] * (len(self) - 1)
        return [*whole, self.samples - sum(whole)] if len(self) else []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.samples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples)
        step = self.batch_size * self.world
        for number in range(len(self)):
            stop = (number + 1) * step if number + 1 < len(self) else self.samples
            yield [(self.epoch, int(sample)) for sample in order[number * step : stop][self.rank :: self.world]]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack what has one size; labels at their own sizes and names stay lists."""
    return {
        key: torch.stack([item[key] for item in items])
        if torch.is_tensor(items[0][key])
        else [item[key] for item in items]
        for key in items[0]
    }


def _leave_ctrl_c_to_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset: Dataset, batches: EpochBatches, workers: int) -> DataLoader:
    """A DataLoader over `batches`; `loader.batch_sampler.set_epoch` changes the epoch."""
    workers = min(workers, len(batches), os.cpu_count() or 1)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_ctrl_c_to_the_parent,
        # Its own generator: the loader draws from it, and the model's random stream must not depend on the workers.
        generator=torch.Generator(),
    )


def make_train_loaders(
    config: Any, *, dataset_class: type[PetDataset] = PetDataset
) -> tuple[DataLoader, DataLoader, dict[str, list[str]]]:
    """Training and validation loader of a TrainConfig, and the split: {"train": names, "val": names}.

    Each of several processes has its share of every batch.

    InputError when there are fewer training images than a batch.
    """
    records = find_records(config.data, "TrainVal", config.limit)
    if is_synthetic(config.data):
        log.info("%s holds synthetic drawings: scores on them compare with nothing", config.data)
    train, val = split_records(records, config.val_fraction, config.seed)
    samples = balance(records, train)
    # What fits, or how a resumed run's step is shared, is known when the model is (utils/batch_size.py).
    batch_size = 1 if config.batch_size == "auto" else config.batch_size
    together = batch_size * world()
    if len(samples) < together and not config.resume:
        raise InputError(
            f"{len(samples)} training images (after balancing) are fewer than a batch of {together}: "
            f"use --batch-size {len(samples) // world()} or less, or more images."
        )
    cache = Cache(records, config.image_size)
    train_set = dataset_class(
        records, config.image_size, cache=cache, indices=samples, transform=train_transform(), seed=config.seed
    )
    val_set = dataset_class(records, config.image_size, cache=cache, indices=val)
    shard = {"rank": rank(), "world": world()}
    train_batches = EpochBatches(len(train_set), batch_size, shuffle=True, seed=config.seed, **shard)
    val_batches = EpochBatches(len(val_set), batch_size, shuffle=False, **shard)
    split = {"train": [records[i].name for i in train], "val": [records[i].name for i in val]}
    return (
        make_loader(train_set, train_batches, config.workers),
        make_loader(val_set, val_batches, config.workers),
        split,
    )


def make_test_loader(config: Any, image_size: int, **options: Any) -> DataLoader:
    """Loader of a TestConfig over a split, in the order of the names, with the labels at the size to score at.

    Each of several processes has its share of every batch. `options` are more of PetDataset's.
    """
    records = find_records(config.data, config.split, config.limit)
    if len(records) < world():
        raise InputError(f"{len(records)} images cannot be shared by {world()} processes: start fewer")
    dataset = PetDataset(records, image_size, label_size=config.score_size, **options)
    batches = EpochBatches(len(dataset), config.batch_size, shuffle=False, rank=rank(), world=world())
    return make_loader(dataset, batches, config.workers)
