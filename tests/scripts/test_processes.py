"""Several processes give what one gives, and end together."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest

from tests.helpers import (
    ENVIRONMENT,
    ROOT,
    TINY,
    every_pixel_step,
    pooled_step,
    run,
    save_model,
    succeed,
    train,
    wait_for_epoch,
    without_batch_norm,
)
from unet.model import UNet
from utils.config import TrainConfig, recipe_defaults
from utils.files import read_csv, read_json
from utils.helper import load_checkpoint

STRONG = recipe_defaults(TrainConfig, "strong") | {"warmup": 0.5, "ema": 0.9, "paste": 0.5, "augment": "strong"}
STRONG["schedule"] = "constant"  # a cosine depends on --epochs, which the test changes
TRAIN = """
import json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from tests import helpers
from utils.distributed import destroy_distributed

data, out = map(Path, sys.argv[2:4])
step = getattr(helpers, sys.argv[5])
helpers.train(data, out, step=step, model=helpers.without_batch_norm(), **json.loads(sys.argv[4]))
destroy_distributed()
"""


@pytest.mark.parametrize(
    ("step", "precision", "tolerance", "recipe"),
    [
        (every_pixel_step, "fp32", 1e-5, {}),
        (pooled_step, "fp32", 1e-5, STRONG),
        (pooled_step, "bf16", 5e-3, {}),
    ],
)
def test_losses_are_independent_of_the_processes(prepared, tmp_path, step, precision, tolerance, recipe):
    """Also with micro-batches, and when a run is resumed with another number; batches of 10 images and of 2."""
    (tmp_path / "train.py").write_text(TRAIN)

    def train_with(name: str, processes: int, **settings: Any) -> list[float]:
        settings = {"batch_size": 10, "lr": 1e-2, "patience": 0, "precision": precision, **recipe, **settings}
        if processes == 1:
            train(prepared, tmp_path / name, step=step, model=without_batch_norm(), **settings)
        else:
            flags = (ROOT, prepared, tmp_path / name, json.dumps(settings), step.__name__)
            succeed(tmp_path / "train.py", *flags, processes=processes)
        rows = read_csv(tmp_path / name / "log.csv")
        return [float(row[column]) for row in rows for column in ("train_loss", "val_loss")]

    whole = train_with("whole", 1, epochs=3)
    assert whole[-2] < whole[0], "it learns"
    assert train_with("first-two", 2, epochs=2, micro_batch_size=2) == pytest.approx(whole[:4], abs=tolerance)
    assert train_with("first-two", 1, epochs=3, resume=True) == pytest.approx(whole, abs=tolerance)
    train_with("first-one", 1, epochs=1, micro_batch_size=4)
    assert train_with("first-one", 2, epochs=3, resume=True) == pytest.approx(whole, abs=tolerance)


MODELS = {
    "unet": ("", [], ["confusion.png", "predictions.png", "robustness.csv", "robustness.png"]),
    "autoencoder": (
        "segmentation",
        ["--pretrain-epochs", 1, "--skips"],
        ["predictions.png", "reconstruction.json", "reconstructions.png"],
    ),
    "clip_seg": ("", ["--skips"], ["predictions.png"]),
    "point_clip": ("", ["--point-encoding", "disk", "--freeze-encoder"], ["predictions.png", "robustness.csv"]),
}


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_and_score_as_one(prepared, clip_folder, tmp_path, model):
    """Two epochs of training: a parameter without a gradient would show in the second."""
    folder, flags, files = MODELS[model]
    out = tmp_path / "run" / folder
    train_flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 2, *TINY, "--batch-size", 6, *flags]
    train_flags += ["--clip-model", clip_folder] if "clip" in model else []
    result = succeed(f"{model}/train.py", *train_flags, processes=2)
    assert result.stderr.count("synthetic drawings") == 1, "rank 0 alone prints"
    assert [row["epoch"] for row in read_csv(out / "log.csv")] == ["1", "2"]
    assert read_json(out / "config.json")["environment"]["processes"] == 2
    assert load_checkpoint(out / "last.pt", model)["epoch"] == 2

    test_flags = ["--checkpoint", out / "best.pt", "--data", prepared, "--workers", 0, "--device", "cpu"]
    test_flags += ["--perturb", "contrast_decrease", "occlusion"] if "robustness.csv" in files else []
    test_flags += ["--batch-size", 5, "--limit", 11]  # the last batch is one image, which joins the batch before
    alone = succeed(f"{model}/test.py", "--out", tmp_path / "alone", *test_flags)
    together = succeed(f"{model}/test.py", "--out", tmp_path / "together", *test_flags, processes=2)
    assert alone.stdout.replace("/alone/", "/together/") == together.stdout, "printed once, the same"
    scores = [read_json(tmp_path / name / "metrics.json") for name in ("alone", "together")]
    for metrics in scores:
        for key in ("images_per_second", "config", "environment"):
            del metrics[key]
    assert flatten(scores[1]) == pytest.approx(flatten(scores[0]), abs=1e-6)
    masks = [f"masks/{path.name}" for path in (tmp_path / "alone/masks").iterdir()]
    assert len(masks) >= 11
    for name in ("images.csv", *files, *masks):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("alone", "together"))
        assert one == two, name

    if model == "autoencoder":  # the second stage again, with another number of processes
        shutil.rmtree(out)
        succeed("autoencoder/train.py", *train_flags, "--resume")
        assert read_json(out / "config.json")["environment"]["processes"] == 1
        assert load_checkpoint(out / "last.pt", model)["epoch"] == 2


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with paths as keys, for pytest.approx."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: leaf for name, part in value.items() for key, leaf in flatten(part, f"{prefix}/{name}").items()}


def test_photographs_are_shared(prepared, tmp_path):
    checkpoint = save_model(tmp_path / "best.pt", UNet(base_channels=2), "unet", {"base_channels": 2})
    (tmp_path / "pictures").mkdir()
    for path in list((prepared / "Test/color/dogs").iterdir())[:3]:
        shutil.copy(path, tmp_path / "pictures")
    (tmp_path / "pictures/broken.jpg").write_bytes(b"no picture")
    flags = ["--checkpoint", checkpoint, "--out", tmp_path / "masks", "--device", "cpu"]
    result = run("predict.py", tmp_path / "pictures", *flags, processes=2)
    assert result.returncode == 1 and "3 pictures segmented" in result.stderr and "broken.jpg" in result.stderr
    assert len(list((tmp_path / "masks").glob("*_mask.png"))) == 3


def test_fewer_images_than_processes_are_refused(prepared, tmp_path):
    checkpoint = save_model(tmp_path / "best.pt", UNet(base_channels=2), "unet", {"base_channels": 2})
    flags = ["--checkpoint", checkpoint, "--data", prepared, "--limit", 1, "--device", "cpu"]
    result = run("unet/test.py", *flags, processes=2)
    assert result.returncode == 1 and "1 images cannot be shared by 2 processes" in result.stderr


def test_accelerate_launch_starts_a_training(prepared, tmp_path):
    flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 1, *TINY]
    launch = ["--num_processes", 2, "--cpu", ROOT / "unet/train.py"]
    result = succeed("accelerate.commands.launch", *launch, *flags, module=True)
    assert load_checkpoint(tmp_path / "run/last.pt", "unet")["epoch"] == 1
    assert "started one process only; on a CPU torchrun" in result.stderr


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.skipif("WITHOUT_FCNTL" in os.environ, reason="torchrun's interpreters have fcntl: two kinds of locks")
def test_interrupted_group_ends_and_resumes_alone(prepared, tmp_path):
    """Started by torchrun; Ctrl-C in a terminal reaches all processes."""
    out = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, ROOT / "unet/train.py"]
    flags = ["--data", prepared, "--out", out, "--epochs", 10_000, "--patience", 0, *TINY]
    line = [sys.executable, "-m", *map(str, (*torchrun, *flags))]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell runs in the background ignore it
    group = subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    try:
        wait_for_epoch(group, out)
        os.killpg(group.pid, signal.SIGINT)
        assert group.wait(timeout=120) != 0
        with pytest.raises(ProcessLookupError):
            os.killpg(group.pid, 0)  # no process is left
    finally:
        with suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
    stopped = load_checkpoint(out / "last.pt", "unet")["epoch"]
    succeed("unet/train.py", "--out", out, "--resume", "--epochs", stopped + 1)
    assert [int(row["epoch"]) for row in read_csv(out / "log.csv")] == list(range(1, stopped + 2))
