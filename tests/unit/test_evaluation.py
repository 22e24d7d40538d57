"""utils/evaluation.py: scores that do not depend on how they are computed, and pictures for photographs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.timing import peak_memory
from dataset.pet import EpochBatches, PetDataset, find_records, make_loader
from tests.conftest import run
from unet.model import UNet
from utils.dataset import CLASSES
from utils.evaluation import evaluate, pick_examples, segment
from utils.metric import ConfusionMatrix

CPU = torch.device("cpu")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return UNet(base_channels=2).eval()


def scores(model, records, batch_size=5, label_size="native"):
    dataset = PetDataset(records, 32, label_size=label_size)
    return evaluate(model, make_loader(dataset, EpochBatches(len(dataset), batch_size, shuffle=False), 0), CPU)


def test_batch_size_and_file_order_do_not_change_the_scores(prepared, model):
    records = find_records(prepared, "Test")
    expected = scores(model, records).total.counts
    assert torch.equal(scores(model, records, batch_size=1).total.counts, expected)
    assert torch.equal(scores(model, records, batch_size=12).total.counts, expected)
    assert torch.equal(scores(model, records[::-1]).total.counts, expected)


def test_every_pixel_but_the_boundary_is_scored_at_its_own_size(prepared, model):
    records = find_records(prepared, "Test")
    evaluation = scores(model, records)
    expected = [int((record.load_label() != 255).sum()) for record in records]
    assert evaluation.counts.sum(dim=(1, 2)).tolist() == expected
    assert scores(model, records, label_size=20).counts.sum() <= 12 * 20 * 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured on Linux alone")
def test_memory_does_not_grow_with_the_number_of_images(prepared, model):
    records = find_records(prepared, "Test")
    few, many = (peak_memory(CPU, lambda n=n: scores(model, n * records, 4, label_size=512)) for n in (2, 22))
    assert many < few + 240 * 512 * 512 / 2**20 / 2, "MiB: half a byte for each pixel of the further images"


class Oracle(nn.Module):
    """Answers with the brightness of the image: 0, 100, 200 stand for the three classes."""

    def forward(self, image):
        value = image[:, :1] * 255
        return -torch.cat([(value - level).abs() for level in (0, 100, 200)], dim=1)


def test_a_perfect_prediction_scores_one(base):
    from dataset.dataset_prep import prepare

    prepare(base)
    records = find_records(base, "Test")[:3]
    for record in records:
        label = record.load_label()
        half = label.copy()
        half[:, :] = 0
        half[: half.shape[0] // 2] = record.species
        Image.fromarray(half).save(record.label)
        record.image.unlink()
        Image.fromarray(np.repeat(half[..., None] * 100, 3, axis=2)).save(record.image, "PNG")
    metrics = scores(Oracle(), records).metrics()
    assert metrics["iou"]["mean"] > 0.97 and metrics["pixel_accuracy"] > 0.99
    assert metrics["baseline"]["pixel_accuracy"] == pytest.approx(0.5, abs=0.01)
    assert metrics["images"] == 3 and metrics["per_image_iou"]["worst_5_percent"] > 0.95


def test_per_image_scores_leave_absent_classes_out(prepared, model):
    evaluation = scores(model, find_records(prepared, "Test"))
    for counts, iou in zip(evaluation.counts, evaluation.image_iou):
        present = [v for v in ConfusionMatrix(CLASSES, counts).iou() if v == v]
        assert iou == pytest.approx(np.mean(present))


def test_examples_are_picked_by_rule():
    values = [0.5, 0.1, 0.9, 0.3, 0.7, float("nan"), 0.2, 0.8]
    expected = [("best", 2), ("best", 7), ("median", 4), ("median", 0), ("worst", 6), ("worst", 1)]
    assert pick_examples(values) == expected
    assert pick_examples([0.4]) == [("best", 0)]


def test_segment_answers_at_the_picture_s_own_size(model):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (37, 91, 3), dtype=np.uint8))
    classes = segment(model, picture, 32, CPU)
    assert classes.shape == (37, 91) and classes.dtype == np.uint8 and classes.max() <= 2


def test_scored_by_the_script(prepared, trained, tmp_path):
    result = run(
        "unet/test.py", "--checkpoint", trained / "best.pt", "--data", prepared, "--out", tmp_path, "--workers", 1
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images"] == 12 and metrics["score_size"] == "native" and metrics["synthetic"]
    for kind in ("iou", "dice", "accuracy"):
        assert set(metrics[kind]) == {"background", "cat", "dog", "mean"}
        assert all(0 <= value <= 1 for value in metrics[kind].values())
    assert set(metrics["per_image_iou"]) == {"mean", "worst_5_percent"} and metrics["baseline"]["iou"]["cat"] == 0
    assert "synthetic" in result.stdout and str(tmp_path / "predictions.png") in result.stdout
    for picture in ("confusion.png", "predictions.png"):
        assert Image.open(tmp_path / picture).width > 400

    other = run(
        "unet/test.py", "--checkpoint", trained / "best.pt", "--data", prepared, "--out", tmp_path / "256",
        "--score-size", 256, "--batch-size", 1, "--limit", 3, "--device", "cpu",
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    metrics = json.loads((tmp_path / "256/metrics.json").read_text())
    assert metrics["score_size"] == 256 and metrics["images"] == 3 and metrics["pixels"] <= 3 * 256 * 256


def test_default_folder_is_beside_the_checkpoint(prepared, trained, tmp_path):
    run_folder = shutil.copytree(trained, tmp_path / "run")
    result = run("unet/test.py", "--checkpoint", run_folder / "last.pt", "--data", prepared)
    assert result.returncode == 0, result.stderr
    assert (run_folder / "test/metrics.json").exists()


def test_photographs_without_labels(trained, tmp_path):
    photos = tmp_path / "photos"
    (photos / "below").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photos / "a.jpg")
    Image.fromarray(pixels).convert("RGBA").save(photos / "a.png")
    Image.fromarray(pixels[..., 0]).save(photos / "below" / "grey.png")
    turned = Image.fromarray(pixels)
    turned.getexif()[0x0112] = 6  # EXIF: turn by 90 degrees to show it upright
    turned.save(photos / "turned.jpg", exif=turned.getexif())
    (photos / "notes.txt").write_text("no picture, no matter")
    result = run("unet/test.py", "--checkpoint", trained / "best.pt", "--images", photos, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    sizes = {}
    for path in (tmp_path / "out").glob("*_mask.png"):
        mask = Image.open(path)
        overlaid = Image.open(path.with_name(path.name.replace("_mask.png", "_overlay.jpg")))
        assert mask.mode == "P" and mask.size == overlaid.size and np.asarray(mask).max() <= 2
        sizes[path.name] = mask.size
    assert sizes == {
        "a_mask.png": (90, 60), "a-2_mask.png": (90, 60), "grey_mask.png": (90, 60), "turned_mask.png": (60, 90)
    }  # fmt: skip

    (photos / "folder.jpg").mkdir()
    shutil.copytree(tmp_path / "out", photos / "masks")
    again = run("unet/test.py", "--checkpoint", trained / "best.pt", "--images", photos, "--out", photos / "masks")
    assert again.returncode == 0 and "4 pictures segmented" in again.stdout, "its own output is not segmented"
    result = run("unet/test.py", "--checkpoint", trained / "best.pt", "--images", photos, "--out", photos)
    assert result.returncode == 1 and "choose another --out" in result.stderr
    shutil.rmtree(photos / "masks")

    (photos / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    result = run("unet/test.py", "--checkpoint", trained / "best.pt", "--images", photos, "--out", tmp_path / "again")
    assert result.returncode == 1 and "broken.jpg" in result.stderr and "4 pictures segmented" in result.stdout
    result = run("unet/test.py", "--checkpoint", trained / "best.pt", "--images", tmp_path / "nowhere")
    assert result.returncode == 1 and "does not exist" in result.stderr
