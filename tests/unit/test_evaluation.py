"""utils/evaluation.py: scores that do not depend on how they are computed, and the files that show them."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dataset.perturbation import PERTURBATIONS
from dataset.pet import PetDataset, find_records, make_test_set
from tests.helpers import CPU, UNET_ARGS, peak_memory, save_model
from unet.model import UNet
from unet.test import Config
from utils.dataset import CLICKS, IGNORE, PETS
from utils.evaluation import (
    Evaluation,
    ImagePrediction,
    ModelTest,
    evaluate,
    pick_examples,
    plot_confusion,
    predict_classes,
    run_test,
    score,
)
from utils.files import InputError, read_csv, read_json, write_json
from utils.helper import load_checkpoint
from utils.image import picture_size
from utils.metric import ConfusionMatrix
from utils.predictor import predict_photographs, save_mask
from utils.robustness import Variant


def evaluate_model(model, records, batch_size=5, label_size="native", **options):
    test_set = PetDataset(records, 32, label_size=label_size, **options)
    return evaluate(predict_classes(model), test_set, CPU, batch_size=batch_size)


def test_scores_are_independent_of_batch_size_and_file_order(records, model):
    expected = evaluate_model(model, records)
    for other in (evaluate_model(model, records, 1), evaluate_model(model, records, 12)):
        assert torch.equal(other.counts, expected.counts) and other.labels == expected.labels
    reversed_order = evaluate_model(model, records[::-1])
    assert torch.equal(reversed_order.counts.flip(0), expected.counts)
    assert torch.equal(reversed_order.total.counts, expected.total.counts)


def test_every_pixel_but_the_boundary_is_scored_at_the_size_of_the_label(records, model):
    native = evaluate_model(model, records)
    assert native.counts.sum(dim=(1, 2, 3)).tolist() == [int((r.load_label() != IGNORE).sum()) for r in records]
    small = evaluate_model(model, records, label_size=20)
    assert 0 < small.counts.sum() <= len(records) * 20 * 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured on Linux only")
def test_memory_does_not_grow_with_the_number_of_images(records, model):
    few, many = (peak_memory(CPU, lambda n=n: evaluate_model(model, n * records, 4, label_size=512)) for n in (2, 22))
    assert many < few + 240 * 512 * 512 / 2**20 / 2, "MiB: half a byte for each pixel of the further images"


class BrightnessModel(nn.Module):
    """The class is the brightness of the pixel: 0, 100 and 200 are the three classes."""

    def forward(self, image):
        value = image[:, :1] * 255
        return -torch.cat([(value - level).abs() for level in (0, 100, 200)], dim=1)


def test_perfect_prediction_scores_one(records, tmp_path):
    half_pets = []
    for record in records[:3]:
        label = np.zeros(record.load_label().shape, np.uint8)
        label[: len(label) // 2] = record.species
        image, mask = (tmp_path / f"{record.name}_{kind}.png" for kind in ("image", "label"))
        half_pets.append(dataclasses.replace(record, image=image, label=mask))
        Image.fromarray(np.repeat(label[..., None] * 100, 3, axis=2)).save(image)
        save_mask(mask, label, PETS)
    metrics = evaluate_model(BrightnessModel(), half_pets).metrics()
    assert metrics["images"] == 3
    assert metrics["iou"]["mean"] > 0.97 and metrics["pixel_accuracy"] > 0.99
    assert metrics["per_image_iou"]["worst_5_percent"] > 0.95
    assert metrics["baseline"]["name"] == "all background"
    assert metrics["baseline"]["pixel_accuracy"] == pytest.approx(0.5, abs=0.01)


def test_score_of_an_image_leaves_absent_classes_out(records):
    """All is predicted as background: an image of a cat has no IoU of dogs, and the other way round."""

    def predict(batch):
        for label in batch["label"]:
            yield ImagePrediction(torch.zeros_like(label)[None], label[None])

    evaluation = evaluate(predict, PetDataset(records, 32, label_size="native"), CPU)
    for record, iou in zip(records, evaluation.image_iou):
        label = record.load_label()
        background = (label == 0).sum() / (label != IGNORE).sum()
        assert iou == pytest.approx(background / 2), "the mean of background and one species, whose IoU is 0"


def test_worst_images_are_the_lowest_twentieth():
    """Of each image another number of 100 background pixels is correct, the others are taken for a cat."""
    correct = torch.randperm(40, generator=torch.Generator().manual_seed(0)) + 1
    counts = torch.zeros(40, 1, len(PETS), len(PETS), dtype=torch.int64)
    counts[:, 0, 0, 0], counts[:, 0, 0, 1] = correct, 100 - correct
    metrics = Evaluation(
        counts, torch.zeros(40, 3, 2, dtype=torch.int64), [Variant()], PETS, 1.0, [""] * 40, [0] * 40
    ).metrics()
    mean_iou = [number / 100 / 2 for number in range(1, 41)]  # of background and cat
    assert metrics["per_image_iou"]["mean"] == pytest.approx(np.mean(mean_iou))
    assert metrics["per_image_iou"]["worst_5_percent"] == pytest.approx(np.mean(mean_iou[:2]))


def test_clean_image_is_variant_0_of_a_test_set_with_perturbations(records, model):
    chosen = [PERTURBATIONS["occlusion"], PERTURBATIONS["brightness_decrease"]]
    clean, perturbed = evaluate_model(model, records), evaluate_model(model, records, perturbations=chosen)
    assert torch.equal(perturbed.counts[:, :1], clean.counts) and clean.counts.shape[1] == 1
    assert perturbed.metrics() == clean.metrics() and perturbed.images_csv() == clean.images_csv()
    assert (perturbed.counts.sum(dim=(2, 3)) == clean.counts.sum(dim=(2, 3))).all(), "the same pixels in each variant"


def test_each_image_is_loaded_once(records, model, monkeypatch):
    loaded, load = [], PetDataset.__getitem__
    monkeypatch.setattr(PetDataset, "__getitem__", lambda self, key: loaded.append(load(self, key)) or loaded[-1])
    evaluate_model(model, records, perturbations=[PERTURBATIONS["gaussian_blur"]])
    assert sorted(item["name"] for item in loaded) == [record.name for record in records]


def test_predictions_of_clean_images_are_saved_under_their_suffixes(records, tmp_path):
    """Two predictions of each image: right and everywhere background."""

    def predict(batch):
        for label in batch["label"]:
            target = (label != 0).to(torch.uint8)
            masks = torch.stack([target, torch.zeros_like(target)]) * int(batch["perturbation"] is None)
            yield ImagePrediction(masks, torch.stack([target, target]), ["", "_other"])

    test_set = PetDataset(records, 32, label_size="native", perturbations=[PERTURBATIONS["gaussian_blur"]])
    found = evaluate(predict, test_set, CPU, class_table=CLICKS, masks=tmp_path)
    for record, counts in zip(records, found.counts):
        target = record.load_label() != 0
        assert counts[0].tolist() == [[2 * (~target).sum(), 0], [target.sum(), target.sum()]]
        for suffix, mask in (("", target), ("_other", np.zeros_like(target))):
            picture = Image.open(tmp_path / f"{record.name}{suffix}.png")
            assert picture.mode == "P"
            np.testing.assert_array_equal(CLICKS.decode_label(picture), mask)


def test_examples_are_the_best_median_and_worst():
    values = [0.5, 0.1, 0.9, 0.3, 0.7, float("nan"), 0.2, 0.8]
    expected = [("best", 2), ("best", 7), ("median", 4), ("median", 0), ("worst", 6), ("worst", 1)]
    assert pick_examples(values) == expected
    assert pick_examples([0.4]) == [("best", 0)]


def test_confusion_figure_shows_shares_of_the_true_class():
    figure = plot_confusion(np.array([[6_000_000, 2_000_000], [0, 0]]), ("ground", "object"), "title")
    axis = figure.axes[0]
    np.testing.assert_array_equal(axis.images[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert [text.get_text() for text in axis.texts][:2] == ["75.0%\n6.00 M px", "25.0%\n2.00 M px"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["ground", "object"]
    assert axis.get_ylabel() == "true class" and figure.get_suptitle() == "title"


def model_test(model, prepared, out, **settings):
    checkpoint = save_model(out / "best.pt", model, "unet", UNET_ARGS)
    config = Config(checkpoint=checkpoint, data=prepared, workers=0, device="cpu", **settings)
    return ModelTest(model, load_checkpoint(checkpoint), make_test_set(config, 32), config, CPU)


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test saves, by file name."""
    saved = {}
    monkeypatch.setattr("utils.evaluation.save_figure", lambda figure, path: saved.update({path.name: figure}))
    return saved


@pytest.mark.parametrize("score_size", ["native", 40])
def test_example_figure_shows_the_masks_of_the_files(prepared, model, tmp_path, monkeypatch, figures, score_size):
    """Every mask is overwritten between the evaluation and the figure."""
    dog = PETS.value("dog")

    def tampered(*arguments, masks, **options):
        result = evaluate(*arguments, masks=masks, **options)
        for path in masks.iterdir():
            save_mask(path, np.full(picture_size(path)[::-1], dog, np.uint8), PETS)
        return result

    monkeypatch.setattr("utils.evaluation.evaluate", tampered)
    test = model_test(model, prepared, tmp_path, score_size=score_size)
    score(test)
    figure = figures["predictions.png"]
    assert figure.get_suptitle() == test.note != ""
    labels = {record.name: record.load_label() for record in find_records(prepared, "Test")}
    rows = np.reshape(figure.axes, (-1, 3))
    assert [axis.get_title() for axis in rows[0]] == ["photograph", "truth", "prediction"]
    assert [row[0].get_ylabel().split(":")[0] for row in rows] == 2 * ["best"] + 2 * ["median"] + 2 * ["worst"]
    for row in rows:
        label = labels[row[0].get_ylabel().split(": ")[1].split("\n")[0]]
        photo, truth, prediction = (np.asarray(axis.images[0].get_array()) for axis in row)
        if score_size == "native":
            np.testing.assert_array_equal(truth, PETS.overlay(photo, label))
        assert photo.shape[:2] == (label.shape if score_size == "native" else (40, 40))
        np.testing.assert_array_equal(prediction, PETS.overlay(photo, np.full(photo.shape[:2], dog, np.uint8)))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [*PETS.names[1:], "boundary, not scored"]


def test_files_of_a_test(prepared, model, tmp_path, figures):
    """In a folder that holds the files of an earlier test, under perturbations."""
    results = tmp_path / "test"
    results.mkdir()
    for suffix in ("json", "csv", "png"):
        (results / f"robustness.{suffix}").write_text("old")
    write_json(results / "metrics.json", {"iou": {}, "config": {}})
    text = score(model_test(model, prepared, tmp_path))
    assert not list(results.glob("robustness.*"))
    metrics = read_json(results / "metrics.json")
    assert metrics["config"]["data"] == str(prepared)
    assert metrics["parameters"] == metrics["trained_parameters"] == sum(p.numel() for p in model.parameters())
    assert f"{100 * metrics['iou']['mean']:.1f}" in text and str(results / "metrics.json") in text
    assert set(figures) == {"confusion.png", "predictions.png"}
    pairs = [f"{truth}/{prediction}" for truth in PETS.names for prediction in PETS.names]
    for row in read_csv(results / "images.csv"):
        counts = torch.tensor([int(row[pair]) for pair in pairs]).view(len(PETS), len(PETS))
        present = [value for value in ConfusionMatrix(PETS.names, counts).iou() if value == value]
        assert float(row["iou"]) == pytest.approx(np.mean(present), abs=1e-4)


def test_unknown_perturbation_is_refused_before_the_work(prepared, model, tmp_path):
    checkpoint = save_model(tmp_path / "best.pt", model, "unet", UNET_ARGS)
    config = Config(checkpoint=checkpoint, data=prepared, perturb=["fog"], device="cpu")
    with pytest.raises(InputError, match="--perturb fog: no such perturbation, there are gaussian_noise,"):
        run_test(config, UNet, "unet", make_test_set)
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_photographs_cannot_be_perturbed():
    with pytest.raises(InputError, match="--perturb is for scoring a split"):
        Config(images=[Path("cat.jpg")], perturb=[])


@pytest.mark.parametrize(
    ("prompted", "point", "message"),
    [(True, None, "give one as --point X,Y"), (False, (1, 2), "--point: this model is not prompted")],
)
def test_only_prompted_models_take_a_click(tmp_path, prompted, point, message):
    with pytest.raises(InputError, match=message):
        predict_photographs(SimpleNamespace(prompted=prompted), [tmp_path], tmp_path / "masks", point)
