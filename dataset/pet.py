"""The prepared pets as PyTorch data: records, train/validation split, species balance, data sets."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.augmentation import augment, paste_pet, train_transform
from dataset.cache import Cache
from dataset.originals import REPORT, is_unchanged, read_report, relative
from dataset.perturbation import Perturbation, choose_perturbations, sample_noise
from utils.config import TestConfig, TrainConfig
from utils.dataset import PETS, ClassTable
from utils.files import InputError, is_file
from utils.image import load_picture, resize_mask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One prepared pet: its files, and its species as a class of `class_table`."""

    name: str
    species: int
    image: Path
    label: Path
    class_table: ClassTable = PETS

    def load_label(self) -> np.ndarray:
        """Classes (H, W) uint8 at the photograph's own size, 255 = ignored."""
        label = load_picture(self.label)
        try:
            return self.class_table.decode_label(label)
        except InputError as error:
            raise InputError(f"{self.label}: {error}. Run dataset/dataset_prep.py again") from error


def find_records(
    base_dir: Path, split: str, limit: int | None = None, *, class_table: ClassTable = PETS
) -> list[Record]:
    """The pets of a split, sorted by name; with `limit`, that many of them at even distances in that order.

    InputError when `base_dir` is not prepared, was prepared with other classes, or an image or label is missing or has
    changed since.
    """
    prepare = f"Run: python dataset/dataset_prep.py {base_dir}"
    if not (base_dir / REPORT).is_file():
        raise InputError(f"{base_dir.absolute()} is not prepared. {prepare} (--download fetches the data)")
    report = read_report(base_dir)
    if report["classes"] != (expected := list(class_table.names)):
        raise InputError(f"{base_dir} was prepared with the classes {report['classes']}, not {expected}. {prepare}")
    if report["failed"]:
        log.warning("%s lacks %d files that could not be read. %s", base_dir, len(report["failed"]), prepare)
    for name, state in report["originals"].items():  # they may be gone, as in a copy without them
        if is_file(base_dir / name) and not is_unchanged(base_dir / name, state):
            raise InputError(f"{base_dir / name} has changed since it was prepared. {prepare}")
    records = []
    for folder, species in class_table.species.items():
        color, label_dir = (base_dir / split / kind / folder for kind in ("color", "label"))
        images = [path for path in color.glob("*.jpg") if path.name[0] != "."]
        count = report["counts"][split].get(folder, 0)
        if len(images) != count:
            raise InputError(f"{color} holds {len(images)} images, but {count} were prepared. {prepare}")
        for image in images:
            label = label_dir / f"{image.stem}.png"
            if not label.is_file():
                raise InputError(f"{image} has no label {label}. {prepare}")
            for path in (image, label):
                state = report["files"].get(relative(path, base_dir))  # None: of an earlier version
                if state is not None and not is_unchanged(path, state):
                    raise InputError(f"{path} has changed since it was prepared. {prepare}")
            records.append(Record(image.stem, species, image, label, class_table))
    if not records:
        raise InputError(f"{base_dir / split} holds no images. {base_dir / REPORT} lists the files that were left out.")
    return spread(sorted(records, key=lambda record: record.name), limit)


def spread(records: Sequence[Record], limit: int | None) -> list[Record]:
    """`limit` of the records, of each species in proportion, but at least 2 if that is possible; at even distances in
    their order."""
    if not limit or limit >= len(records):
        return list(records)
    groups = [[one for one in records if one.species == value] for value in sorted({one.species for one in records})]
    exact = [limit * len(group) / len(records) for group in groups]
    least = min(2, limit // len(groups))
    shares = [min(len(group), max(least, int(share))) for group, share in zip(groups, exact)]
    while sum(shares) != limit:  # rounding: give to the group with the largest deficit, or take from the smallest
        step = 1 if sum(shares) < limit else -1
        able = [i for i, group in enumerate(groups) if least <= shares[i] + step <= len(group)]
        shares[max(able, key=lambda i: step * (exact[i] - shares[i]))] += step
    picked = [
        group[i]
        for group, share in zip(groups, shares)
        for i in np.linspace(0, len(group) - 1, share).round().astype(int)
    ]
    return sorted(picked, key=lambda record: record.name)


def is_synthetic(base_dir: Path) -> bool:
    """Whether the pets were drawn by dataset/synthetic.py."""
    return bool(read_report(base_dir).get("synthetic"))


@dataclass(eq=False, repr=False)
class PetDataset(Dataset):
    """Pets as dicts of `image` (3, size, size) uint8 RGB, `mask` (size, size) uint8 and `name`. In a mask 255 is the
    boundary, 254 what the augmentation has uncovered.

    The key of an item is (epoch, sample), or sample for epoch 0. A sample is a position in `indices`, which are numbers
    of records and may repeat. With `transform` items are augmented; the outcome depends on (seed, epoch, sample) alone.
    With `label_size` items also have `label`, a NumPy array (H, W) uint8 for scoring: the classes at the photograph's
    own size ("native"), or resized to `label_size` x `label_size`. The random inputs of `perturbations` are added as
    `noise/NAME` (draws, ...).
    """

    records: Sequence[Record]
    size: int
    _: KW_ONLY
    cache: Cache | Path | None = None  # a cache of `records`, or the folder for one (default: beside the data)
    indices: Sequence[int] | None = None  # default: all
    transform: A.Compose | None = None
    paste: float = 0  # probability of another pet of `indices` in an item
    seed: int = 0
    label_size: str | int | None = None
    perturbations: Sequence[Perturbation] = ()
    synthetic: bool = False

    def __post_init__(self) -> None:
        if self.cache is None or isinstance(self.cache, Path):
            self.cache = Cache(self.records, self.size, self.cache)
        self.indices = range(len(self.records)) if self.indices is None else self.indices

    @property
    def class_table(self) -> ClassTable:
        """The classes of a model's targets on these data."""
        return self.records[0].class_table

    @property
    def names(self) -> list[str]:
        """The names of the selected photographs, each once, in the order of `records`."""
        return [self.records[index].name for index in sorted(set(self.indices))]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, sample = key if isinstance(key, tuple) else (0, key)
        index = self.indices[sample]
        record, (image, mask) = self.records[index], self.cache[index]
        image, mask = self._vary(image, mask, (self.seed, epoch, sample))
        rng = np.random.default_rng([self.seed, epoch, sample, 2])  # a stream of its own, beside the augmentation's
        if self.paste and rng.random() < self.paste:
            other = self.cache[self.indices[rng.integers(len(self.indices))]]
            image, mask = paste_pet(image, mask, *self._vary(*other, (self.seed, epoch, sample, 3)))
        item = {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),  # (3, size, size)
            "mask": torch.from_numpy(np.ascontiguousarray(mask)),
            "name": record.name,
        }
        if self.label_size is not None:
            label = record.load_label()
            item["label"] = label if self.label_size == "native" else resize_mask(label, self.label_size)
        noise = sample_noise(record.name, self.perturbations, self.size)  # faster in the loader's workers than later
        return item | {f"noise/{name}": values for name, values in noise.items()}

    def _vary(self, image: np.ndarray, mask: np.ndarray, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        return (image, mask) if self.transform is None else augment(self.transform, image, mask, key)

    def masks(self) -> Iterator[np.ndarray]:
        """The masks (size, size) of the items, before any augmentation."""
        return (self.cache[index][1] for index in self.indices)


def split_records(records: Sequence[Record], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Sorted training and validation indices, stratified by species: at least one image of each species in both.

    InputError when a species has fewer than two images.
    """
    rng = np.random.default_rng(seed)
    train, val = [], []
    class_table = records[0].class_table
    for species in class_table.species.values():
        members = [index for index, record in enumerate(records) if record.species == species]
        if len(members) < 2:
            held = f"{records[0].image.parents[2]} holds {len(members)} {class_table.names[species]} image(s)"
            raise InputError(f"{held}; training needs at least 2 of each species. Add some, or leave --limit out.")
        order = rng.permutation(members).tolist()
        count = min(max(round(val_fraction * len(members)), 1), len(members) - 1)
        val += order[:count]
        train += order[count:]
    return sorted(train), sorted(val)


def balance(records: Sequence[Record], indices: Sequence[int]) -> list[int]:
    """`indices` with those of rarer species repeated until all species are equally frequent (report section 2)."""
    species = records[0].class_table.species.values()
    groups = [[index for index in indices if records[index].species == value] for value in species]
    most = max(map(len, groups))
    return [index for group in groups for index in np.resize(group, most).tolist()]  # resize repeats from the start


def make_train_sets(
    config: TrainConfig, train_class: type[PetDataset] = PetDataset, val_class: type[PetDataset] = PetDataset
) -> tuple[PetDataset, PetDataset]:
    """Training set (balanced, augmented) and validation set (neither) of a TrainConfig, split by image."""
    records = find_records(config.data, "TrainVal", config.limit)
    if is_synthetic(config.data):
        log.info("%s holds synthetic drawings: scores are not comparable to any benchmark", config.data)
    train, val = split_records(records, config.val_fraction, config.seed)
    size, cache = config.image_size, Cache(records, config.image_size, config.cache)
    augmented = {"indices": balance(records, train), "transform": train_transform(config.augment), "seed": config.seed}
    augmented |= {"paste": config.paste}
    return train_class(records, size, cache=cache, **augmented), val_class(records, size, cache=cache, indices=val)


def make_test_set(config: TestConfig, image_size: int) -> PetDataset:
    """The split of a TestConfig, sorted by name, with labels at `--score-size` and the inputs of `--perturb`."""
    return PetDataset(
        find_records(config.data, config.split, config.limit),
        image_size,
        cache=config.cache,
        label_size=config.score_size,
        perturbations=choose_perturbations(config.perturb),
        synthetic=is_synthetic(config.data),
    )
