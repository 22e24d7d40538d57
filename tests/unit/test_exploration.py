"""dataset/exploration.py: its numbers against the files, and data of one species."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dataset.exploration import format_summary, measure, summarize
from dataset.pet import find_records
from tests.conftest import run
from utils.dataset import SPECIES

FIGURES = {"breeds.png", "photographs.png", "pixels.png", "places.png", "sizes.png", "species.png"}


def test_the_numbers_are_those_of_the_files(prepared):
    records = find_records(prepared, "TrainVal")
    summary = summarize({"TrainVal": measure("TrainVal", records)})
    assert summary["images"] == {
        "TrainVal": {"cats": 4, "dogs": 8}, "TrainVal, balanced": {"cats": 8, "dogs": 8},
    }  # fmt: skip
    assert summary["breeds"] == {"Synthetic_cat (cat)": 4, "synthetic_dog (dog)": 8}

    labels = [np.asarray(Image.open(record.label)) for record in records]
    pixels = np.concatenate([label.ravel() for label in labels])
    for name, value in (("background", 0), ("cat", 1), ("dog", 2), ("boundary", 255)):
        assert summary["pixel_share"]["TrainVal"][name] == pytest.approx((pixels == value).mean())
    assert sum(summary["pixel_share"]["TrainVal, balanced"].values()) == pytest.approx(1)
    assert summary["pixel_share"]["TrainVal, balanced"]["cat"] > summary["pixel_share"]["TrainVal"]["cat"]

    widths = [label.shape[1] for label in labels]
    assert (summary["width"]["min"], summary["width"]["max"]) == (min(widths), max(widths))
    assert summary["width"]["median"] == np.median(widths)
    ratios = [label.shape[1] / label.shape[0] for label in labels]
    assert summary["aspect_ratio"]["95 %"] == pytest.approx(np.quantile(ratios, 0.95), abs=1e-4)
    shares = [(label == 1).sum() / (label != 255).sum() for label, r in zip(labels, records) if r.species == 1]
    assert summary["pet_share"]["cats"]["max"] == pytest.approx(max(shares), abs=1e-4)
    assert "TrainVal, balanced" in format_summary(prepared, summary)


def test_the_map_is_where_the_pets_are(prepared):
    for record, measured in zip(find_records(prepared, "Test"), measure("Test", find_records(prepared, "Test"))):
        label = np.asarray(Image.open(record.label))
        rows, columns = np.nonzero(label == record.species)
        map_rows, map_columns = np.nonzero(measured.pet)
        assert (map_rows.mean() + 0.5) / len(measured.pet) == pytest.approx(rows.mean() / label.shape[0], abs=0.02)
        assert (map_columns.mean() + 0.5) / len(measured.pet) == pytest.approx(
            columns.mean() / label.shape[1], abs=0.02
        )


def test_the_script_draws_all_of_it(prepared, tmp_path):
    result = run("dataset/exploration.py", prepared, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == FIGURES | {"summary.json"}
    assert all(Image.open(tmp_path / name).width > 500 for name in FIGURES)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["synthetic"] and list(summary["images"]) == ["TrainVal", "Test", "TrainVal, balanced"]
    assert "dogs per cat" in result.stdout and "2.00" in result.stdout and str(tmp_path / "sizes.png") in result.stdout


@pytest.mark.parametrize("species", SPECIES)
def test_one_species_is_drawn_too(species, base, tmp_path):
    for path in base.rglob("*ynthetic_*"):
        if species[:3] not in path.name:
            path.unlink()
    result = run("dataset/dataset_prep.py", base)
    assert result.returncode == 0, result.stderr
    result = run("dataset/exploration.py", base, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert len(summary["breeds"]) == 1 and "TrainVal, balanced" not in summary["images"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FIGURES | {"summary.json"}


def test_what_is_not_prepared_says_so(originals):
    result = run("dataset/exploration.py", originals)
    assert result.returncode == 1 and "is not prepared. Run: python dataset/dataset_prep.py" in result.stderr
