"""dataset/pet_heatmap.py and utils/dataset_prep.py: clicks, heatmaps, masks."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dataset.augmentation import train_transform
from dataset.pet import find_records
from dataset.pet_heatmap import PetHeatmapDataset, near, read_points, save_prompts, under_click
from tests.conftest import run
from utils.dataset import CLASSES, IGNORE, pet_pixels, rescale_point
from utils.dataset_prep import draw_points, gaussian_heatmaps, point_mask, random_pixel
from utils.files import InputError


def test_a_heatmap_is_a_gaussian_with_peak_one_and_ten_pixels_at_256():
    heat = gaussian_heatmaps(torch.tensor([[40.0, 200.0], [0.0, 0.0]]), 256, 256)
    assert heat.shape == (2, 256, 256)
    assert heat[0, 200, 40] == 1 and heat[0].argmax() == 200 * 256 + 40
    assert heat[0, 200, 50].item() == pytest.approx(math.exp(-0.5)) and heat[0, 200, 50] == heat[0, 210, 40]
    assert heat[1, 0, 20].item() == pytest.approx(math.exp(-2))


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_a_drawn_point_lies_in_its_class(seed, height, width):
    rng = np.random.default_rng(seed)
    classes = rng.choice(np.array([0, 2, IGNORE], np.uint8), (height, width))
    points = draw_points(classes, rng)
    assert {name for name, _, _ in points} == {CLASSES[value] for value in set(classes.flat) - {IGNORE}}
    for name, x, y in points:
        assert CLASSES[classes[y, x]] == name
    assert random_pixel(np.zeros((height, width), bool), rng) is None


def test_points_are_drawn_evenly():
    where = np.zeros((4, 5), bool)
    where[1, 1:4] = where[3, 4] = True
    rng = np.random.default_rng(0)
    points = [random_pixel(where, rng) for _ in range(2000)]
    shares = [points.count(point) / 2000 for point in [(1, 1), (2, 1), (3, 1), (4, 3)]]
    assert sum(shares) == 1 and shares == pytest.approx([0.25] * 4, abs=0.05)


def test_masks_of_either_click():
    mask = torch.tensor([[[0, 2], [IGNORE, 2]]] * 2, dtype=torch.uint8)
    target = under_click(mask, torch.tensor([True, False]))
    assert target.tolist() == [[[0, 1], [IGNORE, 1]], [[1, 0], [IGNORE, 0]]] and target.dtype == torch.uint8
    for (x, y), expected in (((1, 0), target[0]), ((0, 0), target[1])):
        assert point_mask(mask[0].numpy(), x, y).tolist() == expected.tolist()


def test_points_move_with_the_picture():
    assert rescale_point(0, 0, (100, 50), (100, 100)) == (0, 0.5)
    assert rescale_point(99.5, 49.5, (100, 50), (200, 200)) == (199.5, 199.5)  # the last corner stays the corner


def train_set(prepared, seed=0, size=48) -> PetHeatmapDataset:
    return PetHeatmapDataset(find_records(prepared, "TrainVal"), size, transform=train_transform(), seed=seed)


def test_drawn_clicks_lie_in_their_class_after_augmentation(prepared):
    dataset = train_set(prepared)
    kinds, avoided, points = [], 0, set()
    for epoch in range(1, 9):
        for sample in range(len(dataset)):
            item = dataset[(epoch, sample)]
            pet = pet_pixels(item["mask"])
            for (x, y), on_pet in zip(item["point"].int().tolist(), item["on_pet"].tolist()):
                assert bool(pet[y, x]) == on_pet and item["mask"][y, x] != IGNORE
                kinds.append(on_pet)
                points.add((sample, x, y))
            if not item["avoid"].isnan().any():
                assert torch.equal(item["avoid"], item["point"].flip(0))
                avoided += 1
    assert np.mean(kinds) == 0.5 and 0.3 < 2 * avoided / len(kinds) < 0.7
    assert len(points) > 0.9 * len(kinds), "drawn anew in every epoch"
    again = train_set(prepared)[(3, 5)]
    assert all(torch.equal(again[key], dataset[(3, 5)][key]) for key in ("image", "mask", "point", "on_pet"))


def test_what_is_near_the_outline():
    pet, background = np.zeros((64, 64), bool), np.zeros((64, 64), bool)
    pet[:, 40:], background[:, :38] = True, True  # a boundary two pixels wide between them
    sides = {True: pet, False: background}
    assert np.flatnonzero(near(sides, True).any(axis=0)).tolist() == [40, 41]
    assert np.flatnonzero(near(sides, False).any(axis=0)).tolist() == [36, 37]
    background[:, 8:] = False  # none is near
    assert near(sides, False) is background and near(sides, True) is pet


def test_the_click_does_not_change_the_augmentation(prepared):
    from dataset.pet import PetDataset

    plain = PetDataset(find_records(prepared, "TrainVal"), 48, transform=train_transform(), seed=0)
    for key in ((1, 0), (2, 3)):
        assert torch.equal(plain[key]["image"], train_set(prepared)[key]["image"])


def test_fixed_clicks_are_those_of_the_file(prepared):
    records = find_records(prepared, "Test")
    dataset = PetHeatmapDataset(records, 64)
    assert len(dataset) == 2 * len(records)
    points = read_points(records)
    for sample in range(len(dataset)):
        item, click = dataset[sample], points[sample // 2][sample % 2]
        assert item["name"] == records[sample // 2].name and item["on_pet"].tolist() == [click.on_pet]
        assert records[sample // 2].load_label()[int(click.y), int(click.x)] == (
            records[sample // 2].species if click.on_pet else 0
        )
        with Image.open(records[sample // 2].image) as picture:
            expected = [(click.x + 0.5) * 64 / picture.width - 0.5, (click.y + 0.5) * 64 / picture.height - 0.5]
        assert item["point"][0].tolist() == pytest.approx(expected) and item["avoid"].isnan().all()


@pytest.fixture
def copy(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [*rows, "Stranger_1,cat,1,1"], r"points\.csv, line \d+: 'Stranger_1' is no image of"),
        (
            lambda rows: [rows[0].replace("background", "tree"), *rows[1:]],
            r"line 2: class 'tree', expected background or",
        ),
        (
            lambda rows: [rows[0].rsplit(",", 2)[0] + ",1000,3", *rows[1:]],
            r"line 2: \(1000, 3\) is no point of .* which is",
        ),
        (lambda rows: [rows[0].rsplit(",", 2)[0] + ",nan,3", *rows[1:]], r"line 2: \(nan, 3\) is no point"),
        (lambda rows: [rows[0].rsplit(",", 2)[0] + ",-1,3", *rows[1:]], r"\(-1, 3\) is no point"),
        (lambda rows: [rows[0].rsplit(",", 2)[0] + ",x", *rows[1:]], r"\(x, None\) is no point"),
    ],
)
def test_points_that_cannot_be(copy, change, message):
    path = copy / "Test/points.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *change(rows)]) + "\n")
    with pytest.raises(InputError, match=message):
        read_points(find_records(copy, "Test"))


def test_a_points_file_that_is_gone_or_no_points_file(copy):
    records = find_records(copy, "Test")
    (copy / "Test/points.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"has the columns .*expected name, class, x, y. Run: python dataset/"):
        read_points(records)
    (copy / "Test/points.csv").unlink()
    with pytest.raises(InputError, match=r"points\.csv is missing\. Run: python dataset/dataset_prep\.py"):
        read_points(records)


def test_a_photograph_without_a_kind_of_point_is_skipped_and_counted(copy, caplog):
    path = copy / "Test/points.csv"
    header, first, *rows = path.read_text().splitlines()
    assert ",background," in first
    path.write_text("\n".join([header, *rows]) + "\n")
    records = find_records(copy, "Test")
    with caplog.at_level("INFO"):
        dataset = PetHeatmapDataset(records, 32)
    assert len(dataset) == 2 * len(records) - 1
    assert f"no point in the background of 1 images ({first.split(',')[0]}" in caplog.text


def test_a_training_image_that_is_all_pet_is_clicked_on_the_pet(prepared):
    dataset = train_set(prepared)
    dataset.cache = [(np.zeros((48, 48, 3), np.uint8), np.full((48, 48), 2, np.uint8))] * len(dataset)
    for sample in range(len(dataset)):
        item = dataset[(1, sample)]
        assert item["on_pet"].tolist() == [True, True] and item["avoid"].isnan().all()


def test_pictures_of_the_prompts(copy):
    assert save_prompts(copy, "Test") == 24
    record = find_records(copy, "Test")[0]
    click = next(click for click in read_points([record])[0] if click.on_pet)
    folder = copy / "Test/prompt"
    assert len(list(folder.iterdir())) == 48
    heat = np.asarray(Image.open(folder / f"{record.name}_pet_heatmap.png"))
    mask = np.asarray(Image.open(folder / f"{record.name}_pet_mask.png"))
    label = record.load_label()
    assert heat.shape == label.shape and heat[int(click.y), int(click.x)] == 255
    assert np.array_equal(mask == 255, pet_pixels(label)) and np.array_equal(mask == 128, label == IGNORE)


def test_preparation_writes_them_when_asked(base):
    result = run("dataset/dataset_prep.py", base, "--save-heatmaps", "--processes", 1)
    assert result.returncode == 0, result.stderr
    assert "24 heatmaps and masks" in result.stdout
    assert len(list((base / "TrainVal/prompt").iterdir())) == 48
