"""Seconds of whole processes: `--help` of every script, and the preparation of a data set, per image."""

import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.timing import compare

ROOT = Path(__file__).resolve().parents[1]


def measure(base: Path, repeats: int) -> dict:
    files = sorted([*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")])
    scripts = [str(path.relative_to(ROOT)) for path in files if path.read_text("utf-8").endswith("run_script(main)\n")]
    run = partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)
    prepare = partial(run, [sys.executable, "dataset/dataset_prep.py", base, "--processes", "2"])

    def prepare_originals() -> None:
        shutil.rmtree(base / "TrainVal")
        shutil.rmtree(base / "Test")
        prepare()

    starts = {path: compare(repeats, {"help": partial(run, [sys.executable, path, "--help"])}) for path in scripts}
    images, runs = len(list((base / "images").iterdir())), {"first_run": prepare_originals, "second_run": prepare}
    return starts | {"preparation_per_image": compare(repeats, runs, images)}
