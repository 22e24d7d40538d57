"""dataset/pet_heatmap.py and utils/dataset_prep.py: clicks, heatmaps, masks, and the data sets with points."""

import itertools
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.augmentation import train_transform
from dataset.dataset_prep import main as prepare_data
from dataset.pet import PetDataset, find_records
from dataset.pet_heatmap import FixedClickDataset, RandomClickDataset, border_pixels, click_target, read_points
from utils.dataset import CLICKS, IGNORE, PETS, foreground
from utils.dataset_prep import gaussian_heatmaps, point_mask, random_pixel, sample_points
from utils.files import InputError
from utils.image import picture_size, rescale_point


def test_a_heatmap_is_a_gaussian_of_ten_pixels_at_256():
    heat = gaussian_heatmaps(torch.tensor([[40.0, 200.0], [0.0, 0.0]]), 256, 256)
    assert heat.shape == (2, 256, 256)
    assert heat[0, 200, 40] == 1 and heat[0].argmax() == 200 * 256 + 40
    assert heat[0, 200, 50].item() == pytest.approx(math.exp(-0.5)) and heat[0, 200, 50] == heat[0, 210, 40]
    assert heat[1, 0, 20].item() == pytest.approx(math.exp(-2))


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_a_sampled_point_is_in_its_class(seed, height, width):
    rng = np.random.default_rng(seed)
    classes = rng.choice(np.array([0, 2, IGNORE], np.uint8), (height, width))
    points = sample_points(classes, PETS, rng)
    assert {name for name, _, _ in points} == {PETS.names[value] for value in set(classes.flat) - {IGNORE}}
    for name, x, y in points:
        assert PETS.names[classes[y, x]] == name
    assert random_pixel(np.zeros((height, width), bool), rng) is None


def test_points_are_sampled_uniformly():
    where = np.zeros((4, 5), bool)
    where[1, 1:4] = where[3, 4] = True
    rng = np.random.default_rng(0)
    points = [random_pixel(where, rng) for _ in range(2000)]
    shares = [points.count(point) / 2000 for point in [(1, 1), (2, 1), (3, 1), (4, 3)]]
    assert sum(shares) == 1 and shares == pytest.approx([0.25] * 4, abs=0.05)


def test_the_target_of_a_click_is_its_side_of_the_outline():
    mask = torch.tensor([[[0, 2], [IGNORE, 2]]] * 2, dtype=torch.uint8)
    target = click_target(mask, torch.tensor([True, False]))
    assert target.tolist() == [[[0, 1], [IGNORE, 1]], [[1, 0], [IGNORE, 0]]] and target.dtype == torch.uint8
    for (x, y), expected in (((1, 0), target[0]), ((0, 0), target[1])):
        assert point_mask(mask[0].numpy(), x, y).tolist() == expected.tolist()


def random_clicks(prepared, seed=0, size=48) -> RandomClickDataset:
    return RandomClickDataset(find_records(prepared, "TrainVal"), size, transform=train_transform(), seed=seed)


def test_random_clicks_are_in_their_class_after_augmentation(prepared):
    dataset = random_clicks(prepared)
    sides, opposed, points = [], 0, set()
    for epoch, sample in itertools.product(range(1, 9), range(len(dataset))):
        item = dataset[epoch, sample]
        pet = foreground(item["mask"])
        for (x, y), on_pet in zip(item["points"].int().tolist(), item["on_pet"].tolist()):
            assert bool(pet[y, x]) == on_pet and item["mask"][y, x] != IGNORE, (item["name"], x, y)
            sides.append(on_pet)
            points.add((sample, x, y))
        if not item["negative_points"].isnan().any():
            assert torch.equal(item["negative_points"], item["points"].flip(0))
            opposed += 1
    assert np.mean(sides) == 0.5 and 0.3 < 2 * opposed / len(sides) < 0.7
    assert len(points) > 0.9 * len(sides), "other clicks in every epoch"
    again, other = (random_clicks(prepared, seed)[3, 5] for seed in (0, 1))
    for key in ("image", "mask", "points", "on_pet"):
        assert torch.equal(again[key], dataset[3, 5][key]), key
    assert not torch.equal(other["points"], dataset[3, 5]["points"]), "other clicks with another seed"
    assert dataset.class_table == CLICKS


def test_half_of_the_random_clicks_are_near_the_outline(prepared):
    dataset = random_clicks(prepared)
    distance = np.hypot(*(np.mgrid[:64, :64] - 32))  # most pixels of this pet are not near its outline
    disk = np.select([distance < 30, distance > 31], [2, 0], IGNORE).astype(np.uint8)
    dataset.cache = [(np.zeros((64, 64, 3), np.uint8), disk)] * len(dataset)
    dataset.transform = None
    items = [dataset[epoch, sample] for epoch in range(20) for sample in range(len(dataset))]
    clicks = [item["points"][item["on_pet"]][0].int().tolist() for item in items]
    border = border_pixels({True: disk == 2, False: disk == 0}, True)
    near = np.mean([border[y, x] for x, y in clicks])
    assert near == pytest.approx(0.5 + border.sum() / (disk == 2).sum() / 2, abs=0.1)


def test_border_pixels_are_within_a_sixteenth_of_the_edge():
    pet, background = np.zeros((2, 64, 64), bool)
    pet[:, 40:], background[:, :38] = True, True  # a boundary two pixels wide between them
    sides = {True: pet, False: background}
    assert np.flatnonzero(border_pixels(sides, True).any(axis=0)).tolist() == [40, 41]
    assert np.flatnonzero(border_pixels(sides, False).any(axis=0)).tolist() == [36, 37]
    background[:, 8:] = False  # no pixel is that near
    assert border_pixels(sides, False) is background and border_pixels(sides, True) is pet


def test_clicks_do_not_change_the_augmentation(prepared):
    plain = PetDataset(find_records(prepared, "TrainVal"), 48, transform=train_transform(), seed=0)
    for key in ((1, 0), (2, 3)):
        assert torch.equal(plain[key]["image"], random_clicks(prepared)[key]["image"]), key


def test_an_image_that_is_all_pet_is_clicked_on_the_pet(prepared):
    dataset = random_clicks(prepared)
    dataset.cache = [(np.zeros((48, 48, 3), np.uint8), np.full((48, 48), 2, np.uint8))] * len(dataset)
    for sample in range(len(dataset)):
        item = dataset[1, sample]
        assert item["on_pet"].tolist() == [True, True] and item["negative_points"].isnan().all(), sample


def test_fixed_clicks_are_the_points_of_the_file(prepared):
    records = find_records(prepared, "Test")
    dataset, points = FixedClickDataset(records, 64), read_points(records)
    assert len(dataset) == 2 * len(records) and dataset.class_table == CLICKS
    for sample in range(len(dataset)):
        item, record, click = dataset[sample], records[sample // 2], points[sample // 2][sample % 2]
        assert item["name"] == record.name and item["on_pet"].tolist() == [click.on_pet]
        assert record.load_label()[int(click.y), int(click.x)] == (record.species if click.on_pet else 0)
        expected = rescale_point(click.x, click.y, picture_size(record.image), (64, 64))
        assert item["points"][0].tolist() == pytest.approx(expected) and item["negative_points"].isnan().all()


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("images", "annotations"))


REMEDY = r".*\. Run: python dataset/dataset_prep\.py"


def test_wrong_points_are_an_error_that_names_the_line(copy):
    path = copy / "Test/points.csv"
    records = find_records(copy, "Test")
    header, first, *rows = path.read_text().splitlines()
    start = first.rsplit(",", 2)[0]
    for lines, message in [
        ([first, *rows, "Stranger_1,cat,1,1"], rf"points\.csv, line {len(rows) + 3}: 'Stranger_1' is not an image of"),
        ([first.replace("background", "tree")], r"line 2: class 'tree', expected background or "),
        ([f"{start},1000,3"], r"line 2: \(1000, 3\) is not a point of .* which is \d+x\d+"),
        ([f"{start},nan,3"], r"line 2: \(nan, 3\) is not a point"),
        ([f"{start},-1,3"], r"line 2: \(-1, 3\) is not a point"),
        ([f"{start},x"], r"line 2: \(x, None\) is not a point"),
    ]:
        path.write_text("\n".join([header, *lines]) + "\n")
        with pytest.raises(InputError, match=message + REMEDY):
            read_points(records)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"has the columns .*expected name, class, x, y" + REMEDY):
        read_points(records)
    path.unlink()
    with pytest.raises(InputError, match=r"points\.csv is missing" + REMEDY):
        read_points(records)


def test_a_photograph_without_a_kind_of_point_is_logged(copy, caplog):
    path = copy / "Test/points.csv"
    header, first, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows]) + "\n")
    records = find_records(copy, "Test")
    with caplog.at_level("INFO"):
        dataset = FixedClickDataset(records, 32)
    assert len(dataset) == 2 * len(records) - 1
    assert f"no point in the background of 1 images ({first.split(',')[0]}" in caplog.text


def test_preparation_saves_a_heatmap_and_a_mask_of_every_point(copy, capsys):
    assert prepare_data([str(copy), "--save-heatmaps", "--processes", "1"]) == 0
    output = capsys.readouterr().out
    for split in ("TrainVal", "Test"):
        records = find_records(copy, split)
        parts = itertools.product([record.name for record in records], ("pet", "background"), ("heatmap", "mask"))
        folder = copy / split / "prompt"
        assert {path.name for path in folder.iterdir()} == {"_".join(name) + ".png" for name in parts}
        assert f"{2 * len(records)} heatmaps and masks: {folder}" in output
        click = next(click for click in read_points(records)[0] if click.on_pet)
        start = f"{records[0].name}_pet_"
        heat, mask = (np.asarray(Image.open(folder / f"{start}{kind}.png")) for kind in ("heatmap", "mask"))
        label = records[0].load_label()
        assert heat.shape == label.shape and heat[int(click.y), int(click.x)] == 255
        assert np.array_equal(mask == 255, foreground(label)) and np.array_equal(mask == 128, label == IGNORE)
