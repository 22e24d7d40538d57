"""Fixtures that all tests share. WITHOUT_FCNTL=1 blocks the Unix-only module, as on Windows."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: more threads only wait for each other
if os.environ.get("WITHOUT_FCNTL"):
    sys.modules["fcntl"] = None

import pytest
import torch
from hypothesis import settings

from tests.helpers import TINY, TINY_CLIP, UNET_ARGS, succeed
from tests.launcher import share_no_progress_lock

settings.register_profile("tests", deadline=None)  # a busy machine is not a failure
settings.load_profile("tests")
if hasattr(os, "fork"):
    share_no_progress_lock()


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 drawn pets in the original layout; read only."""
    from dataset.synthetic import draw_dataset

    base = tmp_path_factory.mktemp("originals")
    draw_dataset(base, 24, seed=0)
    return base


@pytest.fixture
def base(originals: Path, tmp_path: Path) -> Path:
    """A copy of `originals` to modify."""
    return Path(shutil.copytree(originals, tmp_path / "base"))


@pytest.fixture(scope="session")
def prepared(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`originals`, prepared: 4 cats and 8 dogs in each split; read only, except for the cache."""
    from dataset.dataset_prep import prepare

    base = Path(shutil.copytree(originals, tmp_path_factory.mktemp("prepared") / "data"))
    prepare(base)
    return base


@pytest.fixture
def records(prepared: Path) -> list:
    """The test images of `prepared`, as `dataset.pet.Record`."""
    from dataset.pet import find_records

    return find_records(prepared, "Test")


@pytest.fixture
def model() -> torch.nn.Module:
    """A tiny U-Net with random weights, in eval mode."""
    from unet.model import UNet

    torch.manual_seed(0)
    return UNet(**UNET_ARGS).eval()


@pytest.fixture(scope="session")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny U-Net, trained for two epochs by the script."""
    out = tmp_path_factory.mktemp("runs") / "unet"
    succeed("unet/train.py", "--data", prepared, "--out", out, "--epochs", 2, *TINY)
    return out


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP vision transformer with random weights, as transformers saves one: 4 x 4 patches of 8 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).save_pretrained(folder)
    return folder


@pytest.fixture
def predictor():
    """A predictor with a tiny untrained U-Net at 32x32 pixels."""
    from unet.model import UNet
    from utils.dataset import PETS
    from utils.predictor import Predictor

    checkpoint = {"class_table": PETS.as_plain_dict(), "config": {"image_size": 32}}
    return Predictor(UNet(base_channels=2).eval(), checkpoint)
