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

settings.register_profile("tests", deadline=None)  # a busy machine is no failure
settings.load_profile("tests")
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT.parent / "shared" / "oxford-pets-sample"  # 600 photographs of Oxford-IIIT Pet in its original layout
TINY = ["--image-size", "32", "--base-channels", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


def run(*command: object, cwd: Path | None = None, module: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository as a user would, from another folder and without PYTHONPATH."""
    script, *arguments = map(str, command)
    target = ["-m", script] if module else [str(ROOT / script)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
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
