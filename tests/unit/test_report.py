"""study/report.py, runs.py, comparison.py: the tables against the runs, what is refused, the paired comparison."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from study.compare import compare, format_comparison, resampled_iou
from study.report import draw, format_report, format_scores, pick_rows
from study.runs import mark_differences, read_runs
from tests.conftest import run
from utils import plot
from utils.dataset import overlay
from utils.files import InputError
from utils.metric import ConfusionMatrix

FIGURES = ("classes", "curves", "robustness", "predictions")


@pytest.fixture(scope="module")
def tested(trained: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was scored clean and under one perturbation."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("tested") / "unet"))
    result = run("unet/test.py", "--checkpoint", folder / "best.pt", "--data", prepared, "--perturb", "occlusion",
                 "--workers", 0, "--device", "cpu")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def runs(tested: Path, tmp_path: Path) -> list[Path]:
    """Two copies of it to spoil; every prediction of the second is right."""
    one, two = (Path(shutil.copytree(tested, tmp_path / name / "unet")) for name in ("one", "two"))
    with (two / "test/images.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    for row in rows:
        counts = np.array(row[3:], int).reshape(3, 3)
        row[3:] = np.diag(counts.sum(axis=1)).ravel().tolist()
    with (two / "test/images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return [one, two]


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_tables_hold_what_the_runs_say(runs, tested, prepared, tmp_path):
    out = tmp_path / "report"
    result = run("study/report.py", *runs, "--out", out)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tested / "test/metrics.json").read_text())
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["one/unet", "two/unet"]
    for kind in ("iou", "dice", "accuracy"):
        assert float(rows[0][kind]) == pytest.approx(100 * metrics[kind]["mean"], abs=0.006)
    assert [float(rows[0][f"report_{kind}"]) for kind in ("iou", "dice", "accuracy")] == [36, 45, 82]
    assert float(rows[0]["iou_dog"]) == pytest.approx(100 * metrics["iou"]["dog"], abs=0.006)
    assert int(rows[0]["parameters"]) == metrics["parameters"] > 0
    assert rows[0]["epochs"] == "2" and rows[0]["seed"] == "0" and rows[0]["images"] == "12"
    assert int(rows[0]["epoch"]) == metrics["epoch"]
    left = json.loads((tested / "test/robustness.json").read_text())["perturbations"]["occlusion"]["retained_last"]
    report = (out / "report.md").read_text()
    assert f"| one/unet | {100 * left:.1f} | {100 * left:.1f} |" in report
    assert f"| one/unet | {100 * metrics['iou']['mean']:.1f} |" in report and "Synthetic drawings" in report
    for name in FIGURES:
        assert Image.open(out / f"{name}.png").width > 400
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF") and f"]({name}.png)" in report


def prompt(folder: Path) -> None:
    """Make a run that of a model prompted by clicks, all of whose predictions are right."""
    two = {"ground": 0.5, "object": 1.0, "mean": 0.75}
    edit_json(folder / "test/metrics.json", model="point_clip", iou=two, dice=two, accuracy=two)
    edit_json(folder / "config.json", point_encoding="disk")
    with (folder / "test/images.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    with (folder / "test/images.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head[:7], *([*row[:3], 10, 0, 0, 20] for row in rows)])
    for path in (folder / "test/masks").iterdir():
        mask = Image.open(path)
        Image.fromarray(np.ones(mask.size[::-1], np.uint8)).save(path)


def test_a_prompted_run_has_tables_of_its_own(runs, prepared, tmp_path, monkeypatch):
    prompt(runs[1])
    shown = []
    monkeypatch.setattr(plot, "plot_comparison", lambda path, rows, headings, title: shown.append((rows, headings)))
    one, two = read_runs(runs)
    figures = draw(tmp_path / "report", [one, two], pick_rows([one, two], prepared))
    assert list(figures) == ["classes", "classes-prompted", "curves", "robustness", "predictions"]
    ((rows, headings),) = shown
    assert headings == ["photograph", "truth", "one/unet", "two/unet\n(a click)"]
    for caption, (photo, *_, clicked) in rows:
        species = 1 if "Synthetic_cat" in caption else 2
        assert np.array_equal(clicked, overlay(photo, np.full(photo.shape[:2], species, np.uint8))), "in its color"
    tables = format_scores([one, two])
    assert "Table 1. Segmentation" in tables and "Table 2. Prompted by a click" in tables
    assert "| 36 | 45 | 82 |" in tables and "| 37 |" not in tables, "the report's model had no disk"
    for sides in (([one], [two]), ([one, two], [one])):
        with pytest.raises(InputError, match="have different classes"):
            compare(*sides)
    two.counts, two.metrics["model"] = one.counts, "autoencoder"
    with pytest.raises(InputError, match=r"each side is to be one model over seeds, got .*two/unet \(autoencoder\)"):
        compare([one, two], [one])


def test_the_mean_is_over_the_perturbations_that_all_have(runs):
    path = runs[1] / "test/robustness.json"
    swept = json.loads(path.read_text())["perturbations"]
    edit_json(path, perturbations=swept | {"fog": swept["occlusion"] | {"retained_last": 0.01}})
    report = format_report(read_runs(runs), {})
    left = 100 * swept["occlusion"]["retained_last"]
    assert "| run | occlusion | fog | mean of occlusion |" in report and f"| {left:.1f} | 1.0 | {left:.1f} |" in report


def test_a_sweep_at_another_size_does_not_compare(runs):
    edit_json(runs[1] / "test/metrics.json", image_size=64)
    with pytest.raises(InputError, match="two/unet: perturbed at 64 pixels, one/unet at 32"):
        mark_differences(read_runs(runs), allowed=False)


def test_rows_are_chosen_by_rule(tested, prepared):
    (only,) = read_runs([tested])
    rows = pick_rows([only], prepared)
    ranked = sorted(zip(only.image_iou, only.images), reverse=True)
    assert [record.name for _, record in rows[:2]] == [name for _, name in ranked[:2]]
    assert [record.name for _, record in rows[-2:]] == [name for _, name in ranked[-2:]]
    assert [caption.split(":")[0] for caption, _ in rows] == ["best", "best", "median", "median", "worst", "worst"]


def test_what_does_not_compare_is_refused_or_marked(runs, tmp_path):
    edit_json(runs[1] / "test/metrics.json", score_size=256)
    result = run("study/report.py", *runs, "--out", tmp_path / "report")
    assert result.returncode == 1 and "two/unet: scored at size 256, one/unet at native" in result.stderr
    assert "--mixed" in result.stderr and not (tmp_path / "report").exists()
    result = run("study/report.py", *runs, "--out", tmp_path / "report", "--mixed")
    assert result.returncode == 0, result.stderr
    report = (tmp_path / "report/report.md").read_text()
    assert "| two/unet* |" in report and "\\* two/unet: scored at size 256, one/unet at native." in report


def test_other_images_and_other_labels_do_not_compare(runs):
    one, two = read_runs(runs)
    two.labels[3] = "00000000"
    with pytest.raises(InputError, match="two/unet: scored against other labels than one/unet"):
        mark_differences([one, two], allowed=False)
    two.images = two.images[1:]
    with pytest.raises(InputError, match=r"two/unet: scored on other images \(11\) than one/unet \(12\)"):
        mark_differences([one, two], allowed=False)
    mark_differences([one, two], allowed=True)
    with pytest.raises(InputError, match="a paired comparison needs the same images for all"):
        compare([one], [two])


@pytest.mark.parametrize(
    ("name", "what"),
    [("test/metrics.json", "has no scores"), ("test/images.csv", "has no scores"), ("config.json", "is no run")],
)
def test_a_run_that_lacks_something(name, what, runs):
    (runs[1] / name).unlink()
    with pytest.raises(InputError, match=f"{what}: .*{name} is missing. Train it, then score it"):
        read_runs(runs)


def test_a_run_is_given_once_and_photographs_are_where_they_were(runs, tmp_path):
    with pytest.raises(InputError, match="given twice"):
        read_runs([runs[0], runs[0]])
    with pytest.raises(InputError, match=r"no photographs for the figure: .*\nName their folder with --data"):
        pick_rows(read_runs(runs), tmp_path)


def test_better_is_told_from_chance(runs, tmp_path):
    result = run("study/report.py", runs[1], "--against", runs[0], "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "95 % interval" in result.stdout and ": better." in result.stdout
    verdict = json.loads((tmp_path / "comparison.json").read_text())
    truth = json.loads((runs[0] / "test/metrics.json").read_text())["iou"]["mean"]
    assert verdict["ours"]["mean"] == 1 and verdict["theirs"]["mean"] == pytest.approx(truth, abs=1e-9)
    assert verdict["difference"] == pytest.approx(1 - truth) and verdict["share_better"] == 1

    one, _ = read_runs(runs)
    same = compare([one], [one])
    assert same["interval_95"] == [0, 0] and "not told apart" in format_comparison(same)


def test_seeds_have_a_spread_and_the_interval_covers_what_it_should(runs):
    """Two models of the same skill, each right on random images: 95 % intervals miss zero about once in twenty."""
    one, _ = read_runs(runs)
    rng = np.random.default_rng(0)

    def model() -> list:
        seeds = []
        for _ in range(2):
            right = rng.random((200, 1, 1)) < 0.7
            counts = np.where(right, np.diag([60, 30, 10]), np.full((3, 3), 10))
            seeds.append(type(one)(**{**one.__dict__, "counts": counts, "images": [""] * 200}))
        return seeds

    misses = 0
    for _ in range(60):
        verdict = compare(model(), model(), resamples=300)
        low, high = verdict["interval_95"]
        misses += not low <= 0 <= high
    assert misses <= 9, "far more than 3 of 60"
    assert verdict["ours"]["std"] > 0 and "±" in format_comparison(verdict)


def test_resampled_scores_are_those_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (7, 3, 3))
    counts[:, 2] = counts[:, :, 2] = 0  # a class that is nowhere is left out of the mean
    weights = rng.multinomial(7, np.full(7, 1 / 7), size=4)
    for weight, iou in zip(weights, resampled_iou(counts, weights)):
        drawn = torch.from_numpy(np.repeat(counts, weight, axis=0).sum(axis=0))
        assert iou == pytest.approx(ConfusionMatrix(("a", "b", "c"), drawn).scores()["iou"]["mean"])
