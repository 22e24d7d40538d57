"""Training scripts from outside: how they start, how they are stopped, and how they continue."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch._inductor.config
from torch import nn

from benchmarks.time_to_quality import EPOCH, SCRIPTS
from tests.helpers import (
    ENVIRONMENT,
    ROOT,
    TINY,
    assert_same_weights,
    command,
    fail,
    succeed,
    train,
    wait_for_epoch,
)
from utils import run as run_module
from utils.files import InputError, read_csv, read_json
from utils.helper import load_checkpoint


def assert_epochs(out: Path, epochs: int) -> None:
    assert [int(row["epoch"]) for row in read_csv(out / "log.csv")] == list(range(1, epochs + 1))


def test_scripts_start_from_the_root_and_as_modules(prepared, tmp_path):
    """`succeed` starts all others from another folder."""
    out = tmp_path / "run"
    succeed("unet.train", "--data", prepared, "--out", out, "--epochs", 1, *TINY, cwd=ROOT, module=True)
    for script, module in (("unet.test", True), ("unet/test.py", False)):
        flags = ["--data", prepared, "--checkpoint", out / "best.pt", "--device", "cpu", "--workers", 0, "--limit", 4]
        succeed(script, *flags, cwd=ROOT, module=module)
        assert read_json(out / "test/metrics.json")["images"] == 4
        shutil.rmtree(out / "test")


def test_errors_are_one_line(prepared, trained, tmp_path):
    before = (trained / "last.pt").read_bytes()
    flags = ["unet/train.py", "--data", prepared, "--out", trained]
    fail(*flags, *TINY, message="holds another run")
    fail(*flags, "--resume", "--lr", 0.5, message="--lr is 0.0001 in the run, got 0.5")
    assert (trained / "last.pt").read_bytes() == before
    (tmp_path / "file").touch()
    fail("unet/train.py", "--data", prepared, "--out", tmp_path / "file", *TINY, message=f"'{tmp_path / 'file'}'")
    fail("unet/train.py", "--loss", "hinge", message="expected one of cross-entropy", code=2)


def start_in_fork(out: Path, *flags: object) -> BaseProcess:
    """unet/train.py in a fork of this process, which has imported the heavy libraries."""

    def main() -> None:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (1, 2):
            os.dup2(null, stream)
        sys.argv = ["unet/train.py", "--out", str(out), *map(str, flags)]
        runpy.run_path(str(ROOT / "unet/train.py"), run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


def saved_at(out: Path) -> int:
    return (out / "last.pt").stat().st_mtime_ns if (out / "last.pt").exists() else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ten_kills_do_not_change_the_run(prepared, tmp_path):
    """SIGKILL at random moments: the checkpoints always load, and the resumed run ends with the same weights."""
    epochs = 30
    flags = ["--data", prepared, "--epochs", epochs, "--patience", 0, *TINY]
    began = time.perf_counter()
    whole = start_in_fork(tmp_path / "whole", *flags)
    whole.join()
    seconds = time.perf_counter() - began
    assert whole.exitcode == 0

    out, chance, seen = tmp_path / "killed", random.Random(0), set()
    for attempt in range(10):
        before = saved_at(out)
        resume = ["--resume"] if (out / "config.json").exists() else []
        # The last one has a worker, which holds the lock of the folder until it notices that its parent died.
        process = start_in_fork(out, *flags, *resume, "--workers", attempt // 9)
        if attempt % 2:  # while it trains
            while process.is_alive() and saved_at(out) == before:
                process.join(0.01)
            process.join(chance.uniform(0, 0.2))
        else:  # at any moment, also while it starts
            process.join(chance.uniform(0, seconds / 5))
        process.kill()
        process.join()
        for file in ("last.pt", "best.pt"):
            if (out / file).exists():
                seen.add(load_checkpoint(out / file, "unet")["epoch"])
    assert max(seen) > 0 and len(seen) > 3

    succeed("unet/train.py", "--out", out, "--resume", "--workers", 0)
    for file in ("last.pt", "best.pt"):
        expected, found = (load_checkpoint(folder / file, "unet") for folder in (tmp_path / "whole", out))
        assert expected["epoch"] == found["epoch"]
        assert_same_weights(expected, found)
    assert_epochs(out, epochs)
    assert not list(out.glob(".*.tmp")), "files of the killed processes are removed"


def test_sigterm_ends_a_training_that_resumes(prepared, tmp_path, monkeypatch):
    """Its workers end with it, and meanwhile nobody else trains into its folder."""
    out = tmp_path / "run"
    flags = ["--data", prepared, "--out", out, "--epochs", 10_000, "--patience", 0, *TINY, "--workers", 1]
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(command("unet/train.py", *flags), env=ENVIRONMENT, stderr=errors)
    try:
        wait_for_epoch(process, out)
        monkeypatch.setattr(run_module, "LOCK_SECONDS", 0)
        with pytest.raises(InputError, match="another process is training into this folder"):
            train(prepared, out, epochs=1, resume=True)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        code = process.wait(timeout=60)
    finally:
        process.kill()
    text = (tmp_path / "errors").read_text()
    assert code == 143, text
    said, terminated, _ = text.partition("terminated")  # after it a worker may complain that its pipe has closed
    assert "--resume continues after it" in said and terminated and "Traceback" not in said
    assert workers and not psutil.wait_procs(workers, timeout=10)[1], "the workers are gone"

    stopped = load_checkpoint(out / "last.pt", "unet")["epoch"]
    succeed("unet/train.py", "--out", out, "--resume", "--epochs", stopped + 1, "--workers", 0)
    assert_epochs(out, stopped + 1)


SIGNAL_IN_EPOCH_2 = """
import os, signal, sys
from pathlib import Path

number = int(sys.argv.pop(1))
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs that a shell runs in the background ignore it
sys.argv[0] = sys.argv.pop(1)
sys.path.insert(0, str(Path(sys.argv[0]).parents[1]))
import dataset.pet
from utils.script import run_script

load = dataset.pet.PetDataset.__getitem__


def load_until_epoch_2(self, key):
    if key[0] == 2 and self.transform:
        os.kill(os.getpid(), number)
    return load(self, key)


dataset.pet.PetDataset.__getitem__ = load_until_epoch_2
from unet.train import main

run_script(main)
"""


@pytest.mark.parametrize(
    ("number", "workers", "code", "message"),
    [
        (signal.SIGINT, 0, 130, "stopped"),
        (signal.SIGTERM, 0, 143, "terminated"),
        (signal.SIGKILL, 1, 1, "error: a worker that loads images was killed"),
    ],
    ids=["ctrl-c", "sigterm", "sigkill-of-a-worker"],
)
def test_signals_end_the_run_and_keep_the_checkpoint(prepared, tmp_path, number, workers, code, message):
    """SIGKILL is how the kernel ends a process when memory is short."""
    (tmp_path / "script.py").write_text(SIGNAL_IN_EPOCH_2)
    flags = ["--data", prepared, "--out", tmp_path / "run", "--epochs", 3, *TINY, "--workers", workers]
    fail(tmp_path / "script.py", int(number), ROOT / "unet/train.py", *flags, message=message, code=code)
    assert load_checkpoint(tmp_path / "run/last.pt", "unet")["epoch"] == 1


@pytest.mark.skipif("WITHOUT_FCNTL" in os.environ, reason="PyTorch's compiler locks its cache with fcntl on Unix")
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_compiled_run_has_the_losses_of_the_plain_one(prepared, tmp_path):
    def train_with(**settings) -> dict:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1))
        # All images in a batch: another size would be compiled again.
        return train(prepared, tmp_path / str(settings), model=model, epochs=2, batch_size=12, **settings)

    plain, compiled = train_with(), train_with(compile=True)
    assert compiled["model"].keys() == plain["model"].keys(), "the names are those of the model itself"
    for one, two in zip(plain["log"], compiled["log"], strict=True):
        for loss in ("train_loss", "val_loss"):
            assert two[loss] == pytest.approx(one[loss], rel=1e-4)


def test_compile_without_a_compiler_is_refused(prepared, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"--compile needs a C\+\+ compiler \(apt-get install g\+\+\)"):
        train(prepared, tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


def test_plain_loop_and_training_print_the_curve_that_their_benchmark_reads(prepared, tmp_path):
    flags = ["--data", prepared, "--epochs", 2, "--patience", 0, "--precision", "fp32", *TINY]
    curves = []
    for number, script in enumerate(SCRIPTS.values()):
        lines = succeed(script, *flags, "--out", tmp_path / str(number)).stderr.splitlines()
        curves.append([found.groups() for line in lines if (found := EPOCH.search(line))])
    plain, ours = curves
    assert [epoch for epoch, _ in plain] == ["1", "2"]
    assert [float(iou) for _, iou in ours] == pytest.approx([float(iou) for _, iou in plain], abs=0.01), "one recipe"
