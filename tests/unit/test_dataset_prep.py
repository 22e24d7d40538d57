"""dataset/dataset_prep.py: damaged pictures, copies, second runs, full disks; points."""

import errno
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import dataset_prep, pairs
from dataset.dataset_prep import prepare
from tests.helpers import left_out, state, to_report_layout
from utils.dataset import IGNORE, PETS
from utils.dataset_prep import sample_points
from utils.files import InputError, read_csv

DOG = "images/synthetic_dog_1.jpg"


def contents(base):
    """The content of every file but the report, which holds times."""
    return {file: content for file, (_, content) in state(base).items() if file != "prep_report.json"}


def test_points_are_in_their_class_and_do_not_depend_on_other_files(base):
    prepare(base)
    rows = read_csv(base / "TrainVal/points.csv")
    labels = {path.stem: np.asarray(Image.open(path)) for path in (base / "TrainVal/label").glob("*/*.png")}
    assert len(rows) == 2 * len(labels), "a point on the pet and one on the background of each image"
    for row in rows:
        assert labels[row["name"]][int(row["y"]), int(row["x"])] == PETS.value(row["class"]), row

    assert prepare(base, seed=1)[1] and read_csv(base / "TrainVal/points.csv") != rows, "another seed, other points"
    (base / "images/Synthetic_cat_1.jpg").unlink()
    prepare(base, processes=2)
    assert read_csv(base / "TrainVal/points.csv") == [row for row in rows if row["name"] != "Synthetic_cat_1"]


def test_a_class_without_pixels_has_no_point():
    rng = np.random.default_rng(0)
    assert [point[0] for point in sample_points(np.full((4, 5), 2, np.uint8), PETS, rng)] == ["dog"]
    assert sample_points(np.full((4, 5), IGNORE, np.uint8), PETS, rng) == []


def test_a_second_run_changes_nothing_and_damaged_outputs_are_restored(base):
    prepare(base)
    before = state(base)
    report, fresh = prepare(base)
    assert not fresh and report["counts"]["Test"]["dogs"] == 8
    assert state(base) == before

    expected = contents(base)
    (base / "TrainVal/color/cats/Synthetic_cat_1.jpg").unlink()
    (base / "Test/label/dogs/synthetic_dog_2.png").write_bytes(b"")
    _, fresh = prepare(base)
    assert fresh and contents(base) == expected


def test_a_copy_without_its_originals_counts_as_prepared(prepared, tmp_path):
    base = shutil.copytree(prepared, tmp_path / "base", ignore=shutil.ignore_patterns("images", "annotations"))
    report, fresh = prepare(base)
    assert not fresh and report["counts"]["TrainVal"]["cats"] == 4
    (base / "Test/color/cats/Synthetic_cat_2.jpg").unlink()
    with pytest.raises(InputError, match="copy the whole folder again"):
        prepare(base)


def test_prepared_files_without_an_original_are_moved_not_deleted(base):
    prepare(base)
    content = (base / DOG).read_bytes()
    (base / DOG).unlink()
    report, _ = prepare(base)
    assert report["counts"]["TrainVal"]["dogs"] == 7
    prepared = "TrainVal/color/dogs/synthetic_dog_1.jpg"
    assert not (base / prepared).exists() and prepared in report["set_aside"]
    assert (base / "stale" / prepared).read_bytes() == content

    Image.new("RGB", (9, 9)).save(base / prepared)  # another file of that name
    prepare(base)
    assert (base / "stale" / prepared).read_bytes() == content
    assert (base / "stale/TrainVal/color/dogs/synthetic_dog_1~.jpg").exists()


def test_without_hard_links_files_are_copied(base, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    prepare(base)
    photo = base / "TrainVal/color/dogs/synthetic_dog_1.jpg"
    assert photo.read_bytes() == (base / DOG).read_bytes() and not photo.samefile(base / DOG)


def change_trimap(base, name, change):
    path = base / f"annotations/trimaps/{name}.png"
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def empty_png(edge):
    """A PNG whose header says edge x edge, with almost no content."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


# What happens to an image or its trimap, and the reason in the report.
DAMAGES = {
    "synthetic_dog_1": (lambda b, f: f.write_bytes(f.read_bytes()[:2000]), "truncated"),
    "synthetic_dog_2": (lambda b, f: f.write_bytes(b""), "an empty file"),
    "synthetic_dog_3": (lambda b, f: f.write_text("not a picture at all"), "not a picture"),
    "synthetic_dog_4": (lambda b, f: f.write_bytes(empty_png(60_000)), "larger than"),
    "synthetic_dog_5": (lambda b, f: f.write_bytes(empty_png(10_000)), "larger than"),
    "synthetic_dog_6": (lambda b, f: change_trimap(b, f.stem, lambda p: p[:-7]), "its label"),
    "synthetic_dog_7": (lambda b, f: change_trimap(b, f.stem, lambda p: np.where(p == 3, 9, p).astype(np.uint8)),
                        "belong to no class: 9 ("),
    "synthetic_dog_8": (lambda b, f: change_trimap(b, f.stem, lambda p: np.full_like(p, 2)), "no pet"),
    "synthetic_dog_9": (lambda b, f: (b / f"annotations/trimaps/{f.stem}.png").write_bytes(b"x"),
                        "not a picture"),
}  # fmt: skip


def test_unusable_files_are_left_out_with_the_reason(base):
    images = {path.stem for path in (base / "images").iterdir()}
    for name, (damage, _) in DAMAGES.items():
        damage(base, base / f"images/{name}.jpg")
    reasons = left_out(base)
    files = {name: f"images/{name}.jpg" for name in DAMAGES}
    files |= {name: f"annotations/trimaps/{name}.png" for name in list(DAMAGES)[-3:]}  # the label is to blame
    assert set(reasons) == set(files.values())
    for name, (_, expected) in DAMAGES.items():
        assert expected in reasons[files[name]], name
    for kind in ("color", "label"):
        assert {path.stem for path in base.glob(f"*/{kind}/*/*")} == images - set(DAMAGES)


def refuse(path, *_):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def test_a_file_that_cannot_be_read_is_tried_again_next_time(base, monkeypatch, capsys):
    original, name = Image.open, Path(DOG).name
    monkeypatch.setattr(Image, "open", lambda path: refuse(path) if path.name == name else original(path))
    assert dataset_prep.main([str(base), "--processes", "1"]) == 1
    assert f"FAILED: {DOG}: cannot be read (Permission denied)" in capsys.readouterr().out
    assert len(list(base.glob("*/color/*/*.jpg"))) == len(list((base / "images").iterdir())) - 1, "the rest is done"
    monkeypatch.undo()
    assert dataset_prep.main([str(base), "--processes", "1"]) == 0
    assert left_out(base) == {} and (base / f"TrainVal/color/dogs/{name}").exists()


def test_the_same_picture_in_both_splits_stays_in_test_only(base):
    # Saved again under another name and in another format, because pixels are compared, not files.
    for folder, suffix in (("images", "jpg"), ("annotations/trimaps", "png")):
        Image.open(base / folder / f"synthetic_dog_2.{suffix}").save(base / folder / f"synthetic_dog_1.{suffix}", "PNG")
    assert left_out(base) == {DOG: "same picture as Test synthetic_dog_2"}
    assert (base / "Test/color/dogs/synthetic_dog_2.jpg").exists()
    assert not (base / "TrainVal/color/dogs/synthetic_dog_1.jpg").exists()
    assert "synthetic_dog_1," not in (base / "TrainVal/points.csv").read_text()


def test_the_same_picture_twice_in_trainval_is_kept_once(base):
    for folder, suffix in (("images", "jpg"), ("annotations/trimaps", "png")):
        shutil.copy(base / folder / f"synthetic_dog_3.{suffix}", base / folder / f"synthetic_dog_1.{suffix}")
    assert list(left_out(base).values()) == ["same picture as TrainVal synthetic_dog_1"]


def test_a_label_with_two_species_is_left_out(prepared, tmp_path):
    base = to_report_layout(prepared, tmp_path / "base")
    path = base / "Test/label/synthetic_dog_2.png"
    classes = np.array(Image.open(path))
    classes[:5, :5] = 1
    PETS.encode_label(classes).save(path)
    assert left_out(base) == {"Test/label/synthetic_dog_2.png": "cats and dogs in one label"}


def test_pictures_in_other_formats_are_converted(base):
    dog, other, grey = (base / f"images/synthetic_dog_{number}.jpg" for number in (1, 3, 5))
    rgb = {path.stem: np.asarray(Image.open(path)).astype(int) for path in (dog, grey)}
    Image.open(dog).convert("RGBA").save(dog, "PNG")
    Image.open(other).convert("P").save(other, "GIF")
    luma = np.asarray(Image.open(grey).convert("L"))
    rgb[grey.stem] = np.repeat(luma[..., None], 3, axis=2).astype(int)
    Image.fromarray(luma.astype(np.uint16) * 257).save(grey, "PNG")  # 16 bits: the contrast must not be lost
    original = dog.read_bytes()
    report, _ = prepare(base)
    assert [row["file"] for row in report["converted"]] == [f"images/{path.name}" for path in (dog, other, grey)]
    for name, expected in rgb.items():
        stored = Image.open(base / f"TrainVal/color/dogs/{name}.jpg")
        assert stored.format == "JPEG" and stored.mode == "RGB", name
        assert np.abs(np.asarray(stored).astype(int) - expected).mean() < 3, name
    assert dog.read_bytes() == original


def test_missing_species_are_a_warning_and_missing_images_an_error(base, capsys):
    for path in (base / "images").glob("Synthetic_cat_*"):
        path.unlink()
    report, _ = prepare(base)
    assert [text.split(";")[0] for text in report["warnings"]] == ["TrainVal holds no cats", "Test holds no cats"]
    for path in (base / "images").iterdir():
        path.write_bytes(b"")
    assert dataset_prep.main([str(base), "--processes", "1"]) == 1
    assert capsys.readouterr().out.count("0 cats, 0 dogs") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: BASE_DIR"),
        (["file"], "is not a directory"),
        (["folder", "--frobnicate"], "unrecognized"),
        (["folder", "--processes", "0"], "--processes: expected at least 1"),
        (["folder", "--seed", "-1"], "--seed: expected at least 0"),
        (["folder", "--synthetic", "3"], "--synthetic: expected at least 8"),
        (["folder", "--synthetic", "24", "--download"], "give one of them"),
    ],
)
def test_wrong_arguments_are_exit_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(SystemExit) as error:
        dataset_prep.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_is_an_error_and_loses_nothing(base, monkeypatch):
    before = state(base)
    prepare(base)
    shutil.rmtree(base / "TrainVal/label")
    written = []

    def fill_disk(path, content):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr(pairs, "write_bytes", fill_disk)
    with pytest.raises(InputError, match=r"No space left on device.*run again"):
        dataset_prep.main([str(base), "--processes", "1"])
    assert not (base / "prep_report.json").exists(), "half of the files do not count as prepared"
    assert {file: content for file, content in state(base).items() if file in before} == before
    assert not list(base.rglob("*.tmp"))
    monkeypatch.undo()
    assert dataset_prep.main([str(base), "--processes", "1"]) == 0


def test_missing_write_permission_is_an_error(base, monkeypatch):
    monkeypatch.setattr(pairs, "write_bytes", refuse)
    with pytest.raises(InputError, match=r"Permission denied.*change the permissions"):
        dataset_prep.main([str(base), "--processes", "1"])
