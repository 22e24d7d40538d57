"""utils/batch_size.py: `--batch-size auto`, and steps that processes share anew."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, TINY, run
from tests.unit.test_train import assert_same_weights, segmentation_step, train
from unet.model import UNet
from utils import batch_size
from utils.batch_size import Cut, divisors, fitting_size, kept_for_backward, share_anew
from utils.files import InputError

CUDA = torch.device("cuda")  # that there is none here does not matter


def test_it_is_the_run_with_the_numbers_that_it_finds(prepared, tmp_path, monkeypatch):
    """With memory for five images, the eight that there are make a step in two batches of four."""
    monkeypatch.setattr(batch_size, "fitting_size", lambda attempt, sizes, device: max(s for s in sizes if s <= 5))
    settings = {"epochs": 2, "patience": 0, "limit": 8}  # 4 dogs and as many cats to train
    auto = train(prepared, tmp_path / "auto", batch_size="auto", **settings)
    kept = json.loads((tmp_path / "auto/config.json").read_text())
    assert kept["batch_size"] == "auto" and kept["step"] == {"batch_size": 4, "accumulate": 2, "processes": 1}
    assert_same_weights(auto, train(prepared, tmp_path / "given", batch_size=4, accumulate=2, **settings))
    monkeypatch.setattr(batch_size, "fitting_size", lambda *_: 1)
    train(prepared, tmp_path / "auto", batch_size="auto", **{**settings, "epochs": 3}, resume=True)
    again = json.loads((tmp_path / "auto/config.json").read_text())
    assert again["step"] == kept["step"], "a resumed run keeps what it had"


@pytest.mark.parametrize(("room", "found"), [(1000, 64), (70, 32), (5, 4)])
def test_halved_until_it_fits(room, found):
    def attempt(size: int) -> None:
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert fitting_size(attempt, divisors(64), CUDA) == found


def test_not_even_one():
    def attempt(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(InputError, match="not even one image fits"):
        fitting_size(attempt, divisors(64), CUDA)


def test_another_error_is_no_lack_of_memory():
    def attempt(size: int) -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        fitting_size(attempt, divisors(64), CUDA)


def test_a_cpu_counts_what_the_backward_pass_keeps(monkeypatch):
    weight = torch.ones(1000, requires_grad=True)

    def attempt(size: int) -> None:
        (weight * torch.ones(size, 1000)).sum().backward()  # keeps the factors of the weight
        (weight * weight).sum().backward()  # and the weight, once

    one = 4000
    assert kept_for_backward(lambda: attempt(1)) == 2 * one
    for free, found in ((2 * 10 * one, 8), (2 * one, 1), (1000 * one, 64)):
        state = namedtuple("memory", "available")(free)
        monkeypatch.setattr(batch_size.psutil, "virtual_memory", lambda state=state: state)
        assert fitting_size(attempt, divisors(64), torch.device("cpu")) == found
    monkeypatch.setattr(batch_size.psutil, "virtual_memory", lambda: namedtuple("memory", "available")(one))
    with pytest.raises(InputError, match="not even one image fits"):
        fitting_size(attempt, divisors(64), torch.device("cpu"))


def test_a_larger_network_keeps_more():
    def kept(channels: int) -> int:
        model = UNet(base_channels=channels)
        batch = {"image": torch.rand(1, 3, 32, 32), "mask": torch.zeros(1, 32, 32, dtype=torch.uint8)}
        return kept_for_backward(lambda: segmentation_step(model, batch).loss.backward())

    assert kept(16) > 2 * kept(4)


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ((16, 1, 4), 4, (16, 1)), ((16, 1, 4), 1, (16, 4)), ((64, 1, 1), 4, (16, 1)), ((10, 2, 3), 4, (5, 3)),
        ((4, 1, 5), 4, (5, 1)), ((8, 1, 1), 3, None),
    ],
)  # fmt: skip
def test_a_step_keeps_its_images(before, now, expected, monkeypatch):
    monkeypatch.setattr(batch_size, "world", lambda: now)
    if expected:
        assert share_anew(Cut(*before), Path("run")) == (*expected, now)
    else:
        with pytest.raises(InputError, match=r"1 processes made steps of 8 images in run, which 3 cannot share evenly"):
            share_anew(Cut(*before), Path("run"))


AUTOENCODER_STAGES = """
import sys

sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, sys.argv.pop(1))
from utils import batch_size
from utils.config import run_script

batch_size.fitting_size = lambda attempt, sizes, device: max(size for size in sizes if size <= 4)
from autoencoder.train import main

run_script(main)
"""


def test_both_stages_of_the_autoencoder_make_the_same_steps(prepared, tmp_path):
    (tmp_path / "few.py").write_text(AUTOENCODER_STAGES)
    flags = ["--data", prepared, "--epochs", 1, "--pretrain-epochs", 1, *TINY, "--out"]
    result = run(tmp_path / "few.py", "autoencoder/train.py", ROOT, *flags, tmp_path / "auto", "--batch-size", "auto")
    assert result.returncode == 0, result.stderr
    for stage in ("reconstruction", "segmentation"):
        step = json.loads((tmp_path / "auto" / stage / "config.json").read_text())["step"]
        assert step == {"batch_size": 2, "accumulate": 7, "processes": 1}, "of 14 images"


def test_the_script(prepared, tmp_path):
    flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 1, *TINY, "--batch-size", "auto"]
    result = run("unet/train.py", *flags)
    assert result.returncode == 0 and "Cut(batch_size=14, accumulate=1, processes=1)" in result.stderr, result.stderr
    again = run("unet/train.py", *flags, "--resume")
    assert again.returncode == 0, again.stderr
    for flag, message in (
        (["--accumulate", 2], "sets --accumulate itself"),
        (["--batch-size", "some"], "expected 'auto' or a positive"),
    ):
        result = run("unet/train.py", *flags, "--out", tmp_path / "other", *flag)
        assert result.returncode != 0 and message in result.stderr
