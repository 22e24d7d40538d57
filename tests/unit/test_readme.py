"""The README speaks of what is there."""

from __future__ import annotations

import json
import re
from dataclasses import fields

import pytest

from autoencoder.test import Config as AutoencoderTestConfig
from autoencoder.train import Config as AutoencoderConfig
from point_clip.test import Config as PointTestConfig
from point_clip.train import Config as PointConfig
from study.run import KINDS
from tests.conftest import ROOT
from unet.train import Config as UNetConfig

README = (ROOT / "README.md").read_text()


def test_every_flag_is_described():
    for config in (UNetConfig, AutoencoderConfig, AutoencoderTestConfig, PointConfig, PointTestConfig):
        for field in fields(config):
            assert f"`--{field.name.replace('_', '-')}" in README, field.name


def test_every_kind_of_run_of_the_study_is_named():
    assert all(f"`{name}`" in README for name in KINDS)


def test_links_and_paths_exist():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(
        r"python ((?:unet|autoencoder|clip_seg|point_clip|dataset|benchmarks|utils)/\w+\.py)", README
    ):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("folder", ["demo", "unet-sample"])
def test_scores_are_those_of_the_run(folder):
    metrics = json.loads((ROOT / "results" / folder / "metrics.json").read_text())
    for label in metrics["iou"]:
        row = " | ".join(f"{100 * metrics[kind][label]:.1f}" for kind in ("iou", "dice", "accuracy"))
        assert f"| {label} | {row} |" in README


def test_the_table_of_the_pretraining_study_is_its_own():
    from autoencoder.study import format_table

    results = ROOT / "results/pretraining-sample"
    study = json.loads((results / "study.json").read_text())
    table = format_table(study["runs"])
    assert table == (results / "table.md").read_text() and table in README
    for run in study["runs"]:
        folder = results / f"seed{run['seed']}" / run["name"] / ("" if run["name"] == "unet" else "segmentation")
        assert json.loads((folder / "test/metrics.json").read_text())["iou"] == run["iou"]
