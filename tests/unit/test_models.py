"""One contract over all models: images in [0, 1] of any size in, logits of that size out. And models.load_model."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoencoder.model import Autoencoder
from autoencoder.model import build_segmenter as build_autoencoder_segmenter
from clip_seg.model import build_segmenter as build_clip_segmenter
from models import MODELS, load_model
from point_clip.model import build_point_clip
from tests.helpers import CPU, TINY_CLIP, save_model
from unet.model import UNet
from utils.dataset import CLICKS, PETS
from utils.files import InputError
from utils.helper import class_table_of, load_checkpoint, restore_model, save_checkpoint
from utils.layers import Normalize
from utils.loss import cross_entropy


@dataclass
class Case:
    """A tiny model. `channels`: of its output (None: one per class); `frozen`: prefix of the parameters that training
    must not change; `lr`: a learning rate with which it learns quickly."""

    model_name: str
    build: Callable
    model_args: dict
    channels: int | None = None
    frozen: str | tuple = ()
    lr: float = 3e-3

    def call(self, model, images):
        """The output; a click per image is at 3/8 of its edges, inside each square of `draw_squares`."""
        if self.model_args.get("deep_supervision") and model.training:  # as in training, where all heads count
            return torch.stack(model(images, all_scales=True)).mean(dim=0)
        if self.model_name != "point_clip":
            return model(images)
        height, width = images.shape[-2:]
        return model(images, torch.tensor([[3 * width // 8, 3 * height // 8]]).repeat(len(images), 1).float())


CLIP = {"clip_model": "none", "architecture": TINY_CLIP, "image_size": 32, "frozen": False, "weights_hash": None}
SMALL_CLIP = CLIP | {"image_size": 16}  # not the size of its weights: positions are interpolated
WIDE_CLIP = CLIP | {"architecture": TINY_CLIP | {"hidden_size": 64}}
FROZEN = {"frozen": True}
UNUSED = "encoder.vision.post_layernorm."  # only serves the pooled token
ENCODER = "encoder."


def autoencoder(**model_args):
    model_args = {"base_channels": 16, **model_args}
    return Case("autoencoder", build_autoencoder_segmenter, model_args, frozen=ENCODER, lr=1e-2)


def clip_seg(frozen, **model_args):
    return Case("clip_seg", build_clip_segmenter, {"base_channels": 8, **model_args}, frozen=frozen)


def point_clip(frozen, **model_args):
    return Case("point_clip", build_point_clip, {"base_channels": 8, **model_args}, channels=1, frozen=frozen)


# At least one of each row of models.MODELS, and the first stage of the autoencoder.
CASES = {
    "unet": Case("unet", UNet, {"base_channels": 4}),
    "unet-residual-attention": Case("unet", UNet, {"base_channels": 4, "residual": True, "attention": True}),
    "unet-deep-supervision": Case("unet", UNet, {"base_channels": 4, "deep_supervision": True}),
    "reconstruction": Case("autoencoder/reconstruction", Autoencoder, {"base_channels": 16}, channels=3),
    "autoencoder": autoencoder(),
    "autoencoder-skips": autoencoder(skips=True),
    "clip_seg": clip_seg(UNUSED, encoder=CLIP),
    "clip_seg-frozen-skips": clip_seg(ENCODER, encoder=CLIP | FROZEN, skips=True),
    "point_clip-heatmap": point_clip(UNUSED, encoder=WIDE_CLIP, encoding="heatmap"),
    "point_clip-heatmap-frozen-skips": point_clip(ENCODER, encoder=WIDE_CLIP | FROZEN, encoding="heatmap", skips=True),
    "point_clip-disk": point_clip(UNUSED, encoder=SMALL_CLIP, encoding="disk"),
    "point_clip-disk-frozen-skips": point_clip(ENCODER, encoder=SMALL_CLIP | FROZEN, encoding="disk", skips=True),
}
# A further model is built with the argument that most models take; give it a case of its own if it takes others.
for name, row in MODELS.items():
    if all(case.model_name != name for case in CASES.values()):
        CASES[name] = Case(name, getattr(importlib.import_module(f"{name}.model"), row.build), {"base_channels": 4})


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def build(case, **options):
    torch.manual_seed(0)
    return case.build(**case.model_args, **options)


def loss_of(case, model, images, mask):
    """The loss of segmenting `mask`, of segmenting the clicked square in it, or of reconstructing `images`."""
    output = case.call(model, images)
    if case.channels == 3:
        return F.mse_loss(output, images)
    if case.channels == 1:
        return cross_entropy(torch.cat([torch.zeros_like(output), output], dim=1), (mask > 0).to(mask.dtype))
    return cross_entropy(output, mask)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_output_has_the_size_of_the_images(case, num_classes):
    model = build(case, **({} if case.channels else {"num_classes": num_classes}))
    for size in [(64, 64), (67, 75), (16, 130)]:
        output = case.call(model, torch.rand(2, 3, *size))
        assert output.shape == (2, case.channels or num_classes, *size) and output.dtype == torch.float32


def test_training_moves_trainable_parameters_only(case):
    """Only they get gradients, and the batch norm of a frozen encoder keeps its statistics."""
    model = build(case).train()
    trainable = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {key for key, _ in model.named_parameters() if not key.startswith(case.frozen)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mask = torch.randint(0, 3, (2, 64, 64), dtype=torch.uint8)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(case, model, torch.rand(2, 3, 64, 64), mask).backward()
        optimizer.step()
    for key, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert has_gradient == (key in trainable), key
    for key, value in model.state_dict().items():
        if key in trainable:
            assert not torch.equal(value, before[key]), f"{key} did not move"
        elif key.startswith(case.frozen):
            assert torch.equal(value, before[key]), f"{key} is frozen but moved"


def test_batch_of_two_equals_two_of_one(case):
    model = build(case).eval()
    images = torch.rand(2, 3, 67, 75)
    with torch.inference_mode():
        together = case.call(model, images)
        alone = torch.cat([case.call(model, images[:1]), case.call(model, images[1:])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_restored_model_gives_the_same_logits(case, tmp_path):
    """Bit for bit, from its file alone; a model of models.MODELS through load_model, from the file and the folder."""
    model = build(case)
    case.call(model.train(), torch.rand(4, 3, 64, 64))  # moves the batch-norm statistics
    model.eval().to(memory_format=torch.channels_last)
    row = MODELS.get(case.model_name)
    path = save_model(tmp_path / (row.checkpoint if row else "best.pt"), model, case.model_name, case.model_args)
    torch.manual_seed(1)  # the rebuilt model must not get its weights from the same seed
    restored = [load_model(str(source), "cpu") for source in (path, tmp_path)] if row else []
    restored = restored or [restore_model(path, case.build, case.model_name, CPU)]
    image = torch.rand(1, 3, 48, 40).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = case.call(model, image)
        for rebuilt, checkpoint in restored:
            assert torch.equal(case.call(rebuilt, image), expected)
            assert not rebuilt.training and checkpoint["model_name"] == case.model_name


def test_normalization_is_inside_and_not_in_the_checkpoint(case):
    model = build(case)
    assert not [key for key in model.state_dict() if "mean" in key and "running" not in key]
    (normalize,) = [module for module in model.modules() if isinstance(module, Normalize)]
    inputs = []
    normalize.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    case.call(model, torch.rand(1, 3, 64, 64))
    assert inputs and all(image.min() >= 0 and 0.5 < image.max() <= 1 for image in inputs)


def draw_squares():
    """Eight images (8, 3, 64, 64) with a square whose class is its color, and their masks (8, 64, 64)."""
    torch.manual_seed(0)
    images = torch.rand(8, 3, 64, 64) * 0.2
    mask = torch.zeros(8, 64, 64, dtype=torch.uint8)
    for index in range(8):
        y, x, label = 8 + 4 * (index % 4), 6 + 4 * (index // 2), 1 + index % 2
        images[index, label, y : y + 24, x : x + 28] += 0.7
        mask[index, y : y + 24, x : x + 28] = label
    return images, mask


def share_learned(case, model, images, mask):
    """The share of correct pixels, or of the images' variance that their reconstructions explain."""
    with torch.inference_mode():
        output = case.call(model.eval(), images)
    if case.channels == 3:
        return 1 - float(F.mse_loss(output, images) / images.var())
    correct = (output[:, 0] > 0) == (mask > 0) if case.channels == 1 else output.argmax(dim=1) == mask
    return float(correct.float().mean())


def test_model_overfits_eight_images(case):
    images, mask = draw_squares()
    model = build(case)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=case.lr)
    needed = 0.75 if case.channels == 3 else 0.97  # noise is 0.11 of the variance
    for step in range(201):
        if step % 20 == 0 and share_learned(case, model, images, mask) > needed:
            return
        optimizer.zero_grad()
        loss_of(case, model.train(), images, mask).backward()
        optimizer.step()
    pytest.fail("it did not learn them in 200 steps")


def test_unet_has_the_size_of_the_design():
    model = UNet()
    assert sum(parameter.numel() for parameter in model.parameters()) == 31_037_763
    assert model.bottleneck[0].in_channels == 512 and model.bottleneck[0].out_channels == 1024
    assert not any(isinstance(module, nn.Softmax) for module in model.modules())


def save_case(name, path):
    case = CASES[name]
    return save_model(path, build(case), case.model_name, case.model_args)


@pytest.mark.parametrize("name", MODELS)
def test_load_model_returns_the_class_table(name, tmp_path):
    """The stored one; for a checkpoint from before it was stored, the one of the model's row."""
    default = CLICKS if name == "point_clip" else PETS
    path = save_case(next(key for key, case in CASES.items() if case.model_name == name), tmp_path / "best.pt")
    table = replace(default, rows=(*default.rows[:-1], replace(default.rows[-1], name="ferret")))
    stored = load_checkpoint(path)
    for class_table, expected in ((table.as_plain_dict(), table), (None, default)):
        stored["class_table"] = class_table
        save_checkpoint(path, {key: value for key, value in stored.items() if value is not None})
        assert class_table_of(load_model(path, CPU)[1]) == expected


def test_load_model_refuses_a_first_stage(tmp_path):
    path = save_case("reconstruction", tmp_path / "best.pt")
    with pytest.raises(InputError, match=rf"holds a autoencoder/reconstruction model; .* knows {', '.join(MODELS)}"):
        load_model(path)


def test_load_model_needs_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"holds no best\.pt: give the folder of a finished run"):
        load_model(tmp_path)
    with pytest.raises(InputError, match=r"none\.pt: no such checkpoint"):
        load_model(tmp_path / "none.pt")


@pytest.mark.parametrize("name", ["unet", "autoencoder"])
def test_clip_model_is_refused_for_models_without_clip(name, tmp_path):
    path = save_case(name, tmp_path / "best.pt")
    with pytest.raises(InputError, match=rf"--clip-model: .* holds a {name} model, which has no CLIP"):
        load_model(path, clip_model="anywhere")
