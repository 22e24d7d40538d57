"""python autoencoder/study.py --data Dataset --out runs/pretraining

Does pre-training help? Trains a head, with and without skips, on the frozen encoder of every reconstruction loss and on
one that was never trained, and a U-Net: same data, same number of epochs, several seeds. A study that was stopped goes
on when it is started again with the same flags. Writes study.json (every run) and table.md.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from study.run import last_stage, open_study, train_and_test
from utils.config import WORKERS, flag, parse, run_script, to_json
from utils.files import read_json, write_bytes, write_json

ENCODERS = ("random", "mse", "ssim", "edge")


@dataclass
class Config:
    """Flags of the study; what train.py has, too, means the same there."""

    data: Path = flag(Path("Dataset"), "folder that dataset/dataset_prep.py prepared")
    out: Path = flag(Path("runs/pretraining"), "folder of the study")
    seeds: int = flag(3, "runs of each kind, with the seeds 0, 1, ...", low=2)
    epochs: int = flag(50, "epochs of every head and of the U-Net; there is no early stopping", low=1)
    pretrain_epochs: int = flag(50, "epochs of every reconstruction", low=1)
    lr: float = flag(1e-3, "learning rate of everything", low=0)
    image_size: int = flag(256, "edge in pixels of the square that images are resized to", low=32)
    base_channels: int = flag(64, "channels of the first level, of the encoder and of the U-Net", low=2)
    batch_size: int = flag(64, "images per step", low=1)
    workers: int = flag(WORKERS, "processes that load and augment (0: none)", low=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to train")


def main() -> None:
    config = parse(Config, __doc__)
    lock = open_study(config)
    write_json(config.out / "config.json", to_json(config))
    test_flags = ["--data", str(config.data), "--device", config.device, "--workers", str(config.workers)]
    planned, runs = plan(config), []
    for number, (seed, name, model, options) in enumerate(planned, start=1):
        print(f"--- {number} of {len(planned)}: {name}, seed {seed}", flush=True)
        folder = config.out / f"seed{seed}" / name
        train_and_test(model, folder, [*train_flags(config, seed), *options], test_flags)
        runs.append({"name": name, "seed": seed, **read_scores(folder, model)})
    write_json(config.out / "study.json", {"config": to_json(config), "runs": runs})
    table = format_table(runs)
    write_bytes(config.out / "table.md", table.encode())
    lock.close()
    print(f"\n{table}\n{config.out / 'study.json'}\n{config.out / 'table.md'}")


def plan(config: Config) -> list[tuple[int, str, str, list[str]]]:
    """(seed, name of the run, model, its own flags) of every run; those that need an encoder come after it."""
    runs = []
    for seed in range(config.seeds):
        for encoder in ENCODERS:
            trained = config.out / f"seed{seed}" / encoder / "reconstruction" / "best.pt"
            learn = ["--pretrain-epochs", str(config.pretrain_epochs), "--pretrain-lr", str(config.lr)]
            learn += ["--reconstruction-loss", encoder]
            reuse = ["--encoder", str(trained)]
            if encoder == "random":
                learn = reuse = ["--encoder", "random"]
            runs.append((seed, encoder, "autoencoder", learn))
            runs.append((seed, f"{encoder}-skips", "autoencoder", [*reuse, "--skips"]))
        runs.append((seed, "unet", "unet", []))
    return runs


def train_flags(config: Config, seed: int) -> list[str]:
    shared = {field.name: getattr(config, field.name) for field in fields(Config)}
    for own in ("out", "seeds", "pretrain_epochs"):
        del shared[own]
    flags = [part for name, value in shared.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [*flags, "--seed", str(seed), "--patience", "0"]


def read_scores(folder: Path, model: str) -> dict[str, Any]:
    """The scores of a finished run: those of its segmentation, and of its reconstruction where it has one."""
    test = last_stage(folder, model) / "test"
    metrics = read_json(test / "metrics.json")
    scores = {key: metrics[key] for key in ("iou", "dice", "accuracy", "pixel_accuracy", "baseline", "epoch", "images")}
    if (test / "reconstruction.json").exists():
        scores["reconstruction"] = read_json(test / "reconstruction.json")["mean"]
    return scores


def format_table(runs: Sequence[dict[str, Any]]) -> str:
    """A Markdown row per kind of run: mean and standard deviation over the seeds, in percent, and PSNR and SSIM."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    lines = [
        "| encoder | head | mIoU | against random | background | cat | dog | PSNR, dB | SSIM |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        own = [run for run in runs if run["name"] == name]
        encoder, _, skips = name.partition("-")
        untrained = [run for run in runs if run["name"] == ("random-skips" if skips else "random")]
        cells = ["trained with the rest", "U-Net"] if encoder == "unet" else [encoder, "skips" if skips else "report's"]
        cells.append(_spread([100 * run["iou"]["mean"] for run in own]))
        gains = [100 * (run["iou"]["mean"] - base["iou"]["mean"]) for run, base in zip(own, untrained)]
        cells.append("" if encoder in ("unet", "random") else _spread(gains, "+.1f"))
        cells += [_spread([100 * run["iou"][label] for run in own]) for label in ("background", "cat", "dog")]
        for score, form in (("psnr", ".1f"), ("ssim", ".3f")):
            values = [run["reconstruction"]["autoencoder"][score] for run in own if "reconstruction" in run]
            cells.append(_spread(values, form) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    baseline = runs[0]["baseline"]["iou"]
    shares = " | ".join(f"{100 * baseline[label]:.1f}" for label in ("background", "cat", "dog"))
    lines.append(f"| | all background | {100 * baseline['mean']:.1f} | | {shares} | | |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+')}}"


if __name__ == "__main__":
    run_script(main)
