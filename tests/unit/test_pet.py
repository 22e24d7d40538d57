"""dataset/pet.py: records, cache, split, balance, batches, loaders."""

from __future__ import annotations

import errno
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.timing import peak_memory
from dataset import pet
from dataset.augmentation import train_transform
from dataset.dataset_prep import prepare
from dataset.pet import (
    Cache,
    EpochBatches,
    PetDataset,
    Record,
    balance,
    find_records,
    make_loader,
    make_test_loader,
    make_train_loaders,
    split_records,
)
from utils.config import TestConfig as ScoreConfig
from utils.config import TrainConfig
from utils.dataset import resize_image, resize_mask
from utils.files import InputError


def fake_records(cats: int, dogs: int) -> list[Record]:
    base = Path("data/TrainVal/color")
    names = [(f"cat_{i}", 1) for i in range(cats)] + [(f"dog_{i}", 2) for i in range(dogs)]
    return [Record(name, species, base / "x" / name, base) for name, species in names]


def test_not_prepared_says_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"not prepared. Run: python dataset/dataset_prep.py"):
        find_records(tmp_path, "TrainVal")


def test_a_lost_label_is_named(base):
    prepare(base)
    (base / "Test/label/cats/Synthetic_cat_2.png").unlink()
    with pytest.raises(InputError, match=r"Synthetic_cat_2\.jpg has no label"):
        find_records(base, "Test")
    (base / "Test/color/cats/Synthetic_cat_2.jpg").unlink()
    with pytest.raises(InputError, match=r"cats holds 3 images, prepared were 4"):
        find_records(base, "Test")


def test_hidden_files_are_no_records(base):
    prepare(base)
    (base / "Test/color/cats/._Synthetic_cat_2.jpg").touch()
    assert len(find_records(base, "Test")) == 12


def test_a_label_spoiled_after_preparation_is_named(base):
    prepare(base)
    record = find_records(base, "Test")[0]
    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(record.label)
    with pytest.raises(InputError, match=rf"{record.name}\.png: 81 label pixels stand for no class"):
        record.load_label()


def test_limit_keeps_both_species(prepared):
    records = find_records(prepared, "TrainVal", limit=4)
    assert len(records) == 4 and {record.species for record in records} == {1, 2}


def test_items_are_the_resized_files(prepared):
    records = find_records(prepared, "Test")
    item = PetDataset(records, 40, label_size="native")[3]
    photo = Image.open(records[3].image)
    assert item["image"].shape == (3, 40, 40) and item["image"].dtype == torch.uint8
    np.testing.assert_array_equal(item["image"].permute(1, 2, 0), resize_image(photo, 40))
    np.testing.assert_array_equal(item["mask"], resize_mask(records[3].load_label(), 40))
    assert item["label"].shape == (photo.height, photo.width) and item["name"] == records[3].name
    assert PetDataset(records, 40, label_size=24)[3]["label"].shape == (24, 24)


def test_cache_is_made_once_and_anew_when_the_data_change(base):
    prepare(base)
    records = find_records(base, "Test")
    cache = Cache(records, 24)
    made = cache.path.stat().st_mtime_ns
    assert Cache(records, 24).path.stat().st_mtime_ns == made

    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(records[0].image.with_suffix(".new.jpg"))
    records[0].image.with_suffix(".new.jpg").replace(records[0].image)
    other = Cache(records, 24)
    assert other.path != cache.path and not cache.path.exists(), "the outdated cache goes"
    assert other[0][0].max() == 0
    assert Cache(records, 32).path.exists() and other.path.exists(), "caches of several sizes stay side by side"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured on Linux alone")
def test_a_cache_is_built_in_constant_memory(base):
    prepare(base)
    records = find_records(base, "Test")
    few, many = (peak_memory(torch.device("cpu"), lambda n=n: Cache(n * records, 256)) for n in (6, 36))  # 72, 432
    assert many < few + 360 * 256 * 256 * 4 / 2**20 / 2, "MiB, half of what the further images take in the file"


def test_two_at_once_build_one_cache(base, monkeypatch):
    prepare(base)
    records, decoded = find_records(base, "Test"), []
    load = pet.load_picture

    def counted(path):
        decoded.append(path)
        return load(path)

    monkeypatch.setattr(pet, "load_picture", counted)
    with ThreadPoolExecutor(4) as pool:  # each with a lock of its own, as processes have
        caches = list(pool.map(lambda _: Cache(records, 24), range(4)))
    assert sorted(decoded) == sorted(path for record in records for path in (record.image, record.label))
    assert all(np.array_equal(cache[3][0], caches[0][3][0]) for cache in caches)


def test_a_file_system_without_locks(base, monkeypatch):
    prepare(base)

    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("utils.files.fcntl.flock", refuse)
    assert Cache(find_records(base, "Test"), 24)[0][0].any()


def test_a_cache_cut_short_is_never_read(base, monkeypatch):
    prepare(base)
    records = find_records(base, "Test")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dataset.pet.resize_mask", fail)
    with pytest.raises(InputError, match=r"cannot write the cache.*No space left"):
        Cache(records, 24)
    assert [path.suffix for path in (base / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    cache = Cache(records, 24)
    assert cache[0][0].any()
    cache.path.write_bytes(cache.path.read_bytes()[:1000])  # a copy of the folder that was cut short
    assert Cache(records, 24)[len(records) - 1][0].any()


def test_pickled_for_a_worker_the_pixels_stay_behind(prepared):
    dataset = PetDataset(find_records(prepared, "Test"), 64, transform=train_transform())
    expected = dataset[0]["image"]
    copy = pickle.dumps(dataset)
    assert len(copy) < 60_000, "12 images of 16 kB stay behind"
    assert torch.equal(pickle.loads(copy)[0]["image"], expected)


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.01, 0.9), st.integers(0, 5))
def test_no_image_on_both_sides(cats, dogs, fraction, seed):
    records = fake_records(cats, dogs)
    train, val = split_records(records, fraction, seed)
    assert sorted(train + val) == list(range(cats + dogs))
    for side in (train, val):
        assert {records[index].species for index in side} == {1, 2}
    for species, count in ((1, cats), (2, dogs)):
        drawn = sum(records[index].species == species for index in val)
        assert abs(drawn - fraction * count) <= 1
    assert (train, val) == split_records(records, fraction, seed)


def test_split_depends_on_the_seed():
    records = fake_records(30, 60)
    assert split_records(records, 0.1, 0)[1] != split_records(records, 0.1, 1)[1]


def test_one_species_cannot_be_trained_on():
    with pytest.raises(InputError, match=r"holds 0 cat image"):
        split_records(fake_records(0, 9), 0.1, 0)


@given(st.integers(1, 20), st.integers(1, 20))
def test_balance_repeats_the_rarer_species(cats, dogs):
    records = fake_records(cats, dogs)
    samples = balance(records, range(cats + dogs))
    counts = np.bincount(samples, minlength=cats + dogs)
    assert (
        sum(records[i].species == 1 for i in samples)
        == sum(records[i].species == 2 for i in samples)
        == max(cats, dogs)
    )
    for species in (1, 2):
        repeats = [counts[i] for i in range(cats + dogs) if records[i].species == species]
        assert min(repeats) >= 1 and max(repeats) - min(repeats) <= 1


@given(st.integers(1, 50), st.integers(1, 16), st.integers(1, 3), st.integers(0, 3))
def test_every_sample_once_per_epoch(samples, batch_size, world, epoch):
    seen, lengths = [], set()
    for rank in range(world):
        batches = EpochBatches(samples, batch_size, shuffle=True, seed=1, rank=rank, world=world)
        batches.set_epoch(epoch)
        taken = list(batches)
        assert len(taken) == len(batches) and all(taken)
        lengths.add(len(taken))
        assert all(key[0] == epoch for batch in taken for key in batch)
        seen += [sample for batch in taken for _, sample in batch]
    assert sorted(seen) == list(range(samples))
    assert len(lengths) == 1 or samples < world, "processes that wait for each other take as many steps"


def test_order_changes_with_the_epoch():
    batches = EpochBatches(50, 8, shuffle=True, seed=0)
    first = list(batches)
    batches.set_epoch(1)
    assert [[sample for _, sample in batch] for batch in batches] != [
        [sample for _, sample in batch] for batch in first
    ]


def test_any_number_of_workers_gives_the_same_batches(prepared):
    records = find_records(prepared, "TrainVal")
    streams = []
    for workers in (0, 1, 2):
        dataset = PetDataset(records, 32, transform=train_transform(), seed=3)
        loader = make_loader(dataset, EpochBatches(len(dataset), 4, shuffle=True, seed=3), workers)
        batches = []
        for epoch in (1, 2):
            loader.batch_sampler.set_epoch(epoch)
            batches += [(batch["name"], batch["image"], batch["mask"]) for batch in loader]
        streams.append(batches)
    for stream in streams[1:]:
        for (name, image, mask), (same_name, same_image, same_mask) in zip(streams[0], stream):
            assert name == same_name and torch.equal(image, same_image) and torch.equal(mask, same_mask)
    first, second = streams[0][:3], streams[0][3:]
    assert not torch.equal(torch.cat([b[1] for b in first]).sum(), torch.cat([b[1] for b in second]).sum())


def test_repeats_of_an_image_are_augmented_differently(prepared):
    records = find_records(prepared, "TrainVal")
    dataset = PetDataset(records, 64, indices=[0, 0], transform=train_transform())
    assert any(not torch.equal(dataset[epoch, 0]["image"], dataset[epoch, 1]["image"]) for epoch in range(3))


def test_train_loaders(prepared):
    config = TrainConfig(data=prepared, image_size=32, batch_size=4, workers=0, val_fraction=0.25)
    train, val, split = make_train_loaders(config)
    assert len(split["train"]) == 9 and len(split["val"]) == 3 and not set(split["train"]) & set(split["val"])
    assert len(train.dataset) == 12, "3 cats repeated to 6, and 6 dogs"
    assert val.dataset.transform is None
    assert {name for batch in val for name in batch["name"]} == set(split["val"])
    assert all((torch.equal(a["image"], b["image"])) for a, b in zip(val, val))


def test_fewer_images_than_a_batch(prepared):
    with pytest.raises(InputError, match=r"14 training images.*fewer than a batch of 64: use --batch-size 14"):
        make_train_loaders(TrainConfig(data=prepared, image_size=32))


def test_test_loader_scores_every_image_of_the_split(prepared):
    loader = make_test_loader(ScoreConfig(data=prepared, workers=0, batch_size=5), 32)
    names = [name for batch in loader for name in batch["name"]]
    assert names == sorted(path.stem for path in (prepared / "Test/color").rglob("*.jpg"))


def test_unwritable_folder(base, monkeypatch):
    prepare(base)
    shutil.rmtree(base / "cache", ignore_errors=True)
    (base / "cache").touch()  # a file where the folder must be
    with pytest.raises(InputError, match="cannot write the cache"):
        Cache(find_records(base, "Test"), 24)
