"""The class table alone knows the classes: a fourth species needs one more row, from the labels to the figures."""

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dataset.cache import Cache
from dataset.dataset_prep import prepare
from dataset.exploration import format_summary, measure, plot_data, summarize
from dataset.perturbation import choose_perturbations
from dataset.pet import PetDataset, balance, find_records, split_records
from dataset.pet_heatmap import read_points
from models import load_model
from tests.helpers import CPU, segmentation_step, train_config
from unet.model import UNet
from utils.config import TestConfig as ScoreConfig
from utils.dataset import IGNORE, PETS, ClassRow, ClassTable
from utils.evaluation import ModelTest, plot_confusion, score
from utils.figures import class_styles, plot_pictures
from utils.files import InputError, read_csv, read_json
from utils.helper import class_table_of, load_checkpoint
from utils.predictor import Predictor
from utils.robustness import plot_robustness
from utils.run import plot_curves, start_run
from utils.train import fit

RABBIT = ClassRow("rabbit", (128, 128, 0), (0, 150, 90), "-", hatch="..", marker="v", folder="rabbits")
FOUR = dataclasses.replace(PETS, rows=(*PETS.rows, RABBIT))
SCORES = [*FOUR.names, "mean"]
COUNTS = {"TrainVal": {"cats": 4, "dogs": 6, "rabbits": 2}, "Test": {"cats": 2, "dogs": 2, "rabbits": 2}}
FUR = ((40, 40, 40), (220, 60, 60), (60, 220, 60), (60, 60, 220))  # color of each class in the photographs


def draw_report_layout(base: Path, mode: str = "P") -> Path:
    """Photographs and labels in the report's layout: a square pet with a boundary on a plain background."""
    rng = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        for kind in ("color", "label"):
            (base / split / kind).mkdir(parents=True)
        for folder, count in counts.items():
            for name in (f"{folder}_{split}_{number}" for number in range(count)):
                value, size = FOUR.species[folder], rng.integers(40, 56, 2)
                label = np.zeros(size, np.uint8)
                label[8:32, 8:32] = IGNORE
                label[10:30, 10:30] = value
                photo = np.where((label == value)[..., None], FUR[value], FUR[0]) + rng.normal(0, 4, (*size, 3))
                photo = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
                photo.save(base / split / "color" / f"{name}.jpg", quality=95)
                FOUR.encode_label(label).convert(mode).save(base / split / "label" / f"{name}.png")
    return base


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Cats, dogs and rabbits, prepared with the table of four classes; read only, except for the cache."""
    base = draw_report_layout(tmp_path_factory.mktemp("four"))
    prepare(base, class_table=FOUR)
    return base


@pytest.fixture(scope="module")
def records(base):
    return {split: find_records(base, split, class_table=FOUR) for split in COUNTS}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cat"}, "name of its own"),
        ({"name": "boundary"}, "name of its own"),
        ({"name": ""}, "name of its own"),
        ({"color": (128, 0, 0)}, "color of its own"),
        ({"color": (255, 255, 255)}, "color of its own"),
        ({"tint": PETS.rows[2].tint}, "tint of its own"),
        ({"line": ""}, "line style"),
    ],
)
def test_rows_that_cannot_be_distinguished_are_an_error(change, message):
    with pytest.raises(InputError, match=f"every class needs a {message}"):
        ClassTable((*PETS.rows, dataclasses.replace(RABBIT, **change)), PETS.ignored)


def test_a_table_survives_json_and_checkpoints(tmp_path):
    plain = FOUR.as_plain_dict()
    torch.save(plain, tmp_path / "table.pt")
    for copy in (json.loads(json.dumps(plain)), torch.load(tmp_path / "table.pt", weights_only=True)):
        assert ClassTable.from_plain_dict(copy) == FOUR != PETS
    assert len(FOUR) == 4 and FOUR.value("rabbit") == 3 and FOUR.species == {"cats": 1, "dogs": 2, "rabbits": 3}


def texts(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


def test_labels_and_overlays_of_the_fourth_class():
    classes = np.array([[0, 1, 2, 3, IGNORE]], np.uint8)
    for mode in ("P", "L", "RGB"):
        np.testing.assert_array_equal(FOUR.decode_label(FOUR.encode_label(classes).convert(mode)), classes, mode)
        with pytest.raises(InputError, match="1 pixels belong to no class"):
            PETS.decode_label(FOUR.encode_label(classes).convert(mode))
    drawn = FOUR.overlay(np.zeros((1, 5, 3), np.uint8), classes, opacity=1)
    assert [tuple(pixel) for pixel in drawn[0].tolist()] == [(0, 0, 0), *(FOUR.row(v).tint for v in (1, 2, 3, IGNORE))]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_preparation_sorts_the_fourth_species(tmp_path, mode):
    base = draw_report_layout(tmp_path / "data", mode)
    report, fresh = prepare(base, class_table=FOUR)
    assert fresh and report["counts"] == COUNTS and report["left_out"] == [] and report["warnings"] == []
    for split, counts in COUNTS.items():
        for folder, value in FOUR.species.items():
            labels = list((base / split / "label" / folder).glob("*.png"))
            assert len(labels) == len(list((base / split / "color" / folder).glob("*.jpg"))) == counts[folder]
            for path in labels:
                assert set(np.unique(np.asarray(Image.open(path)))) == {0, value, IGNORE}, path
        points = read_csv(base / split / "points.csv")
        assert {row["class"] for row in points if row["name"].startswith("rabbits")} == {"background", "rabbit"}
    assert not prepare(base, class_table=FOUR)[1], "the second run has nothing to do"


def test_records_split_balance_and_points_cover_three_species(records):
    for split, counts in COUNTS.items():
        found = [record.species for record in records[split]]
        assert {folder: found.count(value) for folder, value in FOUR.species.items()} == counts
        for record, points in zip(records[split], read_points(records[split])):
            assert sorted(point.on_pet for point in points) == [False, True], record.name
    train, val = split_records(records["TrainVal"], 0.3, seed=0)
    for side in (train, val):
        assert {records["TrainVal"][index].species for index in side} == set(FOUR.species.values())
    repeated = [records["TrainVal"][index].species for index in balance(records["TrainVal"], train)]
    assert repeated.count(1) == repeated.count(2) == repeated.count(3)


def test_a_changed_table_never_reads_the_masks_of_another(records):
    """Two rows change places, so the same label files hold other classes."""
    background, cat, dog = PETS.rows
    swapped = dataclasses.replace(FOUR, rows=(background, dog, cat, RABBIT))
    others = [dataclasses.replace(record, class_table=swapped) for record in records["Test"]]
    cache = Cache(records["Test"], 32)
    masks = [cache[index][1] for index in range(len(others))]
    other = Cache(others, 32)
    assert cache.path.name != other.path.name
    exchange = np.array([0, 2, 1, *range(3, 256)])
    for index, mask in enumerate(masks):
        np.testing.assert_array_equal(other[index][1], exchange[mask], others[index].name)


def test_data_prepared_with_other_classes_are_refused(base, prepared, tmp_path):
    three, four = (list(table.names) for table in (PETS, FOUR))
    for data, table, found in ((base, PETS, four), (prepared, FOUR, three)):
        message = f"was prepared with the classes {found}, not {list(table.names)}"
        with pytest.raises(InputError, match=re.escape(message) + ".*Run: python dataset/dataset_prep.py"):
            find_records(data, "Test", class_table=table)
        copy = shutil.copytree(data, tmp_path / str(len(table)), ignore=shutil.ignore_patterns("images", "cache"))
        for path in copy.glob("*/color/*.jpg"):  # without the originals it cannot be prepared again
            path.unlink()
        with pytest.raises(InputError, match=re.escape(message)):
            prepare(copy, class_table=table)


def test_data_are_prepared_again_for_another_table(tmp_path):
    base = draw_report_layout(tmp_path / "data")
    prepare(base, class_table=FOUR)
    report, fresh = prepare(base, class_table=PETS)
    rabbits = sum(counts["rabbits"] for counts in COUNTS.values())
    assert fresh and len(report["left_out"]) == rabbits
    assert all("belong to no class: 3 (" in row["reason"] for row in report["left_out"])
    assert {record.species for record in find_records(base, "Test")} == {1, 2}
    prepare(base, class_table=FOUR)
    assert len(find_records(base, "Test", class_table=FOUR)) == sum(COUNTS["Test"].values())


@pytest.fixture(scope="module")
def run_folder(base, records, tmp_path_factory) -> Path:
    """One epoch of a U-Net with four classes."""
    out, model_args = tmp_path_factory.mktemp("runs") / "unet", {"num_classes": len(FOUR), "base_channels": 2}
    train, val = split_records(records["TrainVal"], 0.3, seed=0)
    train_set, val_set = (PetDataset(records["TrainVal"], 32, indices=indices) for indices in (train, val))
    run = start_run(train_config(base, out, epochs=1), "unet")
    fit(UNet(**model_args), segmentation_step, train_set, val_set, run, model_args)
    return out


def test_training_counts_four_classes(run_folder):
    [row] = read_csv(run_folder / "log.csv")
    assert [name for name in row if name.startswith("val_iou_")] == [f"val_iou_{name}" for name in SCORES]
    assert 0 <= float(row["val_iou_rabbit"]) <= 1
    assert class_table_of(load_checkpoint(run_folder / "best.pt", "unet")) == FOUR
    assert read_json(run_folder / "config.json")["class_table"] == FOUR.as_plain_dict()
    figure = plot_curves(load_checkpoint(run_folder / "last.pt", "unet")["log"], FOUR)
    assert [line.get_label() for line in figure.axes[1].lines] == SCORES
    model, _ = load_model(run_folder, CPU)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 32, 32)


class ColorModel(nn.Module):
    """Segments by the color of the fur."""

    def __init__(self):
        super().__init__()
        self.colors = nn.Parameter(torch.tensor(FUR) / 255)

    def forward(self, image):
        return -(image[:, None] - self.colors[None, :, :, None, None]).square().sum(dim=2)


@pytest.fixture(scope="module")
def tested(base, records, run_folder, tmp_path_factory):
    """The results folder of a model that finds all four classes, tested under two perturbations."""
    config = ScoreConfig(run_folder / "best.pt", base, out=tmp_path_factory.mktemp("results"), batch_size=4, workers=0)
    chosen = choose_perturbations(["gaussian_blur", "occlusion"])
    test_set = PetDataset(records["Test"], 64, label_size="native", perturbations=chosen)
    assert test_set.class_table.names == FOUR.names
    text = score(ModelTest(ColorModel(), load_checkpoint(config.checkpoint), test_set, config, CPU))
    assert all(name in text for name in SCORES)
    return config.results


def test_scores_hold_all_classes_and_their_mean(tested):
    metrics = read_json(tested / "metrics.json")
    for kind in ("iou", "dice", "accuracy"):
        assert list(metrics[kind]) == list(metrics["baseline"][kind]) == SCORES, kind
        assert metrics[kind]["mean"] == pytest.approx(np.mean([metrics[kind][name] for name in FOUR.names])), kind
    assert min(metrics["iou"].values()) > 0.9, "the model finds every class"

    rows = read_csv(tested / "images.csv")
    assert list(rows[0])[3:] == [f"{truth}/{predicted}" for truth in FOUR.names for predicted in FOUR.names]
    for row in rows:
        assert (int(row["rabbit/rabbit"]) > 300) == row["name"].startswith("rabbits"), row["name"]


def test_robustness_holds_all_classes_and_their_mean(tested):
    summary = read_json(tested / "robustness.json")["perturbations"]
    assert all(list(entry["dice"]) == list(entry["iou"]) == SCORES for entry in summary.values())
    found = {(row["perturbation"], row["level"], row["class"]) for row in read_csv(tested / "robustness.csv")}
    assert found == set(itertools.product(summary, map(str, range(10)), SCORES))
    figure = plot_robustness(summary, FOUR)
    panels = [axis for axis in figure.axes if axis.get_visible()]
    for axis, entry in zip(panels, summary.values(), strict=True):
        for line, name in zip(axis.lines, SCORES, strict=True):
            assert line.get_ydata() == pytest.approx([np.mean(draws) for draws in entry["dice"][name]]), name
            assert (line.get_label(), line.get_color(), line.get_linestyle()) == (name, *class_styles(FOUR)[name])
    assert texts(figure.legends[0].get_texts()) == SCORES


def test_figures_of_a_test_name_all_classes(tested):
    assert {"confusion.png", "predictions.png", "robustness.png"} <= {path.name for path in tested.iterdir()}
    axis = plot_confusion(np.eye(len(FOUR)), FOUR.names).axes[0]
    assert texts(axis.get_xticklabels()) == texts(axis.get_yticklabels()) == list(FOUR.names)
    figure = plot_pictures([("", [np.zeros((4, 4, 3), np.uint8)])], ["truth"], class_table=FOUR)
    assert texts(figure.legends[0].get_texts()) == [*FOUR.names[1:], "boundary, not scored"]


def test_a_predicted_fourth_class_survives_in_mask_files(tested, records, run_folder):
    for record in records["Test"]:
        mask = FOUR.decode_label(Image.open(tested / "masks" / f"{record.name}.png"))
        label = record.load_label()
        assert set(np.unique(mask)) == {0, record.species}, record.name
        assert (mask == label)[label != IGNORE].mean() > 0.95, record.name
    rabbit = next(record for record in records["Test"] if record.species == 3)
    predictor = Predictor(ColorModel(), load_checkpoint(run_folder / "best.pt"))
    predictor.set_image(rabbit.image)
    mask, probabilities = predictor.predict()
    assert predictor.class_table == FOUR and set(np.unique(mask)) == {0, 3}
    assert probabilities.shape == (4, *mask.shape)


def test_a_checkpoint_of_other_classes_than_the_data_is_refused(base, prepared, run_folder, tmp_path):
    config = ScoreConfig(run_folder / "best.pt", prepared, out=tmp_path, workers=0)
    test_set = PetDataset(find_records(prepared, "Test"), 32)
    test = ModelTest(ColorModel(), load_checkpoint(config.checkpoint), test_set, config, CPU)
    message = r"best\.pt was trained on the classes background, cat, dog, rabbit, .* has background, cat, dog"
    with pytest.raises(InputError, match=message):
        score(test)
    assert not list(tmp_path.iterdir())


def test_exploration_lists_all_species(records):
    measured = {split: measure(split, records[split]) for split in records}
    summary = summarize(measured)
    most = max(COUNTS["TrainVal"].values())
    assert summary["images"] == {**COUNTS, "TrainVal, balanced": dict.fromkeys(FOUR.species, most)}
    assert list(summary["pixel_share"]["Test"]) == [*FOUR.names, "boundary"]
    assert all(folder in format_summary(Path("base"), summary) for folder in FOUR.species)
    figures = plot_data(measured, summary)
    species = list(FOUR.species)
    for name in ("species", "breeds"):
        assert texts(figures[name].legends[0].get_texts()) == species, name
    for name in ("sizes", "pixels"):
        assert texts(figures[name].axes[1].get_legend().get_texts()) == species, name
    assert texts(figures["pixels"].axes[0].get_legend().get_texts()) == [*FOUR.names, "boundary"]
    assert [axis.get_title() for axis in figures["places"].axes[:-1]] == species
    for bars, folder in zip(figures["species"].axes[0].containers, species, strict=True):
        assert [bar.get_height() for bar in bars] == [counts[folder] for counts in summary["images"].values()]
