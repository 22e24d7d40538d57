"""point_clip/train.py, point_clip/test.py and predict.py: starts from a segmenter, and points."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.pet import find_records
from dataset.pet_heatmap import read_points
from tests.helpers import TINY, fail, save_clip_segmenter, succeed
from utils.dataset import foreground
from utils.files import read_json
from utils.helper import load_checkpoint
from utils.image import load_picture

HEATMAP = [flag for flag in TINY if flag not in ("--base-channels", 2)]  # CLIP's width determines the decoder's


def check_scores(prepared: Path, out: Path) -> None:
    """Score four images."""
    succeed("point_clip/test.py", "--data", prepared, "--checkpoint", out / "best.pt", "--limit", 4, "--workers", 0)
    metrics = read_json(out / "test/metrics.json")
    assert metrics["clicks"] == 8 and metrics["baseline"]["name"] == "true outline, blind to the click"


@pytest.fixture(scope="module")
def disk(clip_folder, prepared, tmp_path_factory) -> Path:
    """The run folder of a model with the disk encoding that started from the segmenter clip_seg.pt in it."""
    out = tmp_path_factory.mktemp("runs") / "disk"
    segmenter = save_clip_segmenter(out.parent / "clip_seg.pt", clip_folder)
    flags = ["--data", prepared, "--out", out, "--clip-seg", segmenter, "--skips", "--lr", 0, "--epochs", 1]
    succeed("point_clip/train.py", *flags, "--point-encoding", "disk", *TINY)
    return out


def test_training_starts_from_the_segmenter(disk, prepared):
    """With a learning rate of zero, the parts that it took are still those of the segmenter afterwards."""
    last = load_checkpoint(disk / "last.pt", "point_clip")
    start = load_checkpoint(disk.parent / "clip_seg.pt", "clip_seg")
    assert last["model_args"]["encoder"] == start["model_args"]["encoder"]
    assert not any("vision" in key for key in last["model"]), "CLIP is frozen, as in the segmenter"
    taken = [key for key in start["model"] if key.endswith("weight") and key.startswith(("project", "decoder"))]
    assert taken and all(torch.equal(last["model"][key], start["model"][key]) for key in taken)
    check_scores(prepared, disk)


def test_heatmap_on_a_frozen_clip(clip_folder, prepared, tmp_path):
    out = tmp_path / "run"
    flags = ["--data", prepared, "--out", out, "--clip-model", clip_folder, "--freeze-encoder", "--epochs", 1]
    succeed("point_clip/train.py", *flags, *HEATMAP)
    last = load_checkpoint(out / "last.pt", "point_clip")
    assert last["model_args"]["encoding"] == "heatmap" and not any("vision" in key for key in last["model"])
    assert last["scores"]["iou"].keys() == {"ground", "object", "mean"}
    check_scores(prepared, out)


def test_masks_of_a_point_in_photographs(disk, prepared, tmp_path):
    record = find_records(prepared, "Test")[0]
    click = read_points([record])[0][0]
    test = ["point_clip/test.py", "--checkpoint", disk / "best.pt", "--images", record.image, "--out", tmp_path / "a"]
    predict = ["predict.py", record.image, "--checkpoint", disk, "--out", tmp_path / "b"]
    masks = []
    for script, folder in ((test, "a"), (predict, "b")):
        succeed(*script, "--point", f"{click.x},{click.y}")
        masks.append(np.asarray(load_picture(tmp_path / folder / f"{record.name}_mask.png")))
    assert masks[0].shape == foreground(record.load_label()).shape and set(np.unique(masks[0])) <= {0, 1}
    assert np.array_equal(*masks)
    fail(*test, "--point", "5000,3", message="the point (5000, 3) is not in the photograph")
    fail(*test, message="--images and --point go together", code=2)
    fail(*predict, message="this model is prompted by a click: give one as --point X,Y")


def test_width_without_effect_is_refused(prepared, tmp_path):
    flags = ["--data", prepared, "--out", tmp_path / "run", "--base-channels", 2]
    fail("point_clip/train.py", *flags, message="--base-channels is for --point-encoding disk")
    assert not (tmp_path / "run").exists()
