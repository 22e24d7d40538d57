"""What the tests share: a drawn and prepared data set, runs of the scripts, and the real sample where it is present."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from PIL import Image

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT.parent / "shared" / "oxford-pets-sample"  # 600 photographs of Oxford-IIIT Pet in its original layout
TINY_CLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TINY = ["--image-size", "32", "--base-channels", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


def run(*command: object, cwd: Path | None = None, module: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository as a user would, from another folder and without PYTHONPATH."""
    script, *arguments = map(str, command)
    target = ["-m", script] if module else [str(ROOT / script)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *target, *arguments], cwd=cwd or Path("/"), env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 drawn pets in the original layout; read only."""
    from dataset.synthetic import draw_dataset

    base = tmp_path_factory.mktemp("originals")
    draw_dataset(base, 24, seed=0)
    return base


@pytest.fixture
def base(originals: Path, tmp_path: Path) -> Path:
    """A copy of `originals` to spoil."""
    return Path(shutil.copytree(originals, tmp_path / "base"))


@pytest.fixture(scope="session")
def prepared(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`originals`, prepared: 4 cats and 8 dogs in each split; read only, but for the cache."""
    from dataset.dataset_prep import prepare

    base = Path(shutil.copytree(originals, tmp_path_factory.mktemp("prepared") / "data"))
    prepare(base)
    return base


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny U-Net, trained for two epochs by the script."""
    out = tmp_path_factory.mktemp("runs") / "unet"
    result = run("unet/train.py", "--data", prepared, "--out", out, "--epochs", 2, *TINY)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP vision transformer with random weights, as transformers saves one: 4 x 4 patches of 8 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).save_pretrained(folder)
    return folder


DOG = "images/synthetic_dog_1.jpg"  # the picture that tests spoil
TRIMAP = "annotations/trimaps/synthetic_dog_1.png"


def left_out(base: Path) -> dict[str, str]:
    """Prepare `base`; what was left out, with the reasons."""
    from dataset.dataset_prep import prepare

    report, _ = prepare(base)
    return {row["file"]: row["reason"] for row in report["left_out"]}


def to_report_layout(base: Path, target: Path, mode: str = "P") -> Path:
    """Copy a prepared folder into the report's layout: flat color/ and label/, labels saved in `mode`."""
    for split in ("TrainVal", "Test"):
        for kind in ("color", "label"):
            (target / split / kind).mkdir(parents=True)
        for path in (base / split / "color").rglob("*.jpg"):
            shutil.copy(path, target / split / "color")
        for path in (base / split / "label").rglob("*.png"):
            Image.open(path).convert(mode).save(target / split / "label" / path.name)
    return target


def assert_left_out(base: Path, file: str, reason: str) -> None:
    """Prepare `base`: `file` is left out for `reason`, and of the other dogs of TrainVal all are kept."""
    assert reason in left_out(base)[file]
    kept = {path.stem for path in (base / "TrainVal/color/dogs").iterdir()}
    others = {f"synthetic_dog_{number}" for number in range(3, 17, 2)}
    assert others <= kept, "the others are all there"
    assert ("synthetic_dog_1" in kept) == (file != DOG and "without an image" not in reason)


def state(base: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file."""
    return {
        str(path.relative_to(base)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(base.rglob("*")) if path.is_file()
    }  # fmt: skip
