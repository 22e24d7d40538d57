"""utils/robustness.py: the sweep, by test.py of every model, and its summary."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from clip_seg.model import ClipEncoder
from dataset.perturbation import PERTURBATIONS, choose, make_damage
from dataset.pet import find_records, make_test_loader
from dataset.pet_heatmap import picture_size, read_points
from point_clip.model import PointClip
from point_clip.scoring import answer_clicks, predict_clicks
from tests.conftest import TINY_CLIP, run
from unet.model import UNet
from unet.test import Config
from utils.dataset import IGNORE
from utils.evaluation import answer_classes, evaluate
from utils.metric import count_confusion
from utils.robustness import Damage, passes, summarize, sweep

CPU = torch.device("cpu")


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    return UNet(base_channels=2).eval()


def counts(model, prepared, perturb, **options) -> dict[str, torch.Tensor]:
    config = Config(data=prepared, workers=0, perturb=perturb, **options)
    return sweep(answer_classes(model), make_damage(config, 32), CPU, 3)


def test_level_zero_is_the_clean_score_and_the_batch_size_changes_nothing(prepared, model):
    clean = evaluate(model, make_test_loader(Config(data=prepared, workers=0, batch_size=5), 32), CPU).total.counts
    names = ["gaussian_noise", "brightness_decrease"]
    one, two = (counts(model, prepared, names, batch_size=size) for size in (5, 12))
    for name, draws in (("gaussian_noise", 3), ("brightness_decrease", 1)):
        assert one[name].shape == (10, draws, 3, 3) and torch.equal(one[name], two[name])
        assert (one[name][0] == clean).all(), "bit for bit"
        assert (one[name].sum(dim=(2, 3)) == clean.sum()).all(), "every level scores the same pixels"
    assert not torch.equal(one["gaussian_noise"][9, 0], one["gaussian_noise"][9, 1]), "draws differ"


def test_each_image_is_loaded_once_and_two_models_see_the_same(prepared, model):
    torch.manual_seed(1)
    models = iter((model, UNet(base_channels=4).eval()))
    config = Config(data=prepared, workers=0, perturb=["occlusion", "salt_and_pepper", "gaussian_blur"])
    damage = make_damage(config, 32)
    loads, seen = [], []

    class Counting:
        dataset = damage.loader.dataset

        def __iter__(self):
            for batch in damage.loader:
                loads.append(len(batch["name"]))
                yield batch

    for other in models:
        seen.append([])

        def spy(batch, other=other):
            seen[-1].append(batch["image"].clone())
            return answer_classes(other)(batch)

        sweep(spy, Damage(damage.perturbations, Counting()), CPU, 3)
    assert sum(loads) == 2 * 12
    assert len(seen[0]) == passes(damage.perturbations) == 1 + 9 + 2 * 27
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def test_clicks_are_swept_like_everything_else(prepared):
    """Level 0 are the scores of the fixed clicks; a photograph without a click is passed over."""
    torch.manual_seed(0)
    model = PointClip(ClipEncoder(CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP))), encoding="disk", base_channels=2)
    records = find_records(prepared, "Test")
    prompts = {
        record.name: (picture_size(record.image), clicks) for record, clicks in zip(records, read_points(records))
    }
    for record in records[:7]:
        prompts[record.name] = (prompts[record.name][0], [])
    config = Config(data=prepared, workers=0, batch_size=5, perturb=["brightness_increase"])
    answer = answer_clicks(model.eval(), prompts, 32)
    table = sweep(answer, make_damage(config, 32), CPU, 2)["brightness_increase"]
    assert table.shape == (10, 1, 2, 2)

    expected = torch.zeros(2, 2, dtype=torch.int64)
    with torch.inference_mode():
        for item, record in list(zip(make_test_loader(config, 32).dataset, records))[7:]:
            features = model.encode(item["image"][None] / 255)
            for click in prompts[record.name][1]:
                (mask,) = predict_clicks(model, features, [click], item["label"].shape, 32)
                on_pet = torch.from_numpy(item["label"] > 0)
                target = torch.where(torch.from_numpy(item["label"]) == IGNORE, IGNORE, (on_pet == click.on_pet).int())
                expected += count_confusion(mask, target, 2)
    assert (table[0, 0].sum(dim=1) == expected.sum(dim=1)).all() and expected.sum() > 0
    assert (table[0, 0] - expected).abs().sum() < 1e-4 * expected.sum(), "a batch rounds otherwise than one image"


def test_perturbing_needs_labels(trained, prepared):
    picture = find_records(prepared, "Test")[0].image
    result = run("unet/test.py", "--checkpoint", trained / "best.pt", "--images", picture, "--perturb")
    assert result.returncode == 1 and "--perturb scores a split" in result.stderr


def test_the_summary_by_hand():
    mean = [[0.8], [0.6, 0.8, 0.7], [0.4]]
    dice = {"cat": mean, "background": mean, "dog": [[None], [0.1, None, None], [None]]}
    left = summarize({"dice": dice}, ["background", "cat"])  # no dog in the truth: what is taken for one is no mean
    assert left["retained_last"] == pytest.approx(0.5)
    assert left["retained_mean"] == pytest.approx((0.7 + 0.4) / 2 / 0.8)
    assert left["area"] == pytest.approx((0.75 + 0.55) / 2)


def test_the_script_writes_what_it_says(trained, prepared, tmp_path):
    flags = ["--checkpoint", trained / "best.pt", "--data", prepared, "--workers", 0, "--device", "cpu"]
    result = run("unet/test.py", *flags, "--out", tmp_path, "--perturb", "occlusion", "contrast_decrease")
    assert result.returncode == 0, result.stderr
    assert "mean Dice that is left, %" in result.stdout and str(tmp_path / "robustness.csv") in result.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    summary = json.loads((tmp_path / "robustness.json").read_text())
    assert list(summary["perturbations"]) == ["contrast_decrease", "occlusion"] and summary["images"] == 12
    for entry in summary["perturbations"].values():
        for kind in ("dice", "iou"):
            assert all(value == metrics[kind][label] for label in metrics[kind] for value in entry[kind][label][0])
    with (tmp_path / "robustness.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * (10 + 3 * 10)
    assert {row["amount"] for row in rows if row["perturbation"] == "occlusion"} == set(map(str, range(0, 50, 5)))
    assert (tmp_path / "robustness.png").stat().st_size > 10_000

    result = run("unet/test.py", *flags, "--out", tmp_path / "fog", "--perturb", "fog")
    assert result.returncode == 1 and "--perturb fog: no such perturbation" in result.stderr
    assert not (tmp_path / "fog").exists(), "said before anything is scored"


def test_without_names_it_is_all_of_them():
    assert passes(choose([])) == 127
    assert [way.name for way in choose([])] == list(PERTURBATIONS)
