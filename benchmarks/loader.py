"""The loader, beside the plain way: decode the JPEG, resize, augment with albumentations' default ElasticTransform."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import albumentations as A
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import in_turn, spread, timed
from dataset.augmentation import augment, train_transform
from dataset.pet import Cache, EpochBatches, PetDataset, Record, find_records, make_loader

SIZE, BATCH = 256, 16
WARM_UP, SAMPLES = 32, 256
CORES = 16  # of the machine that the figures are projected to


def plain_transform() -> A.Compose:
    return A.Compose(
        [A.HorizontalFlip(p=0.5), A.Rotate(limit=15, p=0.5), A.ElasticTransform(p=0.5), A.ColorJitter(p=0.5)]
    )


def plain_load(record: Record) -> tuple[np.ndarray, np.ndarray]:
    image = np.array(Image.open(record.image).convert("RGB").resize((SIZE, SIZE)))
    return image, np.array(Image.open(record.label).resize((SIZE, SIZE), Image.Resampling.NEAREST))


def to_tensors(image: np.ndarray, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(np.ascontiguousarray(mask))


class Plain(Dataset):
    """Everything anew in every epoch."""

    def __init__(self, records: Sequence[Record]):
        self.records = records
        self.transform = plain_transform()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = plain_load(self.records[sample])
        varied = self.transform(image=image, mask=mask)
        return to_tensors(varied["image"], varied["mask"])


def bench_loader(base: Path, repeats: int) -> dict:
    """Augmented 256x256 training samples per second: from the cache, with the cache made first, and the plain way."""
    records = find_records(base, "TrainVal")
    many = list(itertools.islice(itertools.cycle(records), WARM_UP + SAMPLES))
    indices = list(itertools.islice(itertools.cycle(range(len(records))), WARM_UP + SAMPLES))

    def samples_per_second(loader: DataLoader) -> float:
        """After the first batches, which wait for the workers to start."""
        batches = iter(loader)
        for _ in range(WARM_UP // BATCH):
            next(batches)
        return SAMPLES / timed(lambda: list(batches))

    cache = Cache(records, SIZE)
    warm = PetDataset(records, SIZE, cache=cache, indices=indices, transform=train_transform())
    figures: dict[str, dict] = {}
    for workers in (0, 1, 2):
        rates: dict[str, list[float]] = {"cached": [], "plain": []}
        for _ in range(repeats):
            batches = EpochBatches(len(warm), BATCH, shuffle=False)
            rates["cached"].append(samples_per_second(make_loader(warm, batches, workers)))
            rates["plain"].append(samples_per_second(DataLoader(Plain(many), BATCH, num_workers=workers)))
        figures[f"{workers}_workers"] = {
            **{f"{kind}_samples_per_second": spread(values, 1) for kind, values in rates.items()},
            "ratio": spread([fast / plain for fast, plain in zip(rates["cached"], rates["plain"])], 2),
        }

    def first_epoch() -> None:
        cache.path.unlink()
        fresh = PetDataset(records, SIZE, transform=train_transform())
        list(make_loader(fresh, EpochBatches(len(fresh), BATCH, shuffle=False), 1))

    seconds = in_turn(
        repeats, first_epoch=first_epoch, plain_epoch=lambda: list(DataLoader(Plain(records), BATCH, num_workers=1))
    )
    rate = figures["1_workers"]["cached_samples_per_second"]["median"]
    return {
        **figures,
        "cold_cache": {
            **{f"{key}_samples_per_second": spread([len(records) / s for s in v], 1) for key, v in seconds.items()},
            "ratio": spread([plain / ours for ours, plain in zip(*seconds.values())], 2),
        },
        "projected_samples_per_second": {"cores": CORES, "from_one_worker": CORES * rate},
    }


def bench_parts(base: Path, repeats: int) -> dict:
    """Milliseconds of each part of a sample, in this process: before is the plain way, after is ours.

    Each transform in a pipeline of its own, so that their sum is more than the whole takes.
    """
    records = find_records(base, "TrainVal")[:64]
    cache = Cache(records, SIZE)
    pairs = [cache[index] for index in range(len(records))]
    positions = range(len(records))

    def apply(transform: A.BasicTransform) -> Callable[[], None]:
        pipeline = A.Compose([transform])

        def run() -> None:
            for index in positions:
                augment(pipeline, *pairs[index], (0, 1, index))

        return run

    def each(work: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [work(index) for index in positions]

    works = {
        "before/read, decode, resize": each(lambda index: plain_load(records[index])),
        "after/read from the cache": each(lambda index: cache[index]),
    }
    for when, transforms in (("before", plain_transform()), ("after", train_transform())):
        works |= {f"{when}/{type(one).__name__}": apply(one) for one in transforms.transforms}
        works[f"{when}/to tensors"] = each(lambda index: to_tensors(*pairs[index]))
    plain = Plain(records)
    ours = PetDataset(records, SIZE, cache=cache, transform=train_transform())
    works["before/whole sample"] = each(lambda index: plain[index])
    works["after/whole sample"] = each(lambda index: ours[(1, index)])
    figures: dict[str, dict] = {"before": {}, "after": {}}
    for name, seconds in in_turn(repeats, **works).items():
        when, part = name.split("/")
        figures[when][part] = spread([1000 * value / len(records) for value in seconds], 2)
    return figures
