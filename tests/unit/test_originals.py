"""dataset/originals.py: layouts, lists and names as they come; the download."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import dataset_prep
from dataset.dataset_prep import prepare
from tests.conftest import DOG, TRIMAP, assert_left_out, left_out, run, state, to_report_layout
from utils.dataset import IGNORE
from utils.files import InputError


def unlist(base: Path, name: str, file: str) -> None:
    path = base / f"annotations/{file}.txt"
    path.write_text("".join(line for line in path.open() if line.split()[0] != name))


DAMAGES = {
    "image without a label": (lambda b: (b / TRIMAP).unlink(), DOG, "without a label"),
    "label without an image": (lambda b: (b / DOG).unlink(), TRIMAP, "without an image"),
    "in no list": (lambda b: unlist(b, "synthetic_dog_1", "trainval"), DOG, "in no list"),
    "unreadable line": (lambda b: (b / "annotations/test.txt").open("a").write("a_dog one two\n"),
                        "annotations/test.txt:13", "cannot read the line"),
    "not a picture's suffix": (lambda b: (b / "images/synthetic_dog_1.mat").write_text("x"),
                               "images/synthetic_dog_1.mat", "not a picture by its suffix"),
    "two pictures of a name": (lambda b: Image.open(b / DOG).save(b / "images/synthetic_dog_1.png"),
                               "images/synthetic_dog_1.png", "same name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_cannot_be_used_is_left_out_and_named(base, kind):
    damage, file, reason = DAMAGES[kind]
    damage(base)
    assert_left_out(base, file, reason)


def test_original_layout(base, originals):
    before = state(base)
    report, fresh = prepare(base, processes=2)
    assert fresh
    assert report["counts"] == {"TrainVal": {"cats": 4, "dogs": 8}, "Test": {"cats": 4, "dogs": 8}}
    assert report["left_out"] == [] and report["warnings"] == [] and report["synthetic"]
    assert {file: content for file, content in state(base).items() if file in before} == before

    name = "Synthetic_cat_1"
    photo, label = base / f"TrainVal/color/cats/{name}.jpg", base / f"TrainVal/label/cats/{name}.png"
    assert photo.samefile(base / f"images/{name}.jpg"), "photographs are linked, so that the disk is not doubled"
    trimap = np.asarray(Image.open(base / f"annotations/trimaps/{name}.png"))
    stored = Image.open(label)
    assert stored.mode == "P" and stored.getpalette()[3:6] == [128, 0, 0]
    expected = np.select([trimap == 1, trimap == 2, trimap == 3], [1, 0, IGNORE])
    np.testing.assert_array_equal(np.asarray(stored), expected)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_report_layout_in_every_label_mode(prepared, tmp_path, mode):
    base = to_report_layout(prepared, tmp_path / "base", mode)
    report, _ = prepare(base)
    assert report["layout"] == "report"
    assert report["counts"] == {"TrainVal": {"cats": 4, "dogs": 8}, "Test": {"cats": 4, "dogs": 8}}
    for path in (prepared / "TrainVal" / "label").rglob("*.png"):
        same = base / path.relative_to(prepared)
        np.testing.assert_array_equal(np.asarray(Image.open(same)), np.asarray(Image.open(path)))


def test_name_in_both_lists_stays_in_test_only(base):
    with (base / "annotations/trainval.txt").open("a") as file:
        file.write("synthetic_dog_2 2 2 2\n")
    assert "both lists" in left_out(base)["annotations/trainval.txt: synthetic_dog_2"]
    assert (base / "Test/color/dogs/synthetic_dog_2.jpg").exists()
    assert not (base / "TrainVal/color/dogs/synthetic_dog_2.jpg").exists()


def test_the_same_name_in_both_splits_of_the_report_layout_stays_in_test_only(prepared, tmp_path):
    base = to_report_layout(prepared, tmp_path / "base")
    Image.open(base / "Test/color/synthetic_dog_2.jpg").save(base / "TrainVal/color/synthetic_dog_2.jpg", quality=50)
    shutil.copy(base / "Test/label/synthetic_dog_2.png", base / "TrainVal/label")
    assert "also in Test" in left_out(base)["TrainVal/color/synthetic_dog_2.jpg"]
    assert (base / "Test/color/dogs/synthetic_dog_2.jpg").exists()


def test_names_and_lists_in_another_encoding(base):
    (base / DOG).rename(base / "images" / os.fsdecode(b"caf\xe9.jpg"))
    with (base / "annotations/test.txt").open("ab") as file:
        file.write(b"caf\xe9 2 2 2\n")
    reasons = left_out(base)
    assert any("not valid UTF-8" in reason for reason in reasons.values())
    assert run("dataset/dataset_prep.py", base).returncode == 0


def test_hidden_files_are_no_data(base):
    (base / "annotations/trimaps/._synthetic_dog_1.png").write_bytes(b"Mac OS X")
    (base / "images/.DS_Store").write_bytes(b"x")
    assert left_out(base) == {}


@pytest.mark.parametrize("missing", ["list.txt", "trainval.txt", "test.txt", "trimaps"])
def test_incomplete_original_layout_names_what_is_missing(base, missing):
    path = base / "annotations" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=f"{missing} is missing"):
        prepare(base)


class FakeDownload:
    """Stands in for torchvision's OxfordIIITPet: unpacks drawings where it would unpack the real archives."""

    source: Path

    def __init__(self, root: str, download: bool):
        target = Path(root) / "oxford-iiit-pet"
        assert download and not (target / "images").exists()
        shutil.copytree(self.source, target, dirs_exist_ok=True)


def test_download_arrives_in_the_original_layout(originals, tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(FakeDownload, "source", originals, raising=False)
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", FakeDownload)
    base = tmp_path / "new"
    (base / ".download/oxford-iiit-pet/images").mkdir(parents=True)  # half unpacked by a try that was cut short
    assert dataset_prep.main([str(base), "--download", "--processes", "1"]) == 0
    assert json.loads((base / "prep_report.json").read_text())["counts"]["Test"] == {"cats": 4, "dogs": 8}
    assert not (base / ".download").exists()
    assert dataset_prep.main([str(base), "--download", "--processes", "1"]) == 0, "not fetched twice"


def test_failed_download_says_what_to_do(tmp_path, monkeypatch):
    import torchvision.datasets

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", offline)
    with pytest.raises(InputError, match=r"no route to host.*Run again to continue"):
        dataset_prep.main([str(tmp_path / "new"), "--download"])
