"""Training samples per second: from the cache, and the plain way (decode, resize, albumentations' defaults)."""

from functools import partial
from pathlib import Path

import albumentations as A
import numpy as np
from PIL import Image

from benchmarks.timing import DEVICE, compare
from dataset.augmentation import augment, train_transform
from dataset.pet import PetDataset, find_records
from utils.loader import EpochBatchSampler, make_loader

SIZE, SAMPLES = 256, 256


class Decoder(list):
    """Records in place of the cache: a photograph and its label are decoded and resized each time."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        record = super().__getitem__(index)
        image = Image.open(record.image).convert("RGB").resize((SIZE, SIZE))
        label = Image.open(record.label).resize((SIZE, SIZE), Image.Resampling.NEAREST)
        return np.array(image), np.array(label)


def epoch(dataset: PetDataset, workers: int) -> partial:
    return partial(list, make_loader(dataset, EpochBatchSampler(SAMPLES, 16, shuffle=False), workers, DEVICE))


def measure(base: Path, repeats: int) -> dict:
    records = (SAMPLES * find_records(base, "TrainVal"))[:SAMPLES]  # repeated, if there are fewer
    defaults = A.Compose([A.HorizontalFlip(), A.Rotate(limit=15), A.ElasticTransform(), A.ColorJitter()])
    plain = PetDataset(records, SIZE, cache=Decoder(records), transform=defaults)
    cached = PetDataset(records, SIZE, transform=train_transform())

    def first_epoch() -> None:
        cached.cache.path.unlink()
        epoch(PetDataset(records, SIZE, transform=train_transform()), 1)()

    epochs = {"cold_cache": {"plain": lambda: epoch(plain, 1)(), "first_epoch": first_epoch}}
    for workers in (0, 1, 2):  # they start in the warm-up
        epochs[f"{workers}_workers"] = {"plain": epoch(plain, workers), "cached": epoch(cached, workers)}
    figures = {name: compare(repeats, variants, SAMPLES, rate=True) for name, variants in epochs.items()}
    return figures | {"plain_parts": measure_parts(plain, repeats), "cached_parts": measure_parts(cached, repeats)}


def measure_parts(dataset: PetDataset, repeats: int) -> dict:
    """Seconds of each part of a sample, without workers. Each transform is called alone, with probability 1/2."""
    samples = range(SAMPLES // 4)
    pairs = [dataset.cache[sample] for sample in samples]

    def transform_all(pipeline: A.Compose) -> None:
        for sample in samples:
            augment(pipeline, *pairs[sample], (0, 0, sample))

    parts = {"sample": lambda: [dataset[i] for i in samples], "read": lambda: [dataset.cache[i] for i in samples]}
    parts |= {type(one).__name__: partial(transform_all, A.Compose([one])) for one in dataset.transform.transforms}
    return compare(repeats, parts, len(samples))
