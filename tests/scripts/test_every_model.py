"""The scripts of every experiment of study/experiments.py, so that a further model is tested without writing a test."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.perturbation import PERTURBATIONS
from dataset.pet import find_records
from models import MODELS
from study.experiments import EXPERIMENTS, Experiment
from tests.helpers import ROOT, TINY, succeed
from utils.config import flag_name
from utils.dataset import CLICKS, ClassTable
from utils.files import read_csv, read_json
from utils.helper import class_table_of, load_checkpoint

PERTURBATION = PERTURBATIONS["occlusion"]
POINT = ("--point", "20,30")
RUN_FILES = {"config.json", "split.json", "log.csv", "curves.png", "last.pt", "best.pt"}
SCORES = ("iou", "dice", "accuracy")


def config_fields(experiment: Experiment, script: str) -> set[str]:
    module = importlib.import_module(f"{experiment.model}.{script}")
    return {field.name for field in fields(module.Config)}


def tiny_flags(experiment: Experiment, clip_folder: Path) -> list[object]:
    """One epoch of a tiny model by the strong recipe, with the flags that its train.py has and the experiment takes."""
    known = config_fields(experiment, "train")
    values = dict(zip(TINY[::2], TINY[1::2])) | {"--val-fraction": 0.25, "--recipe": "strong", "--warmup": 0.5}
    values |= {"--ema": 0.9, "--paste": 0.5, "--augment": "strong", "--loss": "cross-entropy+dice"}
    values |= {flag_name(name): 1 for name in known if name.endswith("epochs")}
    values |= {flag_name(name): clip_folder for name in known if name == "clip_model"}
    takes = {flag_name(name) for name in known} - set(experiment.refuses)
    return [part for name, value in values.items() if name in takes for part in (name, value)]


@dataclass(frozen=True)
class Trained:
    """An experiment that was trained for one epoch, its run folder, and the folder of its segmentation in it."""

    experiment: Experiment
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / MODELS[self.experiment.model].checkpoint

    @property
    def stage(self) -> Path:
        return self.checkpoint.parent

    @property
    def script(self) -> str:
        return f"{self.experiment.model}/test.py"

    @property
    def class_table(self) -> ClassTable:
        return class_table_of(load_checkpoint(self.checkpoint))

    @property
    def point(self) -> tuple[str, ...]:
        """The flags of a click, if the model is prompted by one."""
        return POINT if "point" in config_fields(self.experiment, "test") else ()


@pytest.fixture(scope="module")
def train(prepared: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains the experiment of a name, once, after the one that it starts from; returns its run folder."""
    folders: dict[str, Path] = {}
    by_name = {experiment.name: experiment for experiment in EXPERIMENTS}
    runs = tmp_path_factory.mktemp("experiments")

    def train_once(name: str) -> Path:
        if name not in folders:
            experiment, flags = by_name[name], []
            if experiment.starts_from:
                option, other, file = experiment.starts_from
                flags = [option, train_once(other) / file]
            flags += [*experiment.flags, *tiny_flags(experiment, clip_folder)]
            succeed(f"{experiment.model}/train.py", "--data", prepared, "--out", runs / name, *flags)
            folders[name] = runs / name
        return folders[name]

    return train_once


@pytest.fixture(scope="module", params=EXPERIMENTS, ids=lambda experiment: experiment.name)
def trained(request: pytest.FixtureRequest, train: Callable[[str], Path]) -> Trained:
    return Trained(request.param, train(request.param.name))


@pytest.fixture(scope="module")
def scores(trained: Trained, prepared: Path) -> Path:
    """The files of its test.py under one perturbation."""
    flags = ["--data", prepared, "--perturb", PERTURBATION.name, "--workers", 0, "--device", "cpu"]
    result = succeed(trained.script, "--checkpoint", trained.checkpoint, *flags)
    folder = trained.stage / "test"
    assert str(folder / "metrics.json") in result.stdout and "synthetic" in result.stdout
    return folder


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.verify()


def test_run_folder_is_complete(trained):
    missing = RUN_FILES - {path.name for path in trained.stage.iterdir()}
    assert not missing, f"{trained.stage} lacks {', '.join(sorted(missing))}"
    assert list(trained.stage.glob("events.out.tfevents.*")), "no TensorBoard events"
    assert_picture(trained.stage / "curves.png")
    assert [row["epoch"] for row in read_csv(trained.stage / "log.csv")] == ["1"]
    last, best = (load_checkpoint(trained.stage / name, trained.experiment.model) for name in ("last.pt", "best.pt"))
    assert last["epoch"] == best["epoch"] == 1 and "optimizer" in last and "optimizer" not in best
    assert best["class_table"] == read_json(trained.stage / "config.json")["class_table"]
    split = read_json(trained.stage / "split.json")
    assert split["train"] and split["val"] and not set(split["train"]) & set(split["val"])


def test_run_is_resumed_for_a_second_epoch(trained, tmp_path):
    """In a copy, because other experiments start from the run."""
    copy = Path(shutil.copytree(trained.folder, tmp_path / "run"))
    succeed(f"{trained.experiment.model}/train.py", "--out", copy, "--resume", "--epochs", 2)
    stage = copy / trained.stage.relative_to(trained.folder)
    first, second = read_csv(stage / "log.csv")
    assert [first] == read_csv(trained.stage / "log.csv") and second["epoch"] == "2"
    last = load_checkpoint(stage / "last.pt", trained.experiment.model)
    before = load_checkpoint(trained.stage / "last.pt", trained.experiment.model)
    assert last["epoch"] == 2
    assert any(not torch.equal(value, before["model"][key]) for key, value in last["model"].items()), "it learned"


def test_metrics_have_the_keys_of_the_schema(trained, scores, prepared):
    metrics, labels = read_json(scores / "metrics.json"), {*trained.class_table.names, "mean"}
    assert metrics["model"] == trained.experiment.model and metrics["synthetic"] is True
    assert metrics["images"] == len(find_records(prepared, "Test")) and metrics["pixels"] > 0
    assert metrics["score_size"] == "native" and metrics["image_size"] == 32 and metrics["epoch"] == 1
    assert 0 < metrics["trained_parameters"] <= metrics["parameters"]
    assert set(metrics["per_image_iou"]) == {"mean", "worst_5_percent"} and metrics["baseline"]["name"]
    assert {"config", "environment", "images_per_second", "seed"} <= set(metrics)
    values = [metrics["pixel_accuracy"], *metrics["per_image_iou"].values(), metrics["baseline"]["pixel_accuracy"]]
    for kind in SCORES:
        assert set(metrics[kind]) == set(metrics["baseline"][kind]) == labels, kind
        values += [*metrics[kind].values(), *metrics["baseline"][kind].values()]
    assert all(value is None or 0 <= value <= 1 for value in values)
    config = read_json(trained.stage / "config.json")
    assert metrics["seed"] == config["seed"] and metrics["config"]["checkpoint"] == str(trained.checkpoint)


def test_images_csv_adds_up_to_the_metrics(trained, scores, prepared):
    rows, metrics = read_csv(scores / "images.csv"), read_json(scores / "metrics.json")
    assert [row["name"] for row in rows] == [record.name for record in find_records(prepared, "Test")]
    names = trained.class_table.names
    table = np.array([[sum(int(row[f"{truth}/{guess}"]) for row in rows) for guess in names] for truth in names])
    assert table.sum() == metrics["pixels"]
    for value, name in enumerate(names):
        union = table[value].sum() + table[:, value].sum() - table[value, value]
        assert metrics["iou"][name] == (table[value, value] / union if union else None), name


def test_masks_have_the_size_of_the_photographs(trained, scores, prepared):
    for record in find_records(prepared, "Test"):
        with Image.open(scores / "masks" / f"{record.name}.png") as mask:
            assert mask.mode == "P" and mask.size == record.load_label().shape[::-1]
            assert trained.class_table.decode_label(mask).max() < len(trained.class_table)


def test_level_zero_of_a_perturbation_is_the_clean_score(trained, scores):
    metrics, robustness = read_json(scores / "metrics.json"), read_json(scores / "robustness.json")
    assert list(robustness["perturbations"]) == [PERTURBATION.name]
    rows = read_csv(scores / "robustness.csv")
    labels = [*trained.class_table.names, "mean"]
    assert len(rows) == len(labels) * len(PERTURBATION.amounts) * PERTURBATION.draws
    for kind in ("iou", "dice"):
        table = robustness["perturbations"][PERTURBATION.name][kind]
        assert all(table[label][0] == [metrics[kind][label]] * PERTURBATION.draws for label in labels)
        for row in rows:
            if row["level"] == "0":
                clean = metrics[kind][row["class"]]
                assert row[kind] == ("" if clean is None else f"{clean:.6f}")


def test_figures_of_a_test_are_pictures(scores):
    for name in ("predictions.png", "robustness.png"):
        assert_picture(scores / name)


def test_photographs_get_the_same_masks_from_both_scripts(trained, prepared, tmp_path):
    """test.py --images with the checkpoint, and predict.py with the run folder and with the checkpoint."""
    photographs = [record.image for record in find_records(prepared, "Test")[:2]]
    device = ["--device", "cpu", "--tta", "flip", *trained.point]
    succeed(trained.script, "--checkpoint", trained.checkpoint, "--images", *photographs, "--out", tmp_path / "test",
            *device)  # fmt: skip
    contents = {path.name: path.read_bytes() for path in (tmp_path / "test").glob("[!.]*")}
    written = {f"{path.stem}_{kind}" for path in photographs for kind in ("mask.png", "overlay.jpg")}
    assert set(contents) == {*written, "index.csv"}
    for given in (trained.folder, trained.checkpoint):
        out = tmp_path / given.name
        succeed("predict.py", *photographs, "--checkpoint", given, "--out", out, *device)
        found = {path.name: path.read_bytes() for path in out.glob("[!.]*")}
        assert found == contents, f"predict.py --checkpoint {given}"
    for path in photographs:
        with Image.open(path) as photograph, Image.open(tmp_path / "test" / f"{path.stem}_mask.png") as mask:
            assert mask.mode == "P" and mask.size == photograph.size


def test_every_model_is_in_an_experiment():
    missing = set(MODELS) - {experiment.model for experiment in EXPERIMENTS}
    assert not missing, f"add an experiment of {', '.join(sorted(missing))} to EXPERIMENTS in study/experiments.py"


def test_every_folder_with_a_train_script_is_in_the_table_of_models():
    missing = {path.parent.name for path in ROOT.glob("*/train.py")} - set(MODELS) - {"utils"}
    assert not missing, f"add {', '.join(sorted(missing))} to MODELS in models.py"


def test_prompted_models_take_a_point():
    for name, model in MODELS.items():
        takes = "point" in {field.name for field in fields(importlib.import_module(f"{name}.test").Config)}
        assert takes == (model.classes == CLICKS), f"{name}/test.py --point"
