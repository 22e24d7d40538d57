"""dataset_prep.py, exploration.py and perturbation.py as scripts: exit codes, interruption, what they write."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from dataset.dataset_prep import prepare
from tests.helpers import ENVIRONMENT, ROOT, SAMPLE, command, fail, left_out, run, succeed
from utils.files import read_json

DOG = "images/synthetic_dog_1.jpg"
PREP = "dataset/dataset_prep.py"


def test_exit_codes_of_the_preparation(base, tmp_path):
    (base / DOG).write_bytes(b"")
    result = succeed(PREP, base, "--processes", 2)
    assert "4 cats, 7 dogs" in result.stdout and f"{DOG}: an empty file" in result.stdout
    result = run(PREP, base, "--strict")
    assert result.returncode == 1 and "nothing to do" in result.stdout and not result.stderr
    (tmp_path / "other").mkdir()
    fail(PREP, tmp_path / "other", message="found: nothing")
    fail(PREP, tmp_path / "missing", message="does not exist", code=2)


def test_synthetic_data_are_drawn_and_prepared_once(tmp_path):
    first, second = (succeed(PREP, tmp_path, "--synthetic", 8, "--processes", 1) for _ in range(2))
    assert "prepared (original layout, SYNTHETIC drawings)" in first.stdout
    assert "already prepared, nothing to do" in second.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_an_interrupted_preparation_is_completed_by_the_next(base, originals, name):
    """Ctrl-C reaches all processes, SIGKILL the parent alone: its workers must not outlive it."""
    with (base / "annotations/trainval.txt").open("a") as file:  # enough files to be interrupted in the middle
        for number in range(600):
            os.link(base / DOG, base / f"images/copy_{number}.jpg")
            os.link(base / "annotations/trimaps/synthetic_dog_1.png", base / f"annotations/trimaps/copy_{number}.png")
            file.write(f"copy_{number} 2 2 2\n")
    process = subprocess.Popen(
        command(PREP, base, "--processes", 2),
        env=ENVIRONMENT, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )  # fmt: skip
    errors = b""
    while not re.search(rb" [1-9]\d*/624", errors):  # the progress bar counts the prepared images
        part = os.read(process.stderr.fileno(), 1000)
        assert part, f"ended before it was interrupted: {errors.decode()}"
        errors += part
    if name == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, rest = process.communicate(timeout=60)  # returns when the last worker has closed its end of the pipe
    assert process.returncode == (130 if name == "SIGINT" else -signal.SIGKILL)
    assert b"Traceback" not in errors + rest
    assert not (base / "prep_report.json").exists()

    reasons = left_out(base)
    assert len(reasons) == 600 and all("same picture as" in reason for reason in reasons.values())
    assert read_json(base / "prep_report.json")["counts"]["TrainVal"] == {"cats": 4, "dogs": 8}
    assert not list(base.rglob("*.tmp"))
    for path in (originals / "images").iterdir():
        assert (base / "images" / path.name).read_bytes() == path.read_bytes(), path.name


def test_exploration_writes_its_figures_and_a_summary(prepared, tmp_path):
    result = succeed("dataset/exploration.py", prepared, "--out", tmp_path)
    written = {path.name for path in tmp_path.iterdir()}
    for name in ("species", "breeds", "sizes", "pixels", "places", "photographs", "augmented"):
        assert f"{name}.png" in written, name
    for name in written:
        assert str(tmp_path / name) in result.stdout, name
        if name.endswith(".png"):
            Image.open(tmp_path / name).verify()
    summary = read_json(tmp_path / "summary.json")
    assert summary["synthetic"] and list(summary["images"]) == ["TrainVal", "Test", "TrainVal, balanced"]
    assert "2 breeds" in result.stdout


def test_exploration_of_one_species_in_one_split(base):
    for path in [*base.rglob("Synthetic_cat_*"), base / "annotations/test.txt"]:
        path.unlink()
    (base / "annotations/test.txt").touch()
    prepare(base)
    succeed("dataset/exploration.py", base)
    summary = read_json(base / "exploration/summary.json")
    assert summary["images"] == {"TrainVal": {"cats": 0, "dogs": 8}}
    assert list(summary["breeds"]) == ["synthetic_dog (dog)"]


def test_perturbation_writes_the_figure_of_a_photograph(prepared, tmp_path):
    out = tmp_path / "figure.png"
    result = succeed("dataset/perturbation.py", prepared, "--image-size", 32, "--out", out)
    Image.open(out).verify()
    assert result.stdout.strip() == str(out)
    fail("dataset/perturbation.py", prepared, "--image", "nobody", message="--image nobody: no image of")


def test_importing_the_augmentation_does_not_use_the_network():
    code = (
        "import socket\n"
        "def refuse(*_, **__): raise SystemExit('tried to reach the network')\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
        "import dataset.augmentation"
    )
    environment = ENVIRONMENT | {"NO_ALBUMENTATIONS_UPDATE": "0"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="the real sample is not here")
def test_the_real_sample_is_prepared(tmp_path):
    base = tmp_path / "sample"
    shutil.copytree(SAMPLE, base, copy_function=os.symlink)
    report, _ = prepare(base, processes=2)
    assert report["counts"] == {"TrainVal": {"cats": 200, "dogs": 100}, "Test": {"cats": 198, "dogs": 100}}
    reasons = {row["file"]: row["reason"] for row in report["left_out"]}
    assert list(reasons) == ["images/Abyssinian_34.jpg", "images/Abyssinian_82.jpg"]
    assert all("in no list" in reason for reason in reasons.values())
    assert [row["file"] for row in report["converted"]] == ["images/Abyssinian_5.jpg"]
    assert not prepare(base)[1]
