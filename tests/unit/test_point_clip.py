"""point_clip/: the model, its scores and its scripts."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from clip_seg.model import ClipEncoder, ClipSegmenter, build_segmenter, make_encoder
from dataset.pet import find_records, make_test_loader
from dataset.pet_heatmap import Click, read_points
from point_clip.model import PointClip, build_point_clip, draw_disks, features_at
from point_clip.scoring import draw_clicks, flipped, score_clicks, with_mark
from point_clip.train import START_SCALE, Config, start_from
from tests.conftest import TINY, TINY_CLIP, run
from utils.config import TestConfig as ScoreConfig
from utils.dataset import pet_pixels
from utils.files import InputError
from utils.helper import load_checkpoint, load_model, save_checkpoint
from utils.loss import cross_entropy

ENCODINGS = ("heatmap", "disk")
SIZE = (67, 75)
HEATMAP = [part for part in TINY if part not in ("--base-channels", "2")]


def build(encoding: str, **options) -> PointClip:
    torch.manual_seed(0)
    vision = CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP))
    return PointClip(ClipEncoder(vision, **options), encoding=encoding, base_channels=4)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("size", [(64, 64), SIZE])
def test_one_logit_at_the_size_of_the_image(encoding, size):
    logits = build(encoding)(torch.rand(2, 3, *size), torch.tensor([[5.0, 6.0], [60.0, 60.0]]))
    assert logits.shape == (2, 1, *size)


def test_full_size_has_the_shapes_of_the_design():
    model = PointClip(ClipEncoder(CLIPVisionModel(CLIPVisionConfig())))
    assert [block.up.out_channels for block in model.decoder.blocks] == [768, 384, 192, 96]
    assert model.decoder.blocks[0].up.in_channels == 1536
    seen = []
    model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    with torch.inference_mode():
        model.eval()(torch.rand(1, 3, 64, 64), torch.tensor([[3.0, 4.0]]))
    assert seen == [(1, 1536, 7, 7)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_features_of_an_image_serve_many_clicks(encoding):
    model = build(encoding).eval()
    image, points = torch.rand(1, 3, *SIZE), torch.tensor([[5.0, 6.0], [60.0, 60.0], [74.0, 0.0]])
    with torch.inference_mode():
        calls = []
        model.encoder.normalize.register_forward_hook(lambda *_: calls.append(1))
        together = model.decode(model.encode(image), points, SIZE)
        assert len(calls) == (2 if encoding == "heatmap" else 1), "the disk needs the encoder once for the image alone"
        calls.clear()
        alone = torch.cat([model(image, point[None]) for point in points])
        assert len(calls) == len(points), "one pass for the image and its heatmap"
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_trained_parameter_gets_a_gradient(encoding):
    for frozen in (False, True):
        model = build(encoding, frozen=frozen).train()
        target = torch.randint(0, 2, (2, *SIZE), dtype=torch.uint8)
        logits = model(torch.rand(2, 3, *SIZE), torch.tensor([[5.0, 6.0], [40.0, 50.0]]))
        cross_entropy(torch.cat([torch.zeros_like(logits), logits], dim=1), target).backward()
        for name, parameter in model.named_parameters():
            has_gradient = parameter.grad is not None and bool((parameter.grad != 0).any())
            assert has_gradient == parameter.requires_grad, name
            assert not (frozen and parameter.requires_grad and "vision" in name)


def test_two_class_cross_entropy_of_a_logit_is_binary_cross_entropy():
    logits, target = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8), dtype=torch.uint8)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    expected = nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target.float())
    assert cross_entropy(two, target).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_disk_makes_it_look_at_the_click():
    """A picture of two halves: only the click tells which of them is meant, anywhere in it.

    The heatmap needs far more steps: what it means has to be learned through the whole encoder.
    """
    torch.manual_seed(0)
    image = torch.zeros(4, 3, 64, 64)
    image[:, 0, :, 32:] = 1
    target = torch.zeros(8, 64, 64, dtype=torch.uint8)
    target[0::2, :, :32] = 1
    target[1::2, :, 32:] = 1

    def draw_points() -> torch.Tensor:
        """Two clicks on each image, on the left half and on the right."""
        return torch.rand(8, 2) * torch.tensor([28.0, 60.0]) + torch.tensor([[1.0, 1.0], [34.0, 1.0]]).repeat(4, 1)

    model = build("disk").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(80):
        optimizer.zero_grad()
        logits = model(image, draw_points())
        cross_entropy(torch.cat([torch.zeros_like(logits), logits], dim=1), target).backward()
        optimizer.step()
    with torch.inference_mode():
        right = (model.eval()(image, draw_points())[:, 0] > 0) == target.bool()
    assert right.float().mean() > 0.95


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("point", [(-1, 5), (75, 5), (5, 67), (math.nan, 5), (5, math.inf)])
def test_points_outside_the_image(encoding, point):
    with pytest.raises(InputError, match=r"the point \(.*\) is not in the image, which is 75x67 pixels"):
        build(encoding).eval()(torch.rand(1, 3, *SIZE), torch.tensor([point], dtype=torch.float32))


def test_disks_and_features_under_the_click():
    disks = draw_disks(torch.tensor([[0.25, 0.75], [math.nan, math.nan]]), 64, 64)
    assert disks.shape == (2, 1, 64, 64) and disks[1].sum() == 0
    assert disks[0, 0, 47:49, 15:17].min() == 1 and disks[0, 0, 40, 15] == 0
    area = disks[0].sum().item()
    assert area == pytest.approx(math.pi * (64 * 5 / 256) ** 2, rel=0.15)
    features = torch.arange(16.0).view(1, 1, 4, 4).repeat(2, 3, 1, 1)
    found = features_at(features, torch.tensor([[0.375, 0.625], [math.nan, 0.1]]))
    assert found[0].flatten().tolist() == [9.0] * 3 and found[1].abs().sum() == 0


def test_a_click_to_avoid_changes_the_mask_and_none_does_not():
    model = build("disk").eval()
    image, point = torch.rand(1, 3, 64, 64), torch.tensor([[8.0, 8.0]])
    with torch.inference_mode():
        plain = model(image, point)
        assert torch.equal(model(image, point, torch.full((1, 2), math.nan)), plain)
        assert not torch.equal(model(image, point, torch.tensor([[50.0, 50.0]])), plain)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_saved_and_rebuilt_it_is_the_same(encoding, tmp_path):
    model = build(encoding).eval()
    arguments = {
        "encoder": {
            "clip_model": "none", "architecture": TINY_CLIP, "image_size": 32, "frozen": False, "weights_hash": None,
        },
        "encoding": encoding, "base_channels": 4, "skips": False,
    }  # fmt: skip
    saved = {"model_name": "point_clip", "model": model.state_dict(), "model_args": arguments, "config": {}}
    save_checkpoint(tmp_path / "best.pt", saved)
    rebuilt, _ = load_model(tmp_path / "best.pt", build_point_clip, "point_clip", torch.device("cpu"))
    image = torch.rand(1, 3, *SIZE).contiguous(memory_format=torch.channels_last)
    point = torch.tensor([[5.0, 6.0]])
    with torch.inference_mode():
        assert torch.equal(rebuilt(image, point), model.to(memory_format=torch.channels_last)(image, point))


class Oracle(nn.Module):
    """Knows every label; looks at the click, or does not."""

    def __init__(self, records, *, blind: bool):
        super().__init__()
        self.labels = [torch.from_numpy(record.load_label()) for record in records]
        self.blind = blind
        self.seen = 0

    def encode(self, image):
        features = [torch.arange(self.seen, self.seen + len(image)).view(-1, 1, 1, 1).float()]
        self.seen += len(image)
        return features

    def decode(self, features, point, image_size):
        label = self.labels[int(features[0])]
        pet = pet_pixels(label)
        height, width = label.shape
        answers = []
        for x, y in point.tolist():
            column, row = ((place + 0.5) * edge / size - 0.5 for place, edge, size in ((x, width, 64), (y, height, 64)))
            clicked = bool(pet[round(row), round(column)])
            answers.append((pet if self.blind or clicked else ~pet).float() * 2 - 1)
        return torch.stack(answers)[:, None]

    def forward(self, image, point):
        return torch.zeros(1, 1, *image.shape[-2:])


def oracle_metrics(prepared: Path, out: Path, *, blind: bool) -> dict:
    config = ScoreConfig(data=prepared, checkpoint=out / "best.pt", out=out, workers=0, batch_size=5)
    loader = make_test_loader(config, 64)
    checkpoint = {"model_name": "point_clip", "epoch": 1, "config": {"image_size": 64, "seed": 0}}
    model = Oracle(find_records(prepared, "Test"), blind=blind)
    return score_clicks(model, checkpoint, loader, config, torch.device("cpu"), synthetic=True)


def test_a_perfect_model_has_perfect_scores(prepared, tmp_path, capsys):
    metrics = oracle_metrics(prepared, tmp_path, blind=False)
    assert metrics["iou"] == {"ground": 1, "object": 1, "mean": 1}
    assert metrics["own_mask"] == 1 and metrics["flips"] == 1 and metrics["spread"]["iou_std"] == 0
    assert (metrics["images"], metrics["clicks"], metrics["skipped"]) == (12, 24, {"pet": 0, "background": 0})
    assert metrics["baseline"]["pixel_accuracy"] == pytest.approx(0.5), "half of the clicks, all of the pixels wrong"
    assert "flips it on 100.0 %" in capsys.readouterr().out
    assert (tmp_path / "predictions.png").stat().st_size > 10_000


def test_a_model_that_never_looks_scores_as_the_baseline(prepared, tmp_path):
    metrics = oracle_metrics(prepared, tmp_path, blind=True)
    for kind in ("iou", "dice", "accuracy"):
        assert metrics[kind] == metrics["baseline"][kind]
    assert metrics["by_click"]["pet"]["iou"]["object"] == 1 and metrics["by_click"]["background"]["iou"]["object"] == 0
    assert metrics["own_mask"] == pytest.approx(0.5) and metrics["flips"] == 0


def test_flips():
    mask = torch.zeros(2, 4, 4, dtype=torch.long)
    clicks = [Click(0, 0, True), Click(3, 3, False)]
    mask[0, 0, 0] = mask[1, 3, 3] = 1
    assert flipped(mask, clicks) == [True, True]
    mask[1, 0, 0] = 1
    assert flipped(mask, clicks) == [True, False]


def test_ten_clicks_lie_where_they_say(prepared):
    label = find_records(prepared, "Test")[0].load_label()
    clicks = draw_clicks(label, np.random.default_rng(0))
    assert [click.on_pet for click in clicks] == [True] * 5 + [False] * 5
    assert all(bool(pet_pixels(label)[click.y, click.x]) == click.on_pet for click in clicks)
    assert [click.on_pet for click in draw_clicks(np.zeros((4, 4), np.uint8), np.random.default_rng(0))] == [False] * 5


def test_the_mark_is_at_the_click():
    marked = with_mark(np.full((100, 200, 3), 128, np.uint8), 150, 30)
    assert tuple(marked[30, 150]) == (255, 255, 255) and tuple(marked[30, 50]) == (128, 128, 128)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_scripts(encoding, clip_folder, prepared, tmp_path):
    out = tmp_path / "run"
    result = run(
        "point_clip/train.py", "--data", prepared, "--out", out, "--clip-model", clip_folder,
        "--point-encoding", encoding, "--freeze-encoder", "--epochs", 1, *(TINY if encoding == "disk" else HEATMAP),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    last = load_checkpoint(out / "last.pt", "point_clip")
    assert not any("vision" in key for key in last["model"]) and last["scores"]["iou"].keys() == {
        "ground",
        "object",
        "mean",
    }
    result = run("point_clip/test.py", "--data", prepared, "--checkpoint", out / "best.pt", "--limit", 4)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((out / "test/metrics.json").read_text())
    assert metrics["clicks"] == 8 and metrics["baseline"]["name"] == "true outline, blind to the click"

    record = find_records(prepared, "Test")[0]
    click = read_points([record])[0][0]
    flags = ["--checkpoint", out / "best.pt", "--images", record.image, "--out", tmp_path / "masks"]
    result = run("point_clip/test.py", *flags, "--point", f"{click.x},{click.y}")
    assert result.returncode == 0, result.stderr
    mask = np.asarray(Image.open(tmp_path / f"masks/{record.name}_mask.png"))
    assert mask.shape == record.load_label().shape and set(np.unique(mask)) <= {0, 1}
    if encoding == "disk":  # the errors are the same for both
        for arguments, message in [
            (["--point", "5000,3"], "the point (5000.0, 3.0) is not in it"),
            ([], "--images and --point go together"),
        ]:
            result = run("point_clip/test.py", *flags, *arguments)
            assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_scores_at_another_size(prepared, tmp_path):
    """Clicks are moved to the size that is scored; the model that knows the outline is nearly perfect there, too."""
    config = ScoreConfig(
        data=prepared, checkpoint=tmp_path / "best.pt", out=tmp_path, workers=0, batch_size=5, score_size=64
    )
    checkpoint = {"model_name": "point_clip", "epoch": 1, "config": {"image_size": 64, "seed": 0}}
    loader = make_test_loader(config, 64)
    model = Oracle(find_records(prepared, "Test"), blind=False)
    model.labels = [torch.from_numpy(loader.dataset[index]["label"]) for index in range(12)]
    metrics = score_clicks(model, checkpoint, loader, config, torch.device("cpu"), synthetic=True)
    assert metrics["iou"]["mean"] > 0.9 and metrics["own_mask"] > 0.95 and metrics["clicks"] == 24


def test_a_width_that_has_no_effect_is_refused(prepared, tmp_path):
    result = run("point_clip/train.py", "--data", prepared, "--out", tmp_path / "run", "--base-channels", 2)
    assert result.returncode == 1 and "--base-channels is for --point-encoding disk" in result.stderr


@pytest.fixture
def segmenter(clip_folder, tmp_path) -> Path:
    """A checkpoint of clip_seg with CLIP frozen, untrained."""
    torch.manual_seed(1)
    encoder, encoder_args = make_encoder(str(clip_folder), frozen=True)
    options = {"num_classes": 3, "base_channels": 2, "skips": True}
    checkpoint = {
        "model_name": "clip_seg", "model": ClipSegmenter(encoder, **options).state_dict(),
        "model_args": {"encoder": encoder_args, **options},
        "config": {"clip_model": str(clip_folder), "clip_image_size": None, "clip_random_init": False,
                   "freeze_encoder": True},
    }  # fmt: skip
    save_checkpoint(tmp_path / "clip_seg.pt", checkpoint)
    return tmp_path / "clip_seg.pt"


def test_it_starts_from_the_segmenter(segmenter, prepared, tmp_path):
    """With a learning rate of zero the parts that it took are still those of the segmenter afterwards."""
    flags = ["--data", prepared, "--clip-seg", segmenter, "--lr", 0, "--epochs", 1, "--skips"]
    start = load_checkpoint(segmenter, "clip_seg")
    for encoding, own in (("disk", TINY), ("heatmap", HEATMAP)):
        out = tmp_path / encoding
        result = run("point_clip/train.py", *flags, "--out", out, "--point-encoding", encoding, *own)
        assert result.returncode == 0, result.stderr
        last = load_checkpoint(out / "last.pt", "point_clip")
        assert last["model_args"]["encoder"] == start["model_args"]["encoder"]
        taken = [key for key in start["model"] if key.endswith("weight") and key.startswith(("project", "decoder"))]
        same = [key in last["model"] and torch.equal(last["model"][key], start["model"][key]) for key in taken]
        # A heatmap's decoder has twice the inputs and is its own.
        assert taken and (all(same) if encoding == "disk" else not any(same))


def test_what_is_compared_with_the_click_starts_as_the_segmenters_classes(segmenter):
    checkpoint = load_checkpoint(segmenter, "clip_seg")
    checkpoint["model"]["head.weight"] *= 1000  # beside the random start of the other weights
    save_checkpoint(segmenter, checkpoint)
    start, _ = load_model(segmenter, build_segmenter, "clip_seg", torch.device("cpu"))
    model, _ = start_from(Config(clip_seg=segmenter), {"encoding": "disk", "base_channels": 2, "skips": True})
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        (features,) = model.eval().encode(image)
        *shallower, tokens = start.encoder(image)
        logits = start.head(start.decoder(start.project(tokens), shallower))
        pet = logits[:, 1:].mean(dim=1, keepdim=True) - logits[:, :1]
    expected = (START_SCALE * pet).tanh().expand_as(features)
    assert expected.abs().max() > 0.05 and (features - expected).abs().max() < 0.01


def test_a_start_from_another_model_is_refused(segmenter, tmp_path):
    for given, message in [
        ({}, f"the decoder of --clip-seg {segmenter} is another one: give it as --base-channels 2 --skips"),
        ({"skips": True, "base_channels": 2, "clip_random_init": True}, "leave --clip-random-init out"),
        ({"clip_seg": tmp_path / "none.pt"}, "none.pt"),
    ]:
        config = Config(**{"clip_seg": segmenter, "point_encoding": "disk", **given})
        options = {"encoding": "disk", "base_channels": config.base_channels, "skips": config.skips}
        with pytest.raises(InputError, match=re.escape(message)):
            start_from(config, options)
