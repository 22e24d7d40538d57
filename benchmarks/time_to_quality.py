"""python benchmarks/time_to_quality.py --data DATA --out results/time_to_quality

How long until the masks are good? Train a narrow U-Net on a CPU with the report's recipe in a plain PyTorch loop and
with unet/train.py, and compare when each first reaches the validation mIoU that the plain loop ends with. The seconds
are those since the start of the process: imports, loading, validation and saving included.
"""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import flag, parse
from utils.files import InputError, format_csv, write_bytes, write_json
from utils.script import run_script

ROOT = Path(__file__).resolve().parents[1]
EPOCH = re.compile(r"epoch (\d+)/\d+ .*val_iou_mean ([\d.]+)")
SCRIPTS = {"plain loop": "benchmarks/plain_loop.py", "unet/train.py": "unet/train.py"}


@dataclass
class Config:
    data: Path = flag(Path("Dataset"), "folder prepared by dataset/dataset_prep.py")
    out: Path = flag(Path("runs/time_to_quality"), "folder for the runs, the curve and the figure")
    epochs: int = flag(30, "maximum number of epochs", low=1)
    image_size: int = flag(128, "edge in pixels", low=32)
    base_channels: int = flag(16, "channels of the first level", low=1)
    batch_size: int = flag(16, "images per step", low=1)
    seed: int = flag(0, "seed of both", low=0)


def main() -> None:
    config = parse(Config, __doc__)
    flags = ["--data", config.data, "--epochs", config.epochs, "--image-size", config.image_size, "--device", "cpu"]
    flags += ["--base-channels", config.base_channels, "--batch-size", config.batch_size, "--seed", config.seed]
    curves = {name: train(script, flags, config.out / Path(script).stem) for name, script in SCRIPTS.items()}
    rows = [(name, *row) for name, curve in curves.items() for row in curve]
    write_bytes(config.out / "curves.csv", format_csv(["loop", "epoch", "seconds", "val_iou_mean"], rows))
    target = curves["plain loop"][-1][2]
    plot(curves, target, config.out / "time_to_quality.png")
    reached = {name: next((row[1] for row in curve if row[2] >= target), None) for name, curve in curves.items()}
    if None in reached.values():
        raise InputError(f"unet/train.py did not reach the validation mIoU {target:.3f} of the plain loop")
    ratio = reached["plain loop"] / reached["unet/train.py"]
    write_json(config.out / "time_to_quality.json", {"target": target, "seconds": reached, "ratio": ratio})
    print(f"validation mIoU {target:.3f} after {reached} seconds: {ratio:.2f} times sooner")


def train(script: str, flags: list, out: Path) -> list[tuple[int, float, float]]:
    """Run a training; returns (epoch, seconds since its start, validation mIoU) of each epoch."""
    began, curve, line = time.perf_counter(), [], ""
    command = [sys.executable, str(ROOT / script), *map(str, flags), "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if found := EPOCH.search(line):
                curve.append((int(found[1]), round(time.perf_counter() - began, 2), float(found[2])))
    if process.returncode or not curve:
        raise InputError(f"{script} ended with exit code {process.returncode}: {line.strip()}")
    return curve


def plot(curves: dict[str, list[tuple[int, float, float]]], target: float, path: Path) -> None:
    from matplotlib.figure import Figure

    from utils.figures import save_figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for (name, curve), color, style in zip(curves.items(), ("#d55e00", "#0072b2"), ("--", "-")):
        axis.plot([row[1] for row in curve], [row[2] for row in curve], style, color=color, marker=".", label=name)
    axis.axhline(target, color="grey", linewidth=0.8, label="mIoU that the plain loop ends with")
    axis.set(xlabel="seconds since the start", ylabel="mIoU on validation images", ylim=(0, None), xlim=(0, None))
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    save_figure(figure, path)


if __name__ == "__main__":
    run_script(main)
