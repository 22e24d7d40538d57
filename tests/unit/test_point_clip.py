"""point_clip/: the model beyond the contract of test_models.py, its start from a segmenter, and its scores."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from clip_seg.model import ClipEncoder, build_segmenter
from dataset.pet import find_records, make_test_set
from dataset.pet_heatmap import Click, read_points
from point_clip import scoring
from point_clip.model import START_SCALE, PointClip, features_at, render_disks
from point_clip.scoring import RANDOM_CLICKS, follows_click, mark_click, sample_clicks, score_clicks
from point_clip.train import Config, start_from
from tests.helpers import CPU, save_clip_segmenter, tiny_clip_encoder
from utils.config import TestConfig as ScoreConfig
from utils.dataset import CLICKS, PETS, foreground
from utils.evaluation import ModelTest
from utils.files import InputError, read_json
from utils.helper import load_checkpoint, restore_model, save_checkpoint
from utils.image import load_picture, rescale_point
from utils.loss import cross_entropy

ENCODINGS = ("heatmap", "disk")
SIZE = (67, 75)


def build(encoding, image_size=32):
    torch.manual_seed(0)
    return PointClip(tiny_clip_encoder(image_size=image_size)[0], encoding=encoding, base_channels=4)


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
        assert len(calls) == (2 if encoding == "heatmap" else 1), "only heatmaps pass through CLIP beside the image"
        calls.clear()
        alone = torch.cat([model(image, point[None]) for point in points])
        assert len(calls) == len(points), "one pass for the image and its heatmap"
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], together[1])


def test_disk_model_learns_to_follow_the_click():
    """A picture of two halves: only the click determines the half. The heatmap would need far more steps."""
    torch.manual_seed(0)
    image = torch.zeros(4, 3, 64, 64)
    image[:, 0, :, 32:] = 1
    target = torch.zeros(8, 64, 64, dtype=torch.uint8)
    target[0::2, :, :32] = 1
    target[1::2, :, 32:] = 1

    def random_points():
        """Two clicks on each image, on the left half and on the right."""
        return torch.rand(8, 2) * torch.tensor([28.0, 60.0]) + torch.tensor([[1.0, 1.0], [34.0, 1.0]]).repeat(4, 1)

    model = build("disk", image_size=16).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(80):
        optimizer.zero_grad()
        logits = model(image, random_points())
        cross_entropy(torch.cat([torch.zeros_like(logits), logits], dim=1), target).backward()
        optimizer.step()
    with torch.inference_mode():
        correct = (model.eval()(image, random_points())[:, 0] > 0) == target.bool()
    assert correct.float().mean() > 0.95


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_points_outside_the_image(encoding):
    model = build(encoding).eval()
    for point in [(-1, 5), (75, 5), (5, 67), (math.nan, 5), (5, math.inf)]:
        with pytest.raises(InputError, match=r"the point \(.*\) is not in the image, which is 75x67 pixels"):
            model(torch.rand(1, 3, *SIZE), torch.tensor([point], dtype=torch.float32))


def test_disks_and_features_under_the_click():
    disks = render_disks(torch.tensor([[0.25, 0.75], [math.nan, math.nan]]), 64, 64)
    assert disks.shape == (2, 1, 64, 64) and disks[1].sum() == 0
    assert disks[0, 0, 47:49, 15:17].min() == 1 and disks[0, 0, 40, 15] == 0
    area = disks[0].sum().item()
    assert area == pytest.approx(math.pi * (64 * 5 / 256) ** 2, rel=0.15)
    features = torch.arange(16.0).view(1, 1, 4, 4).repeat(2, 3, 1, 1)
    found = features_at(features, torch.tensor([[0.375, 0.625], [math.nan, 0.1]]))
    assert found[0].flatten().tolist() == [9.0] * 3 and found[1].abs().sum() == 0


def test_negative_click_changes_the_mask_and_nan_does_not():
    model = build("disk").eval()
    image, point = torch.rand(1, 3, 64, 64), torch.tensor([[8.0, 8.0]])
    with torch.inference_mode():
        plain = model(image, point)
        assert torch.equal(model(image, point, torch.full((1, 2), math.nan)), plain)
        assert not torch.equal(model(image, point, torch.tensor([[50.0, 50.0]])), plain)


@pytest.fixture
def segmenter(clip_folder, tmp_path):
    return save_clip_segmenter(tmp_path / "clip_seg.pt", clip_folder)


def start(segmenter, encoding, **given):
    """The model that point_clip/train.py starts from with these flags, and its encoder's arguments."""
    config = Config(**{"clip_seg": segmenter, "point_encoding": encoding, "base_channels": 2, "skips": True, **given})
    return start_from(config, {"encoding": encoding, "base_channels": config.base_channels, "skips": config.skips})


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_start_from_a_segmenter(segmenter, encoding):
    """With its encoder, and for the disk with its decoder: a heatmap's decoder has twice the inputs."""
    model, encoder_args = start(segmenter, encoding)
    checkpoint = load_checkpoint(segmenter, "clip_seg")
    assert encoder_args == checkpoint["model_args"]["encoder"]
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    own, state = model.state_dict(), checkpoint["model"]
    taken = [key for key in state if key.endswith("weight") and key.startswith(("project", "decoder"))]
    same = [key in own and torch.equal(own[key], state[key]) for key in taken]
    assert same and (all(same) if encoding == "disk" else not any(same))


def test_clicks_are_first_compared_by_the_classes_of_the_segmenter(segmenter):
    checkpoint = load_checkpoint(segmenter, "clip_seg")
    checkpoint["model"]["head.weight"] *= 1000  # beside the random start of the other weights
    save_checkpoint(segmenter, checkpoint)
    restored, _ = restore_model(segmenter, build_segmenter, "clip_seg", CPU)
    model, _ = start(segmenter, "disk")
    image = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        (features,) = model.eval().encode(image)
        *shallower, tokens = restored.encoder(image)
        logits = restored.head(restored.decoder(restored.project(tokens), shallower))
        pet = logits[:, 1:].mean(dim=1, keepdim=True) - logits[:, :1]
    expected = (START_SCALE * pet).tanh().expand_as(features)
    assert expected.abs().max() > 0.05 and (features - expected).abs().max() < 0.01


def test_flags_that_do_not_fit_the_segmenter(segmenter, tmp_path):
    decoder = f"--clip-seg {segmenter} has another decoder: give its own flags, --base-channels 2 --skips"
    for given, message in [
        ({"base_channels": 64, "skips": False}, decoder),
        ({"clip_random_init": True}, "--clip-seg brings its own CLIP, leave --clip-random-init out"),
        ({"clip_model": "another"}, "--clip-seg brings its own CLIP, leave --clip-model out"),
        ({"clip_seg": tmp_path / "none.pt"}, "none.pt: no such checkpoint"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            start(segmenter, "disk", **given)


class Oracle(nn.Module):
    """Knows the true masks, in the order of the names; follows the click, or ignores it."""

    def __init__(self, labels, blind):
        super().__init__()
        self.labels, self.blind, self.seen = labels, blind, 0

    def encode(self, image):
        features = [torch.arange(self.seen, self.seen + len(image)).view(-1, 1, 1, 1).float()]
        self.seen += len(image)
        return features

    def decode(self, features, points, image_size):
        label = self.labels[int(features[0])]
        pet = torch.from_numpy(foreground(label))
        predictions = []
        for x, y in points.tolist():
            column, row = rescale_point(x, y, image_size[::-1], label.shape[::-1])
            clicked = bool(pet[round(row), round(column)])
            predictions.append((pet if self.blind or clicked else ~pet).float() * 2 - 1)
        return torch.stack(predictions)[:, None]


def oracle_test(prepared, out, blind=False, size="native"):
    flags = {"workers": 0, "batch_size": 5, "device": "cpu", "score_size": size}
    config = ScoreConfig(data=prepared, checkpoint=out / "best.pt", out=out, **flags)
    test_set = make_test_set(config, 64)
    labels = [test_set[index]["label"] for index in range(len(test_set))]
    checkpoint = {"model_name": "point_clip", "epoch": 1, "config": {"image_size": 64, "seed": 0}}
    checkpoint["class_table"] = CLICKS.as_plain_dict()
    return ModelTest(Oracle(labels, blind), checkpoint, test_set, config, CPU)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(scoring, "save_figure", lambda figure, path: saved.append(figure))
    return saved


@pytest.fixture
def score(prepared, tmp_path, figures):
    """Scores an oracle; returns its test, its metrics and the text."""

    def score(**options):
        test = oracle_test(prepared, tmp_path, **options)
        text = score_clicks(test)
        return test, read_json(tmp_path / "metrics.json"), text

    return score


def test_perfect_model_has_perfect_scores(score, tmp_path):
    test, metrics, text = score()
    records = test.test_set.records
    assert metrics["iou"] == {"ground": 1, "object": 1, "mean": 1}
    assert metrics["own_mask"] == 1 and metrics["flips"] == 1 and metrics["spread"]["iou_std"] == 0
    assert metrics["skipped"] == {"pet": 0, "background": 0}
    assert (metrics["images"], metrics["clicks"]) == (len(records), 2 * len(records))
    assert metrics["baseline"]["pixel_accuracy"] == pytest.approx(0.5), "all pixels of half of the clicks are wrong"
    assert f"the mask follows the click on 100.0 % of {len(records)} images" in text
    for record in records:
        label = record.load_label()
        for suffix, side in (("", foreground(label)), ("_background", ~foreground(label))):
            mask = np.asarray(load_picture(tmp_path / "masks" / f"{record.name}{suffix}.png"))
            assert np.array_equal(mask, side.astype(np.uint8)), f"{record.name}{suffix}"


def test_figure_shows_the_masks_with_their_clicks(score, figures):
    test, _, _ = score()
    (figure,) = figures
    rows = np.array(figure.axes).reshape(-1, 4)
    headings = ["photograph", "truth", "click on the pet", "click on the background"]
    assert [axis.get_title() for axis in rows[0]] == headings
    assert figure.get_suptitle() == test.note
    records = {record.name: record for record in test.test_set.records}
    for row in rows:
        place, name = row[0].get_ylabel().split("\n")[0].split(": ")
        assert place in ("best", "median", "worst") and "object IoU 1.00" in row[0].get_ylabel()
        record = records[name]
        photo, truth, *masks = (axis.images[0].get_array() for axis in row)
        label = record.load_label()
        assert np.array_equal(photo, np.asarray(load_picture(record.image)))
        assert np.array_equal(truth, PETS.overlay(photo, label))
        clicks = {click.on_pet: click for click in read_points([record])[0]}
        for picture, on_pet in zip(masks, (True, False)):
            click, side = clicks[on_pet], foreground(label) == on_pet
            expected = mark_click(CLICKS.overlay(photo, side.astype(np.uint8)), click.x, click.y)
            assert np.array_equal(picture, expected)


def test_blind_model_scores_as_the_baseline(score):
    _, metrics, _ = score(blind=True)
    for kind in ("iou", "dice", "accuracy"):
        assert metrics[kind] == metrics["baseline"][kind]
    assert metrics["by_click"]["pet"]["iou"]["object"] == 1 and metrics["by_click"]["background"]["iou"]["object"] == 0
    assert metrics["own_mask"] == pytest.approx(0.5) and metrics["flips"] == 0


def test_scores_at_another_size(score):
    """Clicks move to the size that is scored; a model that knows the outline is nearly perfect there, too."""
    test, metrics, _ = score(size=64)
    assert metrics["iou"]["mean"] > 0.9 and metrics["own_mask"] > 0.95 and metrics["score_size"] == 64
    assert metrics["clicks"] == 2 * len(test.test_set)


def test_clicks_are_not_scored_with_a_model_of_other_classes(prepared, tmp_path):
    test = oracle_test(prepared, tmp_path)
    test.checkpoint["class_table"] = PETS.as_plain_dict()
    with pytest.raises(InputError, match=r"was trained on the classes background, cat, dog, .* has ground, object"):
        score_clicks(test)


def test_follows_click():
    masks = torch.zeros(2, 4, 4, dtype=torch.long)
    clicks = [Click(0, 0, True), Click(3, 3, False)]
    masks[0, 0, 0] = masks[1, 3, 3] = 1
    assert follows_click(masks, clicks)
    masks[1, 0, 0] = 1
    assert not follows_click(masks, clicks)


def test_random_clicks_are_on_their_side(prepared):
    label = find_records(prepared, "Test")[0].load_label()
    clicks = sample_clicks(label, np.random.default_rng(0))
    assert [click.on_pet for click in clicks] == [True] * RANDOM_CLICKS + [False] * RANDOM_CLICKS
    assert all(bool(foreground(label)[click.y, click.x]) == click.on_pet for click in clicks)
    without_pet = sample_clicks(np.zeros((4, 4), np.uint8), np.random.default_rng(0))
    assert [click.on_pet for click in without_pet] == [False] * RANDOM_CLICKS


def test_mark_is_at_the_click():
    marked = mark_click(np.full((100, 200, 3), 128, np.uint8), 150, 30)
    assert tuple(marked[30, 150]) == (255, 255, 255) and tuple(marked[30, 50]) == (128, 128, 128)
