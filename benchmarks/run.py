"""python benchmarks/run.py [--data ORIGINALS] [--out FILE] [--only NAME ...]

Measure speed and memory; README.md in this folder describes the figures.
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pprint import pprint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import flag, parse
from utils.files import InputError, write_json
from utils.script import run_script

BENCHMARKS = ("startup", "cpu_step", "loader", "models", "evaluation", "clip")  # files of this folder


@dataclass
class Config:
    data: Path | None = flag(None, "photographs in the Oxford-IIIT layout; they are copied (default: draw 200 pets)")
    out: Path | None = flag(None, "write the figures to this JSON file")
    only: list[str] | None = flag(None, f"only some of {', '.join(BENCHMARKS)}")
    repeats: int = flag(5, "repeats of each figure; of the models at most 3", low=1)


def main() -> None:
    config = parse(Config, __doc__)
    if unknown := set(config.only or []) - set(BENCHMARKS):
        raise InputError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(BENCHMARKS)}")
    if config.data and not (config.data / "annotations").is_dir():
        raise InputError(f"{config.data} has no annotations/: expected the Oxford-IIIT layout")

    from benchmarks.timing import DEVICE
    from dataset.dataset_prep import prepare
    from dataset.synthetic import draw_dataset
    from utils.distributed import pick_precision
    from utils.helper import describe_environment

    figures = {"environment": describe_environment(DEVICE, pick_precision("auto", DEVICE))}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        shutil.copytree(config.data, base, dirs_exist_ok=True) if config.data else draw_dataset(base, 200)
        prepare(base)
        for name in config.only or BENCHMARKS:
            figures[name] = import_module(f"benchmarks.{name}").measure(base, config.repeats)
            pprint({name: figures[name]}, width=120, sort_dicts=False)
            if config.out:
                write_json(config.out, figures)


if __name__ == "__main__":
    run_script(main)
