"""utils/robustness.py: the variants of a test set with perturbations, the summary of their scores, and its figure."""

import json

import numpy as np
import pytest
import torch

from dataset.perturbation import PERTURBATIONS, Perturbation, choose_perturbations
from dataset.pet import PetDataset, Record
from dataset.pet_heatmap import click_target, read_points
from point_clip.model import PointClip
from point_clip.scoring import predict_clicks
from point_clip.test import Config
from tests.helpers import CPU, tiny_clip_encoder
from unet.model import UNet
from utils.dataset import CLICKS, PETS
from utils.evaluation import ModelTest, evaluate, predict_classes
from utils.figures import class_styles
from utils.files import read_csv, read_json
from utils.image import rescale_point
from utils.metric import ConfusionMatrix, count_confusion
from utils.predictor import resize_logits
from utils.robustness import (
    Variant,
    format_robustness,
    list_variants,
    plot_robustness,
    select_levels,
    summarize_levels,
    summarize_robustness,
    write_robustness,
)


def make_test_set(records: list[Record], *names: str) -> PetDataset:
    return PetDataset(records, 32, label_size="native", perturbations=[PERTURBATIONS[name] for name in names])


def test_variants_are_the_clean_image_and_every_level_and_draw():
    variants = list_variants(choose_perturbations([]))
    assert variants[0] == Variant() and len(set(variants)) == len(variants)
    assert len(variants) == 1 + sum(one.draws * (len(one.amounts) - 1) for one in PERTURBATIONS.values())
    assert list_variants(choose_perturbations(None)) == [Variant()]


@pytest.mark.parametrize("name", ["gaussian_noise", "brightness_decrease"])
def test_level_zero_is_the_clean_score_and_batch_size_changes_nothing(records, model, name):
    test_set = make_test_set(records, name)
    clean = evaluate(predict_classes(model), make_test_set(records), CPU).total.counts
    one, two = (evaluate(predict_classes(model), test_set, CPU, batch_size=size) for size in (5, 12))
    assert torch.equal(one.counts, two.counts)
    levels = select_levels(one.counts.sum(dim=0), one.variants, PERTURBATIONS[name])
    assert [len(draws) for draws in levels] == [PERTURBATIONS[name].draws] * len(PERTURBATIONS[name].amounts)
    assert all(torch.equal(counts, clean) for counts in levels[0])
    assert all(counts.sum() == clean.sum() for draws in levels for counts in draws), "every level scores all pixels"
    assert len({counts.numpy().tobytes() for counts in levels[-1]}) == PERTURBATIONS[name].draws, "draws differ"


def test_all_models_see_the_same_perturbed_images(records, model):
    test_set = make_test_set(records[:3], "salt_and_pepper", "gaussian_blur")
    seen = [], []
    for images, one in zip(seen, (model, UNet(num_classes=3, base_channels=4).eval())):
        one.register_forward_pre_hook(lambda _, inputs, images=images: images.append(inputs[0].clone()))
        evaluate(predict_classes(one), test_set, CPU)
    assert len(seen[0]) == len(list_variants(test_set.perturbations))
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))
    assert len({image.numpy().tobytes() for image in seen[0]}) == len(seen[0]), "no two variants are equal"


def test_fixed_clicks_are_scored_in_every_variant(records):
    """Level 0 has the scores of the fixed clicks, one image at a time; photographs without a click are skipped."""
    torch.manual_seed(0)
    encoder, _ = tiny_clip_encoder()
    model = PointClip(encoder, encoding="disk", base_channels=2).eval()
    image, decode = torch.rand(1, 3, 32, 32), model.decode
    with torch.inference_mode():
        median = decode(model.encode(image), torch.tensor([[16.0, 16.0]]), (32, 32)).median()
    model.decode = lambda *arguments: decode(*arguments) - median  # an untrained model that predicts both classes
    fixed = dict(zip((record.name for record in records), read_points(records)))
    for record in records[:7]:
        fixed[record.name] = []
    test_set = make_test_set(records, "brightness_increase")
    test = ModelTest(model, {"config": {"image_size": 32}}, test_set, Config(), CPU)
    found = evaluate(predict_clicks(test, fixed, {}), test_set, CPU, batch_size=5, class_table=CLICKS)

    expected = torch.zeros(2, 2, dtype=torch.int64)
    with torch.inference_mode():
        for item, record in list(zip(test_set, records))[7:]:
            features = model.encode(item["image"][None] / 255)
            label = torch.from_numpy(item["label"])
            for click in fixed[record.name]:
                point = rescale_point(click.x, click.y, label.shape[::-1], (32, 32))
                logits = resize_logits(model.decode(features, torch.tensor([point]), (32, 32)), label.shape)
                target = click_target(label[None], torch.tensor([click.on_pet]))
                expected += count_confusion((logits[:, 0] > 0).long(), target, 2)
    total = found.counts.sum(dim=0)
    assert (total[0].sum(dim=1) == expected.sum(dim=1)).all() and expected.sum() > 0
    assert (total[0] - expected).abs().sum() < 1e-4 * expected.sum(), "sums of a batch are rounded differently"
    assert (total.sum(dim=2) == expected.sum(dim=1)).all(), "the same targets in each variant"
    assert (total[0] > 0).all() and not torch.equal(total[-1], total[0])


def test_summary_of_levels_by_hand():
    mean = [[0.8], [0.6, 0.8, 0.7], [0.4]]
    scores = {"dice": {"cat": mean, "background": mean, "dog": [[None], [0.1, None, None], [None]]}}
    summary = summarize_levels(scores, ["background", "cat"])  # no dog in the truth: a predicted one does not count
    assert summary["retained_last"] == pytest.approx(0.5)
    assert summary["retained_mean"] == pytest.approx((0.7 + 0.4) / 2 / 0.8)
    assert summary["area"] == pytest.approx((0.75 + 0.55) / 2)


WAYS = (  # `perturbed` counts: two draws at each of three levels for the first
    Perturbation("first", "unit", (0, 1, 2), None, sample=True),
    Perturbation("second", "factor", (1, 3, 9), None),
)


@pytest.fixture
def summary(monkeypatch) -> dict:
    """Half of each class is right in the clean images, less at each level; there is no dog in the truth."""
    monkeypatch.setattr(Perturbation, "draws", property(lambda self: 2 if self.sample else 1))
    variants = list_variants(WAYS)
    counts = [table(50 - 10 * one.level - 2 * one.draw - 5 * (one.perturbation is WAYS[1])) for one in variants]
    return summarize_robustness(torch.stack(counts), variants, PETS)


def table(right: int) -> torch.Tensor:
    return torch.tensor([[right, 100 - right, 0], [100 - right, right, 0], [0, 0, 0]])


def dice(right: int) -> float:
    return ConfusionMatrix(PETS.names, table(right)).scores()["dice"]["cat"]


def test_summary_holds_scores_by_level_and_draw(summary):
    first, second = (summary["perturbations"][way.name] for way in WAYS)
    assert first["dice"]["cat"] == [[dice(50)] * 2, [dice(40), dice(38)], [dice(30), dice(28)]]
    assert second["dice"]["cat"] == [[dice(50)], [dice(35)], [dice(25)]] and second["amounts"] == [1, 3, 9]
    assert first["dice"]["dog"] == [[None] * 2] * 3, "no dog in the truth or the prediction"
    assert first["retained_last"] == pytest.approx((dice(30) + dice(28)) / 2 / dice(50))
    for key in ("retained_last", "retained_mean", "area"):
        assert summary[key] == pytest.approx((first[key] + second[key]) / 2)


def test_files_hold_the_summary(summary, tmp_path):
    text = write_robustness(tmp_path, summary, PETS, "title")
    assert format_robustness(summary) in text and str(tmp_path / "robustness.csv") in text
    assert read_json(tmp_path / "robustness.json") == json.loads(json.dumps(summary))
    rows = read_csv(tmp_path / "robustness.csv")
    assert len(rows) == sum(len(way.amounts) * way.draws for way in WAYS) * (len(PETS) + 1)
    for row in rows:
        entry = summary["perturbations"][row["perturbation"]]
        assert float(row["amount"]) == entry["amounts"][int(row["level"])]
        for kind in ("dice", "iou"):
            value = entry[kind][row["class"]][int(row["level"])][int(row["draw"])]
            assert row[kind] == ("" if value is None else f"{value:.6f}")
    assert (tmp_path / "robustness.png").is_file()


def test_text_lists_the_most_harmful_perturbation_first(summary):
    lines = format_robustness(summary).splitlines()
    assert [line.split()[0] for line in lines] == ["retained", "second", "first", "mean"]
    second = summary["perturbations"]["second"]
    assert lines[1].split()[1:] == [f"{100 * second[key]:.1f}" for key in ("retained_last", "retained_mean", "area")]


def test_figure_shows_mean_and_range_of_the_draws(summary):
    figure = plot_robustness(summary["perturbations"], PETS, "title")
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in panels] == [way.name for way in WAYS]
    assert [axis.get_xlabel() for axis in panels] == [way.unit for way in WAYS]
    assert figure.get_suptitle() == "title"
    styles = class_styles(PETS)
    for axis, entry in zip(panels, summary["perturbations"].values()):
        lines = {line.get_label(): line for line in axis.get_lines()}
        assert list(lines) == [*PETS.names, "mean"]
        np.testing.assert_allclose(lines["cat"].get_ydata(), [np.mean(draws) for draws in entry["dice"]["cat"]])
        assert np.isnan(lines["dog"].get_ydata().astype(float)).all()
        assert all((line.get_color(), line.get_linestyle()) == styles[name] for name, line in lines.items())
    band = panels[0].collections[1].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(dice(28)) and band.max() == pytest.approx(dice(50))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*PETS.names, "mean"]
