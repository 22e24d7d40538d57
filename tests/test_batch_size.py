"""utils/batch_size.py: `--batch-size auto`, and steps that processes share anew."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
import torch

from tests.conftest import TINY, run
from tests.test_train import assert_same_weights, segmentation_step, train
from unet.model import UNet
from utils import batch_size
from utils.batch_size import fitting_size, kept_for_backward, shared_anew
from utils.config import TrainConfig
from utils.files import InputError
from utils.helper import load_checkpoint

CUDA = torch.device("cuda")  # that there is none here does not matter


def test_it_is_the_run_with_the_numbers_that_it_finds(prepared, tmp_path, monkeypatch):
    """With memory for five images, the eight that there are make a step in two batches of four."""
    monkeypatch.setattr(batch_size, "fitting_size", lambda *_: 5)
    settings = {"epochs": 2, "patience": 0, "limit": 8}  # 4 dogs and as many cats to train
    auto = train(prepared, tmp_path / "auto", batch_size="auto", **settings)
    kept = json.loads((tmp_path / "auto/config.json").read_text())
    assert (kept["batch_size"], kept["accumulate"]) == (4, 2)
    assert_same_weights(auto, train(prepared, tmp_path / "given", batch_size=4, accumulate=2, **settings))
    monkeypatch.setattr(batch_size, "fitting_size", lambda *_: 1)
    again = train(prepared, tmp_path / "auto", batch_size="auto", **{**settings, "epochs": 3}, resume=True)
    assert again["config"]["batch_size"] == 4, "a resumed run keeps what it had"


@pytest.mark.parametrize(("room", "found"), [(1000, 64), (63, 32), (5, 4)])
def test_halved_until_it_fits(room, found):
    def attempt(size: int) -> None:
        if size > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert fitting_size(attempt, 64, CUDA) == found


def test_not_even_one():
    def attempt(size: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(InputError, match="not even one image fits"):
        fitting_size(attempt, 64, CUDA)


def test_another_error_is_no_lack_of_memory():
    def attempt(size: int) -> None:
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        fitting_size(attempt, 64, CUDA)


def test_a_cpu_counts_what_the_backward_pass_keeps(monkeypatch):
    weight = torch.ones(1000, requires_grad=True)

    def attempt(size: int) -> None:
        (weight * torch.ones(size, 1000)).sum().backward()  # keeps the factors of the weight

    one = kept_for_backward(lambda: attempt(1))
    assert one == 4000
    for free, found in ((2 * 10 * one, 10), (2 * one, 1), (1000 * one, 64)):
        state = namedtuple("memory", "available")(free)
        monkeypatch.setattr(batch_size.psutil, "virtual_memory", lambda state=state: state)
        assert fitting_size(attempt, 64, torch.device("cpu")) == found
    monkeypatch.setattr(batch_size.psutil, "virtual_memory", lambda: namedtuple("memory", "available")(one))
    with pytest.raises(InputError, match="not even one image fits"):
        fitting_size(attempt, 64, torch.device("cpu"))


def test_a_larger_network_keeps_more():
    def kept(channels: int) -> int:
        model = UNet(base_channels=channels)
        batch = {"image": torch.rand(1, 3, 32, 32), "mask": torch.zeros(1, 32, 32, dtype=torch.uint8)}
        return kept_for_backward(lambda: segmentation_step(model, batch).loss.backward())

    assert kept(16) > 2 * kept(4)


@pytest.mark.parametrize(
    ("size", "accumulate", "before", "now", "expected"),
    [(16, 1, 4, 4, (16, 1)), (16, 1, 4, 1, (16, 4)), (64, 1, 1, 4, (16, 1)), (10, 2, 3, 4, (5, 3)), (8, 1, 1, 3, None)],
)
def test_a_step_keeps_its_images(size, accumulate, before, now, expected, monkeypatch):
    monkeypatch.setattr(batch_size, "world", lambda: now)
    kept = {"batch_size": size, "accumulate": accumulate, "environment": {"processes": before}}
    if expected:
        assert shared_anew(kept, TrainConfig()) == expected
    else:
        with pytest.raises(InputError, match=r"the 1 processes of .* made steps of 8 images, which 3 cannot share"):
            shared_anew(kept, TrainConfig())


def test_the_script(prepared, tmp_path):
    flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 1, *TINY, "--batch-size", "auto"]
    result = run("unet/train.py", *flags)
    assert result.returncode == 0 and "1 batches of 14 images make a step" in result.stderr, result.stderr
    assert load_checkpoint(tmp_path / "run/last.pt", "unet")["config"]["batch_size"] == 14
    for flag, message in (
        (["--accumulate", 2], "sets --accumulate itself"),
        (["--batch-size", "some"], "expected 'auto' or a positive"),
    ):
        result = run("unet/train.py", *flags, "--out", tmp_path / "other", *flag)
        assert result.returncode != 0 and message in result.stderr
