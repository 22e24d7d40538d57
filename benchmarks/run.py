"""python benchmarks/run.py [--data DIR] [--out FILE]

Measure script start-up, preparation, the loader, training and evaluation of every model, CLIP and the sweep over
perturbations, beside what they are compared with.

DIR is a folder of photographs in the Oxford-IIIT layout that is copied, not changed; without it 200 pets are drawn.
Figures are medians over repeats. A figure and its comparison are taken in turn, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timing import in_turn, spread, timed

SCRIPTS = (
    "dataset/dataset_prep.py",
    "unet/train.py",
    "unet/test.py",
    "autoencoder/train.py",
    "autoencoder/test.py",
    "autoencoder/study.py",
    "clip_seg/train.py",
    "clip_seg/test.py",
    "point_clip/train.py",
    "point_clip/test.py",
    "dataset/exploration.py",
    "dataset/perturbation.py",
    "study/report.py",
    "study/run.py",
)
PARTS = (
    "start_up_seconds", "preparation", "loader", "loader_parts", "train_step", "train_step_parts", "models", "clip",
    "sweep",
)  # fmt: skip


def run_quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def copy(original: Path, base: Path) -> None:
    for part in ("images", "annotations"):
        shutil.copytree(original / part, base / part)


def prepare(base: Path) -> None:
    run_quietly([sys.executable, str(ROOT / SCRIPTS[0]), str(base), "--processes", "2"])


def bench_preparation(original: Path, folder: Path, repeats: int) -> dict:
    """Milliseconds an image of the whole script, start-up included, and of a second run that finds nothing to do."""
    images = sum(1 for _ in (original / "images").iterdir())
    first, second = [], []
    for _ in range(repeats):
        base = folder / "again"
        copy(original, base)
        first.append(timed(lambda base=base: prepare(base)))
        second.append(timed(lambda base=base: prepare(base)))
        shutil.rmtree(base)
    return {
        "images": images, "processes": 2,
        "ms_per_image": spread([1000 * value / images for value in first], 2),
        "second_run_seconds": spread(second),
    }  # fmt: skip


def bench_start(repeats: int) -> dict:
    """Seconds until `--help` has answered."""
    works = {
        script: (lambda script=script: run_quietly([sys.executable, str(ROOT / script), "--help"]))
        for script in SCRIPTS
    }
    return {script: spread(values) for script, values in in_turn(repeats, **works).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="photographs in the Oxford-IIIT layout (default: draws some)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure only these")
    args = parser.parse_args()
    if args.data and not (args.data / "images").is_dir():
        parser.error(f"{args.data} holds no images/: expected the Oxford-IIIT layout")
    if args.repeats < 1:
        parser.error(f"--repeats: at least 1, got {args.repeats}")

    # Heavy imports come after parsing, so that --help answers at once.
    import torch

    from benchmarks.clip import bench_clip
    from benchmarks.loader import bench_loader, bench_parts
    from benchmarks.models import bench_models, bench_step_parts, bench_train_step
    from benchmarks.sweep import bench_sweep
    from dataset.synthetic import draw_dataset

    figures: dict = {
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "torch": torch.__version__,
                     "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "data": str(args.data.name) if args.data else "200 synthetic pets",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        original = args.data or folder / "drawn"
        if args.data is None:
            draw_dataset(original, 200)
        base, few = folder / "prepared", min(args.repeats, 3)
        copy(original, base)
        prepare(base)
        benches = {
            "start_up_seconds": lambda: bench_start(args.repeats),
            "preparation": lambda: bench_preparation(original, folder, args.repeats),
            "loader": lambda: bench_loader(base, args.repeats),
            "loader_parts": lambda: bench_parts(base, args.repeats),
            "train_step": lambda: bench_train_step(base, args.repeats),
            "train_step_parts": lambda: bench_step_parts(args.repeats),
            "models": lambda: bench_models(base, few),
            "clip": lambda: bench_clip(args.repeats),
            "sweep": lambda: bench_sweep(base, few),
        }
        for name in args.only:
            figures[name] = benches[name]()
            print("\n".join(format_rows(name, figures[name])), flush=True)
            if args.out:  # after every part: what is measured is not lost
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(figures, indent=2) + "\n")


def format_rows(name: str, figures: object) -> list[str]:
    """A line per figure: its name, the median and the range, or the value."""
    if isinstance(figures, dict) and "median" in figures:
        return [f"{name:66}{figures['median']:>10} ({figures['min']} to {figures['max']})"]
    if isinstance(figures, dict):
        return [line for key, part in figures.items() for line in format_rows(f"{name}.{key}", part)]
    return [f"{name:66}{figures!s:>10}"]


if __name__ == "__main__":
    main()
