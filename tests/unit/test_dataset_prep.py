"""dataset/dataset_prep.py and utils/dataset_prep.py: damaged pictures, copies, interruption, full disks."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset import dataset_prep
from dataset.dataset_prep import prepare
from tests.conftest import DOG, ROOT, SAMPLE, TRIMAP, assert_left_out, left_out, run, state, to_report_layout
from utils.dataset import CLASSES, IGNORE, encode_label
from utils.dataset_prep import draw_points
from utils.files import InputError


def test_points_lie_in_their_class_and_do_not_depend_on_other_files(base):
    prepare(base, processes=1)
    rows = list(csv.DictReader((base / "TrainVal/points.csv").open()))
    assert len(rows) == 24, "a point in the pet and one in the background for each of 12 images"
    for row in rows:
        [path] = (base / "TrainVal/label").glob(f"*/{row['name']}.png")
        assert np.asarray(Image.open(path))[int(row["y"]), int(row["x"])] == CLASSES.index(row["class"])

    (base / "images/Synthetic_cat_1.jpg").unlink()
    prepare(base, processes=2)
    remaining = list(csv.DictReader((base / "TrainVal/points.csv").open()))
    assert remaining == [row for row in rows if row["name"] != "Synthetic_cat_1"]


def test_no_point_is_invented():
    rng = np.random.default_rng(0)
    assert [point[0] for point in draw_points(np.full((4, 5), 2, np.uint8), rng)] == ["dog"]
    assert draw_points(np.full((4, 5), IGNORE, np.uint8), rng) == []


def test_second_run_changes_nothing(base):
    prepare(base)
    before = state(base)
    report, fresh = prepare(base)
    assert not fresh and report["counts"]["Test"]["dogs"] == 8
    assert state(base) == before


def test_lost_and_damaged_outputs_are_made_again(base):
    prepare(base)
    before = {file: content for file, (_, content) in state(base).items()}
    (base / "TrainVal/color/cats/Synthetic_cat_1.jpg").unlink()
    (base / "Test/label/dogs/synthetic_dog_2.png").write_bytes(b"")
    _, fresh = prepare(base)
    assert fresh
    after = {file: content for file, (_, content) in state(base).items()}
    after.pop("prep_report.json"), before.pop("prep_report.json")
    assert after == before


def test_copy_without_its_originals_counts_as_prepared(base, tmp_path):
    prepare(base)
    shutil.rmtree(base / "images")
    shutil.rmtree(base / "annotations")
    report, fresh = prepare(base)
    assert not fresh and report["counts"]["TrainVal"]["cats"] == 4
    (base / "Test/color/cats/Synthetic_cat_2.jpg").unlink()
    with pytest.raises(InputError, match="copy it again, whole"):
        prepare(base)


def test_prepared_files_without_an_original_are_set_aside_not_deleted(base):
    prepare(base)
    content = (base / "images/synthetic_dog_1.jpg").read_bytes()
    (base / "images/synthetic_dog_1.jpg").unlink()
    report, _ = prepare(base)
    assert report["counts"]["TrainVal"]["dogs"] == 7
    assert not (base / "TrainVal/color/dogs/synthetic_dog_1.jpg").exists()
    assert (base / "stale/TrainVal/color/dogs/synthetic_dog_1.jpg").read_bytes() == content
    assert "TrainVal/color/dogs/synthetic_dog_1.jpg" in report["set_aside"]

    Image.new("RGB", (9, 9)).save(base / "TrainVal/color/dogs/synthetic_dog_1.jpg")  # another stray of that name
    prepare(base)
    assert (base / "stale/TrainVal/color/dogs/synthetic_dog_1.jpg").read_bytes() == content
    assert (base / "stale/TrainVal/color/dogs/synthetic_dog_1~.jpg").exists()


def test_without_hard_links_files_are_copied(base, monkeypatch):
    def no_links(*_, **__):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    prepare(base)
    photo = base / "Test/color/dogs/synthetic_dog_2.jpg"
    assert photo.read_bytes() == (base / "images/synthetic_dog_2.jpg").read_bytes()
    assert not photo.samefile(base / "images/synthetic_dog_2.jpg")


def spoil_label(base: Path, name: str, change) -> None:
    path = base / f"annotations/trimaps/{name}.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(change(pixels)).save(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be width x height and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


DAMAGES = {
    "truncated": (lambda b: (b / DOG).write_bytes((b / DOG).read_bytes()[:2000]), DOG, "truncated"),
    "zero bytes": (lambda b: (b / DOG).write_bytes(b""), DOG, "an empty file"),
    "no picture": (lambda b: (b / DOG).write_text("not a picture at all"), DOG, "not a picture"),
    "decompression bomb": (lambda b: (b / DOG).write_bytes(png_header(60_000, 60_000)), DOG, "larger than"),
    "large, below Pillow's error": (lambda b: (b / DOG).write_bytes(png_header(10_000, 10_000)), DOG, "larger than"),
    "other size": (lambda b: spoil_label(b, "synthetic_dog_1", lambda p: p[:-7]), DOG, "its label"),
    "unknown value": (lambda b: spoil_label(b, "synthetic_dog_1", lambda p: np.where(p == 3, 9, p).astype(np.uint8)),
                      DOG, "values [9]"),
    "no pet": (lambda b: spoil_label(b, "synthetic_dog_1", lambda p: np.full_like(p, 2)), DOG, "no pet"),
    "label is no picture": (lambda b: (b / TRIMAP).write_bytes(b"x"),
                            DOG, "its label is not a picture"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_cannot_be_used_is_left_out_and_named(base, kind):
    damage, file, reason = DAMAGES[kind]
    damage(base)
    assert_left_out(base, file, reason)


def test_the_same_picture_in_both_splits_stays_in_test_only(base):
    # Saved anew under another name and format: the pixels are compared, not the file.
    for folder, suffix in (("images", "jpg"), ("annotations/trimaps", "png")):
        Image.open(base / folder / f"synthetic_dog_2.{suffix}").save(base / folder / f"synthetic_dog_1.{suffix}", "PNG")
    assert left_out(base) == {DOG: "same picture as Test synthetic_dog_2"}
    assert not (base / "TrainVal/color/dogs/synthetic_dog_1.jpg").exists()
    assert "synthetic_dog_1," not in (base / "TrainVal/points.csv").read_text()


def test_the_same_picture_twice_in_trainval_is_kept_once(base):
    for folder, suffix in (("images", "jpg"), ("annotations/trimaps", "png")):
        shutil.copy(base / folder / f"synthetic_dog_3.{suffix}", base / folder / f"synthetic_dog_1.{suffix}")
    assert list(left_out(base).values()) == ["same picture as TrainVal synthetic_dog_1"]


def test_both_species_in_one_label(prepared, tmp_path):
    base = to_report_layout(prepared, tmp_path / "base")
    path = base / "Test/label/synthetic_dog_2.png"
    classes = np.array(Image.open(path))
    classes[:5, :5] = 1
    encode_label(classes).save(path)
    assert left_out(base) == {"Test/color/synthetic_dog_2.jpg": "both species in one label"}


def test_pictures_under_a_wrong_suffix_are_converted(base):
    rgb = np.asarray(Image.open(base / DOG))
    Image.fromarray(rgb).convert("RGBA").save(base / DOG, "PNG")
    Image.open(base / "images/synthetic_dog_3.jpg").convert("P").save(base / "images/synthetic_dog_3.jpg", "GIF")
    original = (base / DOG).read_bytes()
    report, _ = prepare(base)
    assert [row["file"] for row in report["converted"]] == [DOG, "images/synthetic_dog_3.jpg"]
    stored = Image.open(base / "TrainVal/color/dogs/synthetic_dog_1.jpg")
    assert stored.format == "JPEG" and stored.mode == "RGB"
    assert np.abs(np.asarray(stored).astype(int) - rgb).mean() < 3
    assert (base / DOG).read_bytes() == original


def test_sixteen_bit_grey_keeps_its_contrast(base):
    rgb = Image.open(base / DOG).convert("L")
    Image.fromarray(np.asarray(rgb).astype(np.uint16) * 257).save(base / DOG, "PNG")
    prepare(base)
    stored = np.asarray(Image.open(base / "TrainVal/color/dogs/synthetic_dog_1.jpg").convert("L")).astype(int)
    assert np.abs(stored - np.asarray(rgb)).mean() < 3


def test_a_species_without_an_image_is_a_warning(base):
    for path in (base / "images").glob("Synthetic_cat_*"):
        path.unlink()
    report, _ = prepare(base)
    assert report["warnings"] == ["TrainVal holds no cats", "Test holds no cats"]


def test_exit_codes(base, tmp_path):
    assert run("dataset/dataset_prep.py", base, "--processes", 2).returncode == 0
    (base / DOG).write_bytes(b"")
    result = run("dataset/dataset_prep.py", base)
    assert result.returncode == 0 and f"{DOG}: an empty file" in result.stdout
    assert run("dataset/dataset_prep.py", base, "--strict").returncode == 1

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").touch()
    for arguments, code, message in [
        ([], 2, "required: BASE_DIR"),
        ([tmp_path / "missing"], 2, "does not exist"),
        ([tmp_path / "file"], 2, "is not a directory"),
        ([tmp_path / "empty"], 1, "found: nothing"),
        ([tmp_path / "other"], 1, "found: holiday.jpg"),
        ([base, "--frobnicate"], 2, "unrecognized"),
        ([base, "--processes", 0], 2, "--processes"),
        ([base, "--synthetic", 3], 2, "at least 8"),
        ([base, "--synthetic", 24, "--download"], 2, "not allowed with"),
    ]:
        result = run("dataset/dataset_prep.py", *arguments)
        assert (result.returncode, message in result.stderr) == (code, True), (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_nothing_usable_is_exit_code_1(base):
    for path in (base / "images").iterdir():
        path.write_bytes(b"")
    result = run("dataset/dataset_prep.py", base)
    assert result.returncode == 1 and "0 cats, 0 dogs" in result.stdout


def test_a_full_disk_is_an_error_and_loses_nothing(base, monkeypatch, capsys):
    before = state(base)
    written = []

    def full(path, content):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr(dataset_prep, "write_bytes", full)
    with pytest.raises(InputError, match=r"No space left on device.*run again"):
        dataset_prep.main([str(base), "--processes", "1"])
    assert not (base / "prep_report.json").exists(), "half prepared is not prepared"
    assert {file: content for file, content in state(base).items() if file in before} == before
    assert not list(base.rglob("*.tmp"))
    monkeypatch.undo()
    assert dataset_prep.main([str(base), "--processes", "1"]) == 0


def test_without_write_permission(base, monkeypatch):
    def denied(path, content):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(dataset_prep, "write_bytes", denied)
    with pytest.raises(InputError, match=r"Permission denied.*change the permissions"):
        dataset_prep.main([str(base), "--processes", "1"])


def add_copies(base: Path, count: int) -> None:
    """Enough work for a preparation to be interrupted."""
    with (base / "annotations/trainval.txt").open("a") as file:
        for number in range(count):
            os.link(base / DOG, base / f"images/copy_{number}.jpg")
            os.link(base / TRIMAP, base / f"annotations/trimaps/copy_{number}.png")
            file.write(f"copy_{number} 2 2 2\n")


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_and_run_again(base, originals, kill):
    add_copies(base, 600)
    command = [sys.executable, str(ROOT / "dataset/dataset_prep.py"), str(base), "--processes", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # a job in the background ignores it
    )
    while not (base / "TrainVal").exists() and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, kill)
    _, errors = process.communicate()
    assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL)
    assert b"Traceback" not in errors
    assert not (base / "prep_report.json").exists()
    report, _ = prepare(base, processes=2)
    assert report["counts"]["TrainVal"] == {"cats": 4, "dogs": 8}, "the copies are left out"
    for path in (originals / "images").iterdir():
        assert (base / "images" / path.name).read_bytes() == path.read_bytes()


def test_workers_do_not_outlive_a_killed_parent(base):
    add_copies(base, 600)
    command = [sys.executable, str(ROOT / "dataset/dataset_prep.py"), str(base), "--processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (base / "TrainVal").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)  # ends when the last worker has closed its end of the pipes


def test_synthetic_is_drawn_once_and_never_mixed(tmp_path, base):
    target = tmp_path / "drawn"
    assert run("dataset/dataset_prep.py", target, "--synthetic", 8).returncode == 0
    before = state(target)
    result = run("dataset/dataset_prep.py", target, "--synthetic", 8)
    assert result.returncode == 0 and "SYNTHETIC" in result.stdout
    assert state(target) == before
    assert "use another folder" in run("dataset/dataset_prep.py", target, "--synthetic", 9).stderr
    (base / "SYNTHETIC.txt").unlink()
    assert "holds other data" in run("dataset/dataset_prep.py", base, "--synthetic", 24).stderr


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the real sample is not here")
def test_real_sample(tmp_path):
    base = tmp_path / "sample"
    shutil.copytree(SAMPLE, base, copy_function=os.symlink)
    report, _ = prepare(base, processes=2)
    assert report["counts"] == {"TrainVal": {"cats": 200, "dogs": 100}, "Test": {"cats": 198, "dogs": 100}}
    reasons = {row["file"]: row["reason"] for row in report["left_out"]}
    assert list(reasons) == ["images/Abyssinian_34.jpg", "images/Abyssinian_82.jpg"]
    assert all("in no list" in reason for reason in reasons.values())
    assert [row["file"] for row in report["converted"]] == ["images/Abyssinian_5.jpg"]
    assert not prepare(base)[1]
