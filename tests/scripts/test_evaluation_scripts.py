"""test.py from outside: where it writes, at which size it scores, and what it does with photographs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.perturbation import PERTURBATIONS
from dataset.pet import find_records
from tests.helpers import fail, run, succeed
from utils.dataset import PETS
from utils.files import read_csv, read_json

SCRIPT = "unet/test.py"


def test_scores_are_written_beside_the_checkpoint_or_to_out(prepared, trained, tmp_path):
    """Also with worker processes, at another size, with fewer images, and under all perturbations."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    flags = ["--checkpoint", folder / "last.pt", "--data", prepared, "--device", "cpu"]
    succeed(SCRIPT, *flags, "--workers", 1)
    metrics = read_json(folder / "test/metrics.json")
    assert metrics["score_size"] == "native" and metrics["images"] == len(find_records(prepared, "Test"))
    assert metrics["epoch"] == 2 and not (folder / "test/robustness.json").exists()

    out = tmp_path / "other"
    result = succeed(
        SCRIPT, *flags, "--out", out, "--score-size", 64, "--limit", 3, "--batch-size", 1, "--split", "TrainVal",
        "--perturb", "--workers", 0,
    )  # fmt: skip
    metrics = read_json(out / "metrics.json")
    assert metrics["score_size"] == 64 and metrics["images"] == 3 and 0 < metrics["pixels"] <= 3 * 64 * 64
    names = {record.name for record in find_records(prepared, "TrainVal")}
    assert {row["name"] for row in read_csv(out / "images.csv")} < names
    for path in (out / "masks").iterdir():
        with Image.open(path) as mask:
            assert mask.size == (64, 64)
    assert list(read_json(out / "robustness.json")["perturbations"]) == list(PERTURBATIONS)
    levels = {(row["perturbation"], row["level"], row["amount"]) for row in read_csv(out / "robustness.csv")}
    assert levels == {
        (name, str(level), str(amount))
        for name, perturbation in PERTURBATIONS.items()
        for level, amount in enumerate(perturbation.amounts)
    }
    assert "retained mean Dice, %" in result.stdout and "synthetic" in result.stdout
    for name in ("metrics.json", "confusion.png", "predictions.png", "robustness.csv", "robustness.png"):
        assert str(out / name) in result.stdout and (out / name).is_file(), name


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder of pictures in several modes, two of one name, one with an EXIF orientation, and a text file."""
    folder = tmp_path / "photographs"
    (folder / "below").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.jpg")
    Image.fromarray(pixels).convert("RGBA").save(folder / "a.png")
    Image.fromarray(pixels[..., 0]).save(folder / "below/grey.png")
    rotated = Image.fromarray(pixels)
    exif = rotated.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees to show it upright
    rotated.save(folder / "rotated.jpg", exif=exif)
    (folder / "notes.txt").write_text("not a picture, left alone")
    return folder


def test_photographs_in_folders_get_masks_at_their_own_size(trained, photographs):
    """The masks are written into the folder, and are not segmented when the script is run again."""
    flags = [SCRIPT, "--checkpoint", trained / "best.pt", "--device", "cpu"]
    out = photographs / "masks"
    for _ in range(2):
        result = succeed(*flags, "--images", photographs, "--out", out)
        assert f"4 pictures segmented: {out}" in result.stdout
    sizes = {}
    for path in out.rglob("*_mask.png"):
        overlay_path = path.with_name(path.name.replace("_mask.png", "_overlay.jpg"))
        with Image.open(path) as mask, Image.open(overlay_path) as overlay:
            assert mask.mode == "P" and mask.size == overlay.size
            assert PETS.decode_label(mask).max() < len(PETS)
            sizes[path.relative_to(out).as_posix().removesuffix("_mask.png")] = mask.size
    assert sizes == {"a.jpg": (90, 60), "a.png": (90, 60), "below/grey": (90, 60), "rotated": (60, 90)}
    assert len([path for path in out.rglob("[!.]*") if path.is_file()]) == 2 * len(sizes) + 1, "and index.csv"

    (photographs / "broken.jpg").write_bytes(b"\xff\xd8 broken")
    result = run(*flags, "--images", photographs, "--out", out)
    assert result.returncode == 1 and "4 pictures segmented" in result.stderr
    assert f"could not be segmented:\n  {photographs / 'broken.jpg'}: " in result.stderr
    fail(*flags, "--images", photographs / "below", "--out", photographs, message="choose another --out")
    fail(*flags, "--images", photographs / "nowhere", message="nowhere: no such file or folder")
