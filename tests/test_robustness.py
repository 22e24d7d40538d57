"""utils/robustness.py: the sweep, by test.py of every model, and its summary."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from dataset.perturbation import PERTURBATIONS, choose, make_damage
from dataset.pet import make_test_loader
from tests.conftest import run
from unet.model import UNet
from unet.test import Config
from utils.evaluation import answer_classes, evaluate
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
    config = Config(data=prepared, workers=0, perturb=["occlusion", "salt_and_pepper", "gaussian_blur"])
    damage = make_damage(config, 32)
    loads, seen = [], []

    class Counting:
        dataset = damage.loader.dataset

        def __iter__(self):
            for batch in damage.loader:
                loads.append(len(batch["name"]))
                yield batch

    def spy(batch):
        seen[-1].append(batch["image"].clone())
        return answer_classes(model)(batch)

    for _ in range(2):
        seen.append([])
        sweep(spy, Damage(damage.perturbations, Counting()), CPU, 3)
    assert sum(loads) == 2 * 12
    assert len(seen[0]) == passes(damage.perturbations) == 1 + 9 + 2 * 27
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))


def test_the_summary_by_hand():
    mean = [[0.8], [0.6, 0.8, 0.7], [0.4]]
    left = summarize({"dice": {"mean": mean}})
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
