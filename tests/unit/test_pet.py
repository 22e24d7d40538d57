"""dataset/pet.py: records, items, split, balance, the data sets of a training and a test."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.augmentation import train_transform
from dataset.cache import Cache
from dataset.dataset_prep import prepare
from dataset.perturbation import PERTURBATIONS
from dataset.pet import (
    PetDataset,
    Record,
    balance,
    find_records,
    is_synthetic,
    make_test_set,
    make_train_sets,
    split_records,
)
from tests.helpers import train_config
from utils.config import TestConfig as ScoreConfig
from utils.dataset import PETS
from utils.files import InputError
from utils.image import resize_image, resize_mask


def fake_records(cats, dogs):
    base = Path("data/TrainVal/color")
    names = [(f"cat_{i}", 1) for i in range(cats)] + [(f"dog_{i}", 2) for i in range(dogs)]
    return [Record(name, species, base / "x" / name, base) for name, species in names]


def test_unprepared_hidden_lost_and_damaged_files(base):
    with pytest.raises(InputError, match=r"not prepared. Run: python dataset/dataset_prep.py"):
        find_records(base, "TrainVal")
    prepare(base)
    (base / "Test/color/cats/._Synthetic_cat_2.jpg").touch()
    records = find_records(base, "Test")
    assert len(records) == 12, "hidden files are not records"

    Image.fromarray(np.full((9, 9), 7, np.uint8)).save(records[0].label)
    with pytest.raises(InputError, match=rf"{records[0].name}\.png: 81 pixels belong to no class"):
        records[0].load_label()
    with pytest.raises(InputError, match=rf"{records[0].name}\.png has changed since it was prepared"):
        find_records(base, "Test")
    (base / "Test/label/cats/Synthetic_cat_2.png").unlink()
    with pytest.raises(InputError, match=r"Synthetic_cat_2\.jpg has no label"):
        find_records(base, "Test")
    (base / "Test/color/cats/Synthetic_cat_2.jpg").unlink()
    with pytest.raises(InputError, match=r"cats holds 3 images, but 4 were prepared"):
        find_records(base, "Test")


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


def test_a_pickled_data_set_holds_no_pixels(prepared):
    dataset = PetDataset(find_records(prepared, "Test"), 64, transform=train_transform())
    expected = dataset[0]["image"]
    content = pickle.dumps(dataset)
    assert len(content) < 60_000, "12 images of 16 kB stay in the cache"
    assert torch.equal(pickle.loads(content)[0]["image"], expected)


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.01, 0.9), st.integers(0, 5))
def test_no_image_is_on_both_sides_of_the_split(cats, dogs, fraction, seed):
    records = fake_records(cats, dogs)
    train, val = split_records(records, fraction, seed)
    assert sorted(train + val) == list(range(cats + dogs))
    for side in (train, val):
        assert {records[index].species for index in side} == {1, 2}
    for species, count in ((1, cats), (2, dogs)):
        drawn = sum(records[index].species == species for index in val)
        assert abs(drawn - fraction * count) <= 1
    assert (train, val) == split_records(records, fraction, seed)


def test_the_split_depends_on_the_seed_and_needs_two_images_of_each_species():
    records = fake_records(30, 60)
    assert split_records(records, 0.1, 0)[1] != split_records(records, 0.1, 1)[1]
    for cats in (0, 1):
        with pytest.raises(InputError, match=rf"holds {cats} cat image\(s\); training needs at least 2"):
            split_records(fake_records(cats, 9), 0.1, 0)


@given(st.integers(1, 20), st.integers(1, 20))
def test_balance_repeats_the_rarer_species(cats, dogs):
    records = fake_records(cats, dogs)
    samples = balance(records, range(cats + dogs))
    counts = np.bincount(samples, minlength=cats + dogs)
    for species in (1, 2):
        repeats = [counts[i] for i in range(cats + dogs) if records[i].species == species]
        assert sum(repeats) == max(cats, dogs)
        assert min(repeats) >= 1 and max(repeats) - min(repeats) <= 1


def test_augmentation_depends_on_seed_epoch_and_sample(prepared):
    records = find_records(prepared, "TrainVal")
    cache = Cache(records, 64)

    def augmented(seed=0):
        return PetDataset(records, 64, cache=cache, indices=[0, 0], transform=train_transform(), seed=seed)

    def differ(first, second, keys):
        return any(not torch.equal(first[one]["image"], second[two]["image"]) for one, two in keys)

    dataset, epochs = augmented(), range(3)
    assert differ(dataset, dataset, [((epoch, 0), (epoch, 1)) for epoch in epochs]), "repeats of an image"
    assert differ(dataset, dataset, [((epoch, 0), (epoch + 1, 0)) for epoch in epochs]), "epochs"
    assert differ(dataset, augmented(seed=1), [((epoch, 0), (epoch, 0)) for epoch in epochs]), "seeds"
    assert not differ(dataset, augmented(), [((epoch, 0), (epoch, 0)) for epoch in epochs])
    assert torch.equal(dataset[1]["image"], dataset[0, 1]["image"]), "without an epoch it is epoch 0"


def test_training_is_balanced_and_augmented_validation_is_neither(prepared, tmp_path):
    train, val = make_train_sets(train_config(prepared, tmp_path))
    assert len(train.names) == 9 and len(val.names) == 3 and not set(train.names) & set(val.names)
    assert len(train) == 12, "3 cats repeated to 6, and 6 dogs"
    assert train.transform is not None and val.transform is None
    assert {item["name"] for item in (val[sample] for sample in range(len(val)))} == set(val.names)
    for sample in range(len(val)):
        assert torch.equal(val[1, sample]["image"], val[2, sample]["image"]), sample
    assert train.class_table == val.class_table == PETS


def test_a_test_set_is_the_whole_split_in_the_order_of_the_names(prepared):
    config = ScoreConfig(data=prepared, score_size=24, perturb=["occlusion"])
    test_set = make_test_set(config, 32)
    expected = sorted(path.stem for path in (prepared / "Test/color").rglob("*.jpg"))
    assert test_set.names == [item["name"] for item in (test_set[i] for i in range(len(test_set)))] == expected
    assert test_set[0]["label"].shape == (24, 24) and test_set.class_table == PETS
    assert test_set.perturbations == [PERTURBATIONS["occlusion"]] and "noise/occlusion" in test_set[0]
    assert test_set.synthetic and is_synthetic(prepared)


def test_pasted_pets_depend_on_the_sample_alone(prepared, tmp_path):
    sets = [make_train_sets(train_config(prepared, tmp_path, paste=paste, augment="strong"))[0] for paste in (0, 1, 1)]
    items = [[dataset[epoch, sample] for epoch in (0, 1) for sample in range(6)] for dataset in sets]
    for one, two in zip(items[1], items[2]):
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["mask"], two["mask"])
    changed = sum(not torch.equal(plain["mask"], pasted["mask"]) for plain, pasted in zip(items[0], items[1]))
    assert changed > 6
    both = sum({1, 2} <= set(item["mask"].unique().tolist()) for item in items[1])
    assert both > 0, "a cat beside a dog"
