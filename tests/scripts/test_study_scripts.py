"""study/run.py with real scripts: stopped and killed, it continues to the same result."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import runpy
import signal
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from study import run as study
from tests.helpers import TINY, assert_same_weights, fail, succeed
from tests.launcher import HEAVY
from utils.files import read_json
from utils.helper import load_checkpoint
from utils.script import run_script

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


class Script:
    """subprocess.Popen of a Python script, in a fork of this process, which has imported the heavy libraries."""

    def __init__(self, line: list[str]):
        def main() -> None:
            sys.argv = line[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")

        self.process = FORK.Process(target=main)
        self.process.start()
        self.terminate = self.process.terminate

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


class Study:
    """study/run.py in a fork that has a process group of its own. Without `explore` it leaves out the exploration."""

    def __init__(self, *flags: object, explore: bool = True):
        self.output, end = os.pipe()

        def start(line: list[str]) -> Any:
            left_out = line[1].endswith("exploration.py") and not explore
            return SimpleNamespace(wait=lambda: 0) if left_out else Script(line)

        def main() -> None:
            os.setsid()
            for stream in (1, 2):
                os.dup2(end, stream)
            os.close(end)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
            logging.getLogger().handlers.clear()  # pytest's
            sys.argv = ["study/run.py", *map(str, flags)]
            study.subprocess = SimpleNamespace(Popen=start)
            run_script(study.main)

        self.process = FORK.Process(target=main)
        self.process.start()
        os.close(end)

    def read_until(self, text: str | None) -> str:
        """Read what the study and its scripts print until it contains `text`; with None until all of them have ended.

        The end of the pipe is reached when no process is left that could write to it.
        """
        seen = ""
        while text is None or text not in seen:
            chunk = os.read(self.output, 4096).decode(errors="replace")
            if not chunk:
                assert text is None, f"the study ended before it printed {text!r}: {seen}"
                os.close(self.output)
                self.process.join()
                break
            seen += chunk
        return seen


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can neither fork nor kill a process group")
def test_stopped_and_killed_study_ends_with_the_same_weights(tmp_path):
    """SIGTERM for the study in training, then SIGKILL for all of its processes in testing."""
    data, out = tmp_path / "data", tmp_path / "study"
    training = ["--epochs", 8, "--patience", 0, *TINY]
    flags = ["--data", data, "--synthetic", 24, "--out", out, "--only", "unet", "--no-perturb", "--", *training]
    folder = out / "seed0/unet"
    for name in HEAVY:
        importlib.import_module(name)

    stopped = Study(*flags, explore=False)
    stopped.read_until("epoch 2/")
    stopped.process.terminate()
    printed = stopped.read_until(None)
    assert stopped.process.exitcode == 143 and "Traceback" not in printed, printed
    assert 1 <= load_checkpoint(folder / "last.pt", "unet")["epoch"] <= 8 and not (folder / "test").exists()

    killed = Study(*flags, explore=False)
    killed.read_until("test:   0%")
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.read_until(None)
    assert not (folder / "test/metrics.json").exists()

    last = Study(*flags)
    printed = last.read_until(None)
    assert last.process.exitcode == 0, printed
    assert f"study of 1 runs\n  {folder}: to do, 8 epochs" in printed
    assert read_json(folder / "test/metrics.json")["images"] == 12
    assert (out / "report/report.md").is_file() and (out / "exploration/summary.json").is_file()
    whole = tmp_path / "whole"
    succeed("unet/train.py", "--data", data, "--out", whole, "--seed", 0, *training)
    one, two = (load_checkpoint(path / "last.pt", "unet") for path in (folder, whole))
    assert one["epoch"] == two["epoch"] == 8
    assert_same_weights(one, two)


def test_failing_script_ends_the_study(tmp_path):
    message = "dataset/dataset_prep.py failed: fix the error above, then start the study again"
    fail("study/run.py", "--data", tmp_path / "none", "--out", tmp_path / "out", "--only", "unet", message=message)
    assert not (tmp_path / "out").exists()
