"""utils/distributed.py: devices, and what the ranks of a group exchange. tests/scripts starts several processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoencoder.model import Autoencoder, AutoencoderSegmenter
from tests.helpers import CPU
from unet.model import UNet
from utils import distributed
from utils.distributed import all_gather_objects, all_reduce_sum, pick_device
from utils.files import InputError
from utils.train import convert_sync_batchnorm

CUDA = torch.device("cuda")  # no GPU is needed for it


def test_absent_device_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: this machine has none"):
            pick_device("cuda")
    assert pick_device("cpu") == CPU


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto").type == "cuda"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(InputError, match=r"2 processes were started on this machine, which has 1 for --device cuda"):
        pick_device("auto")


def test_alone_a_process_is_rank_0_of_1():
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert all_reduce_sum(torch.tensor([1, 2])).tolist() == [1, 2]
    assert all_gather_objects(("a", "b")) == ["a", "b"]


def test_batch_norm_is_over_the_images_of_all_gpus(monkeypatch):
    def norms(model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]

    monkeypatch.setattr("utils.train.world_size", lambda: 2)
    unet = UNet(base_channels=2)
    names = list(unet.state_dict())
    model = convert_sync_batchnorm(unet, CUDA)
    assert {type(norm) for norm in norms(model)} == {nn.SyncBatchNorm} and list(model.state_dict()) == names
    frozen = convert_sync_batchnorm(AutoencoderSegmenter(Autoencoder(base_channels=2).encoder, 3), CUDA).train()
    assert norms(frozen.encoder) and not any(norm.training for norm in norms(frozen.encoder)), "frozen statistics stay"
    assert {type(norm) for norm in norms(convert_sync_batchnorm(UNet(base_channels=2), CPU))} == {nn.BatchNorm2d}
    monkeypatch.undo()
    assert {type(norm) for norm in norms(convert_sync_batchnorm(UNet(base_channels=2), CUDA))} == {nn.BatchNorm2d}
