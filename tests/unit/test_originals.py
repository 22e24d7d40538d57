"""dataset/originals.py: both layouts, lists and names in every form, the download."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import dataset_prep
from dataset.dataset_prep import prepare
from tests.helpers import left_out, state, to_report_layout
from utils.dataset import IGNORE
from utils.files import InputError, read_json


def remove_from_list(base, name, file):
    path = base / f"annotations/{file}.txt"
    path.write_text("".join(line for line in path.open() if line.split()[0] != name))


# The file that is left out, the change that causes it, and the reason in the report.
DAMAGES = {
    "images/synthetic_dog_1.jpg": (lambda b: (b / "annotations/trimaps/synthetic_dog_1.png").unlink(),
                                   "image without a label"),
    "annotations/trimaps/synthetic_dog_3.png": (lambda b: (b / "images/synthetic_dog_3.jpg").unlink(),
                                                "label without an image"),
    "images/synthetic_dog_5.jpg": (lambda b: remove_from_list(b, "synthetic_dog_5", "trainval"), "in no list"),
    "annotations/test.txt:13": (lambda b: (b / "annotations/test.txt").open("a").write("a_dog one two\n"),
                                "cannot read the line"),
    "images/synthetic_dog_7.mat": (lambda b: (b / "images/synthetic_dog_7.mat").write_text("x"),
                                   "not a picture by its suffix"),
    "images/synthetic_dog_9.png": (lambda b: Image.open(b / "images/synthetic_dog_9.jpg").save(
                                       b / "images/synthetic_dog_9.png"), "same name"),
}  # fmt: skip


def test_unusable_files_are_left_out_with_the_reason(base):
    images = {path.stem for path in (base / "images").iterdir()}
    for damage, _ in DAMAGES.values():
        damage(base)
    reasons = left_out(base)
    listed = "annotations/trainval.txt: synthetic_dog_3"  # its image is gone, so its entry is left out as well
    assert reasons.pop(listed) == "no such image"
    assert set(reasons) == set(DAMAGES)
    for file, (_, expected) in DAMAGES.items():
        assert expected in reasons[file], file
    lost = {f"synthetic_dog_{number}" for number in (1, 3, 5)}  # of the other changes, an intact pair remains
    assert {path.stem for path in base.glob("*/color/*/*.jpg")} == images - lost


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
    for path in (prepared / "TrainVal/label").rglob("*.png"):
        same = Image.open(base / path.relative_to(prepared))
        np.testing.assert_array_equal(same, Image.open(path))


def test_a_name_in_both_lists_stays_in_test_only(base):
    with (base / "annotations/trainval.txt").open("a") as file:
        file.write("synthetic_dog_2 2 2 2\n")
    assert "both lists" in left_out(base)["annotations/trainval.txt: synthetic_dog_2"]
    assert (base / "Test/color/dogs/synthetic_dog_2.jpg").exists()
    assert not (base / "TrainVal/color/dogs/synthetic_dog_2.jpg").exists()


def test_a_name_in_both_splits_stays_in_test_only(prepared, tmp_path):
    base = to_report_layout(prepared, tmp_path / "base")
    Image.open(base / "Test/color/synthetic_dog_2.jpg").save(base / "TrainVal/color/synthetic_dog_2.jpg", quality=50)
    shutil.copy(base / "Test/label/synthetic_dog_2.png", base / "TrainVal/label")
    assert "also in Test" in left_out(base)["TrainVal/color/synthetic_dog_2.jpg"]
    assert (base / "Test/color/dogs/synthetic_dog_2.jpg").exists()


def test_names_in_another_encoding_and_hidden_files(base, capsys):
    (base / "images/synthetic_dog_1.jpg").rename(base / "images" / os.fsdecode(b"caf\xe9.jpg"))
    with (base / "annotations/test.txt").open("ab") as file:
        file.write(b"caf\xe9 2 2 2\n")
    (base / "annotations/trimaps/._synthetic_dog_1.png").write_bytes(b"Mac OS X")
    (base / "images/.DS_Store").write_bytes(b"x")
    assert dataset_prep.main([str(base), "--processes", "1"]) == 0
    assert r"caf\udce9.jpg: name is not valid UTF-8; rename it" in capsys.readouterr().out
    assert set(left_out(base)) == {  # hidden files are not mentioned
        r"images/caf\udce9.jpg", "annotations/test.txt:13",
        "annotations/trainval.txt: synthetic_dog_1", "annotations/trimaps/synthetic_dog_1.png",
    }  # fmt: skip


@pytest.mark.parametrize("missing", ["list.txt", "trainval.txt", "test.txt", "trimaps"])
def test_an_incomplete_original_layout_names_the_missing_file(base, missing):
    path = base / "annotations" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(InputError, match=f"{missing} is missing"):
        prepare(base)


def test_a_folder_in_neither_layout_lists_its_content(tmp_path):
    for found in ("nothing", "holiday.jpg"):
        with pytest.raises(InputError, match=rf"neither layout.*found: {found}\. --download fetches the data"):
            prepare(tmp_path)
        (tmp_path / "holiday.jpg").touch()


class FakeDownload:
    """Replaces torchvision's OxfordIIITPet: unpacks drawings where it would unpack the real archives."""

    def __init__(self, root, download):
        target = Path(root) / "oxford-iiit-pet"
        assert download and not (target / "images").exists()
        shutil.copytree(self.source, target, dirs_exist_ok=True)


def test_a_download_is_completed_once_or_fails_with_a_remedy(originals, tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(FakeDownload, "source", originals, raising=False)
    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", FakeDownload)
    base = tmp_path / "new"
    (base / ".download/oxford-iiit-pet/images").mkdir(parents=True)  # half unpacked by an interrupted attempt
    assert dataset_prep.main([str(base), "--download", "--processes", "1"]) == 0
    assert read_json(base / "prep_report.json")["counts"]["Test"] == {"cats": 4, "dogs": 8}
    assert not (base / ".download").exists()

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", offline)
    assert dataset_prep.main([str(base), "--download", "--processes", "1"]) == 0
    with pytest.raises(InputError, match=r"no route to host.*Run again to continue"):
        dataset_prep.main([str(tmp_path / "other"), "--download"])
