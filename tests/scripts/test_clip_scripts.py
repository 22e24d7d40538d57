"""clip_seg/train.py, clip_seg/test.py and predict.py with the weights of a CLIP that is not trained."""

from __future__ import annotations

import shutil

from tests.helpers import TINY, fail, run, succeed
from utils.files import read_json
from utils.helper import load_checkpoint


def test_frozen_clip_is_left_out_of_the_checkpoint_and_found_again(clip_folder, prepared, tmp_path):
    clip, moved, out = tmp_path / "clip", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(clip_folder, clip)
    flags = ["--data", prepared, "--out", out, "--clip-model", clip, "--freeze-encoder", "--skips", *TINY]
    succeed("clip_seg/train.py", *flags, "--epochs", 1)
    succeed("clip_seg/train.py", "--out", out, "--resume", "--epochs", 2)
    last = load_checkpoint(out / "last.pt", "clip_seg")
    assert last["epoch"] == 2 and not any("vision" in key for key in last["model"])
    trained = sum(not key.endswith(("mean", "var", "tracked")) for key in last["model"])
    assert len(last["optimizer"]["state"]) == trained, "a frozen encoder takes no memory in the optimizer"

    clip.rename(moved)
    score = ["clip_seg/test.py", "--data", prepared, "--checkpoint", out / "best.pt", "--limit", 4, "--workers", 0]
    fail(*score, message=f"no CLIP weights for --clip-model {clip}")
    succeed(*score, "--clip-model", moved)
    assert read_json(out / "test/metrics.json")["model"] == "clip_seg"
    photograph = next((prepared / "Test/color/cats").iterdir())
    succeed("predict.py", photograph, "--checkpoint", out, "--clip-model", moved, "--out", tmp_path / "masks")
    assert (tmp_path / f"masks/{photograph.stem}_mask.png").exists()


def test_error_for_missing_weights_says_where_to_get_them(prepared, tmp_path):
    result = run("clip_seg/train.py", "--data", prepared, "--out", tmp_path / "run", *TINY)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    name = "openai/clip-vit-base-patch32"
    for part in (
        f"--clip-model {name}",
        f"hf download {name}",
        "a folder that holds config.json",
        "--clip-random-init",
    ):
        assert part in result.stderr
    assert not (tmp_path / "run").exists()
