"""One contract over all models: images in [0, 1] of any size in, logits of that size out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from autoencoder.model import build_segmenter
from clip_seg.model import build_segmenter as build_clip_segmenter
from tests.conftest import TINY_CLIP
from unet.model import UNet
from utils.helper import load_model, save_checkpoint
from utils.loss import cross_entropy

CLIP = {
    "clip_model": "none", "architecture": TINY_CLIP, "image_size": 32, "frozen": False, "weights_hash": None,
}  # fmt: skip

# name -> (class, arguments of a tiny one)
MODELS: dict[str, tuple[Callable[..., nn.Module], dict]] = {
    "unet": (UNet, {"base_channels": 4}),
    "autoencoder": (build_segmenter, {"base_channels": 16}),
    "clip_seg": (build_clip_segmenter, {"encoder": CLIP | {"image_size": 64}, "base_channels": 8}),
    "clip_seg-frozen-skips": (
        build_clip_segmenter,
        {"encoder": CLIP | {"frozen": True}, "base_channels": 8, "skips": True},
    ),
    "autoencoder-skips": (build_segmenter, {"base_channels": 16, "skips": True}),
}


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def build(name: str, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model_class, arguments = MODELS[name]
    return model_class(num_classes=num_classes, **arguments)


@pytest.mark.parametrize("size", [(64, 64), (67, 75), (16, 130)])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_logits_have_the_size_of_the_image(name, size, num_classes):
    logits = build(name, num_classes)(torch.rand(2, 3, *size))
    assert logits.shape == (2, num_classes, *size) and logits.dtype == torch.float32


def test_gradients_reach_all_that_is_trained_and_nothing_else(name):
    model = build(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    target = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(model(torch.rand(2, 3, 64, 64)), target).backward()
        optimizer.step()
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    for key, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert has_gradient == parameter.requires_grad, key
    frozen_norms = {  # batch norm whose weights are frozen must keep its statistics, too
        f"{prefix}.{statistic}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad
        for statistic in ("running_mean", "running_var", "num_batches_tracked")
    }
    for key, value in model.state_dict().items():
        if key in frozen_norms or (key not in trained and "running" not in key and "tracked" not in key):
            assert torch.equal(value, before[key]), f"{key} is frozen but moved"
        elif key in trained:
            assert not torch.equal(value, before[key]), f"{key} did not move"


def test_a_batch_of_two_is_two_of_one(name):
    model = build(name).eval()
    images = torch.rand(2, 3, 67, 75)
    with torch.inference_mode():
        together = model(images)
        alone = torch.cat([model(images[:1]), model(images[1:])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_saved_and_rebuilt_it_is_the_same(name, tmp_path):
    model_class, arguments = MODELS[name]
    model = build(name)
    model.train()(torch.rand(4, 3, 64, 64))  # moves the batch-norm statistics
    model.eval()
    save_checkpoint(
        tmp_path / "best.pt",
        {"model_name": name, "model": model.state_dict(), "model_args": {"num_classes": 3, **arguments}, "config": {}},
    )
    rebuilt, _ = load_model(tmp_path / "best.pt", model_class, name, torch.device("cpu"))
    image = torch.rand(1, 3, 48, 48)
    with torch.inference_mode():
        expected = model.to(memory_format=torch.channels_last)(image.contiguous(memory_format=torch.channels_last))
        assert torch.equal(rebuilt(image.contiguous(memory_format=torch.channels_last)), expected)


def test_normalization_is_inside_and_not_in_the_checkpoint(name):
    model = build(name)
    assert not any("mean" in key and "running" not in key for key in model.state_dict())
    assert any("mean" in key for key, _ in model.named_buffers())


def test_it_overfits_eight_images(name):
    """Eight images with a square whose class is its color: a model that learns gets nearly every pixel right."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 64, 64) * 0.2
    target = torch.zeros(8, 64, 64, dtype=torch.uint8)
    for index in range(8):
        y, x, label = 8 + 4 * (index % 4), 6 + 4 * (index // 2), 1 + index % 2
        images[index, label, y : y + 24, x : x + 28] += 0.7
        target[index, y : y + 24, x : x + 28] = label
    model = build(name).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        cross_entropy(model(images), target).backward()
        optimizer.step()
    right = (model.eval()(images).argmax(1) == target).float().mean()
    assert right > 0.97


def test_unet_has_the_size_of_the_design():
    model = UNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 31_037_763
    assert model.bottleneck[0].in_channels == 512 and model.bottleneck[0].out_channels == 1024
    assert not any(isinstance(module, nn.Softmax) for module in model.modules())
