"""study/report.py, runs.py, figures.py, compare.py: tables and figures against the runs, and the paired comparison."""

import csv
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.perturbation import PERTURBATIONS
from dataset.pet import find_records, make_test_set
from dataset.pet_heatmap import read_points
from point_clip.scoring import mark_click
from study import report
from study.compare import compare, format_comparison, resampled_iou
from study.experiments import PRETRAINING
from study.figures import RUN_STYLES, plot_classes, run_style
from study.report import REPORTED, SCORES, format_report, format_scores, format_seeds, make_figures, pick_records
from study.runs import Run, mark_differences, read_runs
from tests.helpers import train
from unet.model import UNet
from unet.test import Config
from utils.dataset import CLICKS, PETS
from utils.evaluation import SYNTHETIC_NOTE, run_test
from utils.files import InputError, read_csv, read_json, write_json
from utils.image import picture_size
from utils.metric import ConfusionMatrix
from utils.predictor import save_mask

PERTURBED = ("occlusion", "gaussian_blur")


@pytest.fixture(scope="module")
def tested(prepared, tmp_path_factory) -> Path:
    """A run that was trained for two epochs, and scored clean and perturbed."""
    folder = tmp_path_factory.mktemp("tested") / "unet"
    train(prepared, folder, epochs=2)
    config = Config(folder / "best.pt", data=prepared, perturb=list(PERTURBED), workers=0, device="cpu")
    run_test(config, UNet, "unet", make_test_set)
    return folder


@pytest.fixture
def folders(tested, tmp_path) -> list[Path]:
    """Two copies of it to modify; every prediction of the second is correct."""
    one, two = (Path(shutil.copytree(tested, tmp_path / name / "unet")) for name in ("one", "two"))

    def correct(row):
        counts = np.array(row[3:], int).reshape(len(PETS), len(PETS))
        return [*row[:3], *np.diag(counts.sum(axis=1)).ravel()]

    edit_images_csv(two, correct)
    return [one, two]


@pytest.fixture
def runs(folders) -> list[Run]:
    return read_runs(folders)


def edit_json(path: Path, **values: object) -> None:
    write_json(path, read_json(path) | values)


def edit_images_csv(folder: Path, edit, columns: int | None = None) -> None:
    path = folder / "test/images.csv"
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head[:columns], *map(edit, rows)])


def make_prompted(folder: Path) -> None:
    """Turn a run into one of a model prompted by clicks, whose predictions are all correct."""
    scores = {"ground": 0.5, "object": 1.0, "mean": 0.75}
    edit_json(folder / "test/metrics.json", model="point_clip", iou=scores, dice=scores, accuracy=scores)
    edit_json(folder / "config.json", point_encoding="disk", class_table=CLICKS.as_plain_dict())
    edit_images_csv(folder, lambda row: [*row[:3], 10, 0, 0, 20], columns=7)
    for path in (folder / "test/masks").iterdir():
        save_mask(path, np.full(picture_size(path)[::-1], CLICKS.value("object"), np.uint8), CLICKS)


def heights(bars) -> list[float]:
    return [bar.get_height() for bar in bars]


def run_report(monkeypatch, *flags: object) -> None:
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, flags)])
    report.main()


def test_tables_hold_the_scores_of_the_runs(monkeypatch, folders, tested, tmp_path, capsys):
    out = tmp_path / "report"
    run_report(monkeypatch, *folders, "--out", out)
    metrics = read_json(tested / "test/metrics.json")
    rows = read_csv(out / "runs.csv")
    assert [row["run"] for row in rows] == ["one/unet", "two/unet"]
    for kind, reported in zip(SCORES, REPORTED["unet"]):
        assert float(rows[0][kind]) == pytest.approx(100 * metrics[kind]["mean"], abs=6e-5)
        assert float(rows[0][f"report_{kind}"]) == reported
    for name in PETS.names:
        assert float(rows[0][f"iou_{name}"]) == pytest.approx(100 * metrics["iou"][name], abs=6e-5)
    for name in ("parameters", "trained_parameters", "epoch", "seed", "images", "image_size"):
        assert int(rows[0][name]) == metrics[name], name
    assert rows[0]["epochs"] == "2" and rows[0]["data"].endswith("(synthetic)")

    text = (out / "report.md").read_text()
    perturbations = read_json(tested / "test/robustness.json")["perturbations"]
    retained = {name: 100 * entry["retained_last"] for name, entry in perturbations.items()}
    order = [name for name in PERTURBATIONS if name in PERTURBED]
    assert f"| run | {' | '.join(name.replace('_', ' ') for name in order)} | mean |" in text
    values = [*(retained[name] for name in order), np.mean(list(retained.values()))]
    assert f"| one/unet | {' | '.join(f'{value:.1f}' for value in values)} |" in text
    assert f"| one/unet | {100 * metrics['iou']['mean']:.1f} |" in text and "Synthetic drawings" in text
    printed = capsys.readouterr().out
    assert format_scores(read_runs(folders)) in text + "\n" and str(out / "report.md") in printed
    for name in ("classes", "curves", "robustness", "predictions"):
        assert (out / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert f"]({name}.png)" in text and str(out / f"{name}.png") in printed
        Image.open(out / f"{name}.png").verify()


def test_figures_show_the_runs(runs, prepared):
    """With a legend entry and a color for each run."""
    figures = make_figures(runs, pick_records(runs, prepared, None))
    assert list(figures) == ["classes", "curves", "robustness", "predictions"]
    assert all(figure.get_suptitle() == SYNTHETIC_NOTE for figure, _ in figures.values())
    for name in ("classes", "curves", "robustness"):
        legend = [text.get_text() for text in figures[name][0].legends[0].get_texts()]
        assert legend == [run.name for run in runs], name

    axis = figures["classes"][0].axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == [*PETS.names, "mean"]
    for run, bars in zip(runs, axis.containers, strict=True):
        assert heights(bars) == pytest.approx([100 * value for value in run.metrics["iou"].values()])

    losses, scores = figures["curves"][0].axes
    assert losses.get_ylabel() == "validation loss" and "mean IoU" in scores.get_ylabel()
    for number, run in enumerate(runs):
        color, _, _ = run_style(number)
        lines = [axis.get_lines()[number] for axis in (losses, scores)]
        assert all(line.get_color() == color and list(line.get_xdata()) == [1, 2] for line in lines)
        assert list(lines[0].get_ydata()) == [row["val_loss"] for row in run.log]
        assert list(lines[1].get_ydata()) == [100 * row["val_iou_mean"] for row in run.log]

    panels = [axis for axis in figures["robustness"][0].axes if axis.get_visible()]
    for axis, (name, entry) in zip(panels, runs[0].robustness["perturbations"].items(), strict=True):
        assert axis.get_title() == name.replace("_", " ")
        np.testing.assert_allclose(axis.get_lines()[0].get_ydata(), np.mean(entry["dice"]["mean"], axis=1))


def test_a_prompted_run_has_its_own_table_and_colors(folders, prepared):
    make_prompted(folders[1])
    one, two = read_runs(folders)
    figures = make_figures([one, two], pick_records([one, two], prepared, None))
    assert list(figures) == ["classes", "classes-prompted", "curves", "robustness", "predictions"]
    for name, run in (("classes", one), ("classes-prompted", two)):
        (bars,) = figures[name][0].axes[0].containers
        assert heights(bars) == pytest.approx([100 * value for value in run.metrics["iou"].values()]), name
    rows = np.reshape(figures["predictions"][0].axes, (-1, 4))
    assert [axis.get_title() for axis in rows[0]] == ["photograph", "truth", "one/unet", "two/unet\n(a click)"]
    records = {record.name: record for record in find_records(prepared, "Test")}
    for photo, _, _, clicked in rows:
        record = records[photo.get_ylabel().split("\n")[0].split()[1]]
        pixels = np.asarray(photo.images[0].get_array())
        (click,) = (click for click in read_points([record])[0] if click.on_pet)
        expected = PETS.overlay(pixels, np.full(pixels.shape[:2], record.species, np.uint8))
        expected = mark_click(expected, click.x, click.y)
        np.testing.assert_array_equal(clicked.images[0].get_array(), expected, "the click, in the color of the pet")
    tables = format_scores([one, two])
    assert "Table 1. Segmentation" in tables and "Table 2. Prompted by a click" in tables
    assert "| {} | {} | {} |".format(*REPORTED["unet"]) in tables
    assert "| {} |".format(REPORTED["point_clip"][0]) not in tables, "the report's model had no disk"


def test_only_comparable_models_are_compared(folders):
    make_prompted(folders[1])
    one, two = read_runs(folders)
    for sides in (([one], [two]), ([one, two], [one])):
        with pytest.raises(InputError, match="have different classes"):
            compare(*sides)
    two.counts, two.metrics["model"] = one.counts, "autoencoder"
    with pytest.raises(InputError, match=r"each side is to be one model over seeds, got .*two/unet \(autoencoder\)"):
        compare([one, two], [one])


def test_mean_over_perturbations_that_all_runs_have(folders):
    path = folders[1] / "test/robustness.json"
    shared = read_json(path)["perturbations"]
    edit_json(path, perturbations=shared | {"fog": shared["occlusion"] | {"retained_last": 0.01}})
    text = format_report(read_runs(folders), {})
    assert f"| fog | mean of {', '.join(name.replace('_', ' ') for name in shared)} |" in text
    mean = 100 * np.mean([entry["retained_last"] for entry in shared.values()])
    assert f"| 1.0 | {mean:.1f} |" in text


def test_examples_are_best_median_and_worst_or_named(tested, prepared, tmp_path):
    (run,) = read_runs([tested])
    rows = pick_records([run], prepared, None)
    ranked = [name for _, name in sorted(zip(run.image_iou, run.images), reverse=True)]
    names = [record.name for _, record in rows]
    assert names[:2] == ranked[:2] and names[-2:] == ranked[-2:]
    assert [caption.split(":")[0] for caption, _ in rows] == 2 * ["best"] + 2 * ["median"] + 2 * ["worst"]
    named = pick_records([run], prepared, run.images[:2])
    assert [(caption, record.name) for caption, record in named] == [(name, name) for name in run.images[:2]]
    with pytest.raises(InputError, match="lacks 1 of the images, for example Garfield"):
        pick_records([run], prepared, ["Garfield"])
    with pytest.raises(InputError, match=r"no photographs for the figure: .*\nName their folder with --data"):
        pick_records([run], tmp_path, None)


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        (lambda run: run.metrics.update(score_size=256), "scored at size 256, one/unet at native"),
        (lambda run: run.images.pop(0), r"scored on other images \(11\) than one/unet \(12\)"),
        (lambda run: run.labels.__setitem__(3, "00000000"), "scored against other labels than one/unet"),
        (lambda run: run.metrics.update(image_size=64), "perturbed at 64 pixels, one/unet at 32"),
    ],
    ids=["size", "images", "labels", "model-size"],
)
def test_scores_that_cannot_be_compared_are_refused_or_marked(runs, change, mark):
    change(runs[1])
    with pytest.raises(InputError, match=rf"(?s)two/unet: {mark}.*--mixed"):
        mark_differences(runs, allowed=False)
    mark_differences(runs, allowed=True)
    assert runs[1].title == "two/unet*"
    with pytest.raises(InputError, match="a paired comparison needs the same images for all"):
        compare([runs[0]], [runs[1]])


def test_marked_runs_have_a_note_in_the_report(monkeypatch, folders, tmp_path):
    edit_json(folders[1] / "test/metrics.json", score_size=256)
    with pytest.raises(InputError, match="these scores cannot be compared"):
        run_report(monkeypatch, *folders, "--out", tmp_path / "report")
    assert not (tmp_path / "report").exists()
    monkeypatch.setattr(report, "make_figures", lambda *_: {})  # they take seconds to save
    run_report(monkeypatch, *folders, "--out", tmp_path / "report", "--mixed")
    text = (tmp_path / "report/report.md").read_text()
    assert "| two/unet* |" in text and "\\* two/unet: scored at size 256, one/unet at native." in text


@pytest.mark.parametrize("name", ["test/metrics.json", "test/images.csv", "config.json", "log.csv"])
def test_incomplete_run_is_an_error(name, folders):
    (folders[1] / name).unlink()
    problem = "has no scores" if name.startswith("test/") else "is not a run"
    with pytest.raises(InputError, match=f"{problem}: .*{name} is missing. Train it, then score it"):
        read_runs(folders)


def test_a_run_is_given_once(folders):
    with pytest.raises(InputError, match="given twice"):
        read_runs([folders[0], folders[0]])


def test_a_run_with_stages_is_read_from_its_segmentation(tested, tmp_path):
    stage = Path(shutil.copytree(tested, tmp_path / "autoencoder/segmentation"))
    for folder in (stage.parent, stage):
        (run,) = read_runs([folder])
        assert run.name == "autoencoder" and run.folder == stage


def test_styles_differ_beyond_the_number_of_colors():
    styles = {(color, str(dashes)) for color, dashes, _ in map(run_style, range(2 * len(RUN_STYLES)))}
    assert len(styles) == 2 * len(RUN_STYLES)


def test_absent_class_has_no_bar():
    figure = plot_classes({"run": {"cat": 0.25, "dog": None}}, ["run"], "")
    (bars,) = figure.axes[0].containers
    assert bars[0].get_height() == 25 and np.isnan(bars[1].get_height())
    assert [text.get_text() for text in figure.axes[0].texts] == ["25", ""]


GAIN = next(experiment for experiment in PRETRAINING if experiment.baseline)


def rows_of(name: str, *iou: float, **scores) -> list[dict]:
    """Rows of runs.csv of one experiment, a row per seed."""
    return [
        {"run": f"seed{seed}/{name}", "seed": str(seed), "iou": value, "iou_cat": value / 2, **scores}
        for seed, value in enumerate(iou)
    ]


def test_table_over_seeds_has_spread_and_paired_gain():
    """The gains are 12 and 8: differences of runs with the same seed. Single seeds have no table."""
    rows = rows_of(GAIN.baseline, 30, 32) + rows_of(GAIN.name, 42, 40, psnr=20.0, ssim=0.5)
    lines = format_seeds(rows).splitlines()
    assert lines[0] == "| experiment | mIoU | gain | over | IoU cat | PSNR, dB | SSIM |"
    assert lines[2] == f"| {GAIN.baseline} | 31.0 ± 1.4 |  |  | 15.5 ± 0.7 |  |  |"
    gain = f"+10.0 ± 2.8 | {GAIN.baseline}"
    assert lines[3] == f"| {GAIN.name} | 41.0 ± 1.4 | {gain} | 20.5 ± 0.7 | 20.0 ± 0.0 | 0.500 ± 0.000 |"
    as_text = [{"psnr": "", **{key: str(value) for key, value in row.items()}} for row in rows]  # as runs.csv is read
    assert format_seeds(as_text) == format_seeds(rows)
    text = format_seeds(rows_of(GAIN.baseline, 30) + rows_of(GAIN.name, 42, 20))
    assert f"| {GAIN.name} | 31.0 ± 15.6 | +12.0 | {GAIN.baseline} |" in text, "over the seeds that both have"
    assert format_seeds(rows_of(GAIN.baseline, 30) + rows_of(GAIN.name, 42)) == ""


def test_better_run_is_recognized(monkeypatch, folders, tmp_path, capsys):
    run_report(monkeypatch, folders[1], "--against", folders[0], "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "95 % interval" in printed and ": better." in printed
    assert (tmp_path / "comparison.md").read_text() in printed
    verdict = read_json(tmp_path / "comparison.json")
    truth = read_json(folders[0] / "test/metrics.json")["iou"]["mean"]
    assert verdict["ours"]["mean"] == 1 and verdict["theirs"]["mean"] == pytest.approx(truth, abs=1e-9)
    assert verdict["difference"] == pytest.approx(1 - truth) and verdict["share_better"] == 1


def test_equal_runs_do_not_differ_significantly(runs):
    verdict = compare(runs[:1], runs[:1])
    assert verdict["interval_95"] == [0, 0] and "no significant difference" in format_comparison(verdict)


def test_intervals_cover_zero_for_models_of_equal_skill(runs):
    """Two models over two seeds, each correct on random images: 95 % intervals miss zero about once in twenty."""
    rng = np.random.default_rng(0)

    def seeds() -> list[Run]:
        correct = [rng.random((200, 1, 1)) < 0.7 for _ in range(2)]
        counts = [np.where(share, np.diag([60, 30, 10]), np.full((3, 3), 10)) for share in correct]
        return [dataclasses.replace(runs[0], counts=table, images=[""] * 200) for table in counts]

    verdicts = [compare(seeds(), seeds(), resamples=300) for _ in range(60)]
    misses = sum(not verdict["interval_95"][0] <= 0 <= verdict["interval_95"][1] for verdict in verdicts)
    assert misses <= 9, "many more than 3 of 60"
    assert verdicts[0]["ours"]["std"] > 0 and "±" in format_comparison(verdicts[0])


def test_resampled_scores_are_those_of_the_confusion_matrix():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (7, 3, 3))
    counts[:, 2] = counts[:, :, 2] = 0  # a class that is absent is left out of the mean
    weights = rng.multinomial(7, np.full(7, 1 / 7), size=4)
    for weight, iou in zip(weights, resampled_iou(counts, weights)):
        drawn = torch.from_numpy(np.repeat(counts, weight, axis=0).sum(axis=0))
        assert iou == pytest.approx(ConfusionMatrix(("a", "b", "c"), drawn).scores()["iou"]["mean"])
