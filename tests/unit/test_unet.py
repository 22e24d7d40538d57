"""unet/train.py and unet/test.py as scripts, as a newcomer starts them."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT, TINY, run


@pytest.mark.parametrize("way", ["root", "elsewhere", "module"])
def test_scripts_start_from_anywhere(prepared, tmp_path, way):
    cwd = tmp_path if way == "elsewhere" else ROOT
    names = ["unet.train", "unet.test"] if way == "module" else ["unet/train.py", "unet/test.py"]
    out = tmp_path / "run"
    result = run(
        names[0], "--data", prepared, "--out", out, "--epochs", 1, *TINY, cwd=cwd, module=way == "module"
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    result = run(names[1], "--data", prepared, "--checkpoint", out / "best.pt", cwd=cwd, module=way == "module")
    assert result.returncode == 0, result.stderr
    assert json.loads((out / "test/metrics.json").read_text())["model"] == "unet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}"], "is not prepared. Run: python dataset/dataset_prep.py"),
        (["--data", "{data}", "--batch-size", "500"], "fewer than a batch of 500: use --batch-size 14"),
        (["--data", "{data}", "--resume"], "holds no run"),
        (["--data", "{data}", "--precision", "fp16"], "fp16 needs a GPU"),
    ],
)
def test_training_errors_are_one_line_and_leave_nothing(prepared, tmp_path, arguments, message):
    arguments = [argument.format(tmp=tmp_path, data=prepared) for argument in arguments]
    result = run("unet/train.py", "--out", tmp_path / "out", "--device", "cpu", "--image-size", 32, *arguments)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists(), "a run that could not start does not stand in the way of the next"


def test_resume_with_another_setting(trained, prepared):
    result = run("unet/train.py", "--data", prepared, "--out", trained, "--resume", "--lr", 0.5)
    assert result.returncode == 1 and "--lr is 0.0001 in the run, got 0.5" in result.stderr


def test_test_errors(trained, prepared, tmp_path):
    (tmp_path / "cut.pt").write_bytes((trained / "best.pt").read_bytes()[:5000])
    for checkpoint, message in [(tmp_path / "none.pt", "no such checkpoint"), (tmp_path / "cut.pt", "truncated")]:
        result = run("unet/test.py", "--data", prepared, "--checkpoint", checkpoint)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
