"""python study/run.py --data Dataset --out runs/study

The whole study: prepare and explore the data, train every model, test it clean and perturbed, write the report. A study
that was stopped goes on when it is started again with the same flags.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.config import WORKERS, flag, parse, run_script, to_json
from utils.files import InputError, read_json, write_json

# name -> model and its own flags
KINDS: dict[str, tuple[str, list[str]]] = {
    "unet": ("unet", []),
    "autoencoder": ("autoencoder", []),
    "autoencoder-skips": ("autoencoder", ["--skips"]),
    "clip": ("clip_seg", []),
    "clip-skips": ("clip_seg", ["--skips"]),
    "point-heatmap": ("point_clip", ["--point-encoding", "heatmap"]),
    "point-disk": ("point_clip", ["--point-encoding", "disk", "--skips"]),
}
# name -> the flag, and what it takes from a run above it, if that is made
STARTS_FROM: dict[str, dict[str, tuple[str, str]]] = {
    "autoencoder-skips": {"--encoder": ("autoencoder", "reconstruction/best.pt")},
    "point-heatmap": {"--clip-seg": ("clip", "best.pt")},
    "point-disk": {"--clip-seg": ("clip-skips", "best.pt")},
}


LOCK_SECONDS = 10  # a process that was killed takes a moment to let its files go


@dataclass
class Config:
    """Flags of the study; what train.py has, too, means the same there."""

    data: Path = flag(Path("Dataset"), "folder of the data; prepared first")
    synthetic: int | None = flag(None, "draw so many pets into --data first", low=8)
    out: Path = flag(Path("runs/study"), "folder of the runs")
    results: Path | None = flag(None, "folder of the report (default: report/ in --out)")
    models: list[str] | None = flag(None, f"only these of {', '.join(KINDS)}")
    seeds: int = flag(1, "runs of each model, with the seeds 0, 1, ...", low=1)
    epochs: int = flag(50, "most epochs of every training", low=1)
    pretrain_epochs: int = flag(50, "most epochs of the autoencoder's reconstruction", low=1)
    patience: int = flag(3, "stop after so many epochs without a better validation loss (0: never)", low=0)
    lr: float | None = flag(None, "learning rate of every training (default: each model's own)", low=0)
    image_size: int = flag(256, "edge in pixels of the square that images are resized to", low=32)
    base_channels: int = flag(64, "width of every model (a heatmap's decoder takes CLIP's)", low=2)
    batch_size: int = flag(64, "images per step", low=1)
    clip_model: str = flag("openai/clip-vit-base-patch32", "a CLIP of the hub with a vision transformer, or a folder")
    clip_random_init: bool = flag(False, "start from random weights instead of CLIP's")
    perturb: bool = flag(True, "also test under the eight perturbations")
    workers: int = flag(WORKERS, "processes that load and augment (0: none)", low=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to train")


def main() -> None:
    config = parse(Config, __doc__)
    if unknown := set(config.models or []) - set(KINDS):
        raise InputError(f"--models {' '.join(sorted(unknown))}: there are {', '.join(KINDS)}")
    lock = open_study(config)
    draw = ["--synthetic", str(config.synthetic)] if config.synthetic else []
    execute(["dataset/dataset_prep.py", str(config.data), *draw])
    planned = plan(config)
    announce(config, planned)
    check_clip(config, planned)
    write_json(config.out / "config.json", to_json(config))  # now, when all that can be checked was
    execute(["dataset/exploration.py", str(config.data), "--out", str(config.out / "exploration")])
    for number, (folder, model, options) in enumerate(planned, start=1):
        print(f"--- {number} of {len(planned)}: {folder.relative_to(config.out)}", flush=True)
        train_and_test(model, folder, options, test_options(config))
    results = config.results or config.out / "report"
    folders = [str(folder) for folder, _, _ in planned]
    execute(["study/report.py", *folders, "--out", str(results), "--data", str(config.data)])
    lock.close()


def open_study(config: Any) -> IO[str]:
    """Lock the folder of a study, `config.out`, for as long as the file that is returned, or any process that was
    started meanwhile, is open. InputError when another process works there, or it holds a study with other settings.

    How fast it runs, what of it is made, and where data and report are may change.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    lock = (config.out / ".lock").open("w")
    patience = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= patience:
                raise InputError(
                    f"{config.out}: this study is being made by another process, perhaps one that outlived a killed "
                    "study; wait for it, or end it"
                ) from None
            time.sleep(0.1)
    os.set_inheritable(lock.fileno(), True)  # a script that outlives a killed study still holds it
    kept, settings = config.out / "config.json", to_json(config)
    if kept.exists():
        free = {"workers", "device", "results", "data", "models", "perturb"}
        before = read_json(kept)
        changed = [name for name in settings if name not in free and before.get(name) != settings[name]]
        if changed:
            lines = [f"  --{name.replace('_', '-')} was {before.get(name)}, is {settings[name]}" for name in changed]
            raise InputError(
                f"{config.out} holds a study with other settings, see {kept}:\n" + "\n".join(lines)
                + "\nTake them back, or choose another --out."
            )  # fmt: skip
    return lock


def plan(config: Config) -> list[tuple[Path, str, list[str]]]:
    """(folder, model, flags of its train.py) of every run, in order."""
    shared = {
        "--data": config.data, "--epochs": config.epochs, "--patience": config.patience,
        "--image-size": config.image_size, "--batch-size": config.batch_size, "--workers": config.workers,
        "--device": config.device,
    }  # fmt: skip
    if config.lr is not None:
        shared["--lr"] = config.lr
    runs = []
    for seed in range(config.seeds):
        for name, (model, own) in KINDS.items():
            if config.models and name not in config.models:
                continue
            folder = config.out / f"seed{seed}" / name
            options = shared | {"--seed": seed}
            if name != "point-heatmap":
                options["--base-channels"] = config.base_channels
            if model == "autoencoder":
                options["--pretrain-epochs"] = config.pretrain_epochs
            for option, (other, file) in STARTS_FROM.get(name, {}).items():
                if not config.models or other in config.models:
                    options[option] = folder.with_name(other) / file
            flags = [str(part) for pair in options.items() for part in pair] + own
            if model in ("clip_seg", "point_clip"):
                flags += ["--clip-model", config.clip_model, *(["--clip-random-init"] * config.clip_random_init)]
            runs.append((folder, model, flags))
    return runs


def test_options(config: Config) -> list[str]:
    place = ["--data", str(config.data), "--workers", str(config.workers), "--device", config.device]
    return place + ["--perturb"] * config.perturb


def announce(config: Config, planned: Sequence[tuple[Path, str, list[str]]]) -> None:
    """Print what is done and what lies ahead."""
    from dataset.perturbation import PERTURBATIONS
    from utils.robustness import passes

    counts = read_json(config.data / "prep_report.json")["counts"]
    images = {split: sum(counts[split].values()) for split in counts}
    answers = 1 + (passes(list(PERTURBATIONS.values())) if config.perturb else 0)
    lines, ahead = [], 0
    for folder, model, _ in planned:
        trained = (last_stage(folder, model) / "best.pt").exists()
        done = is_tested(folder, model, config.perturb)
        ahead += not done
        state = "done" if done else "begun" if trained or (folder / "config.json").exists() else "ahead"
        lines.append(f"  {folder.relative_to(config.out)}: {state}")
    print(
        f"study of {len(planned)} runs, {ahead} not finished: each at most {config.epochs} epochs on "
        f"{images['TrainVal']} images (balanced, a tenth kept to validate; an autoencoder first up to "
        f"{config.pretrain_epochs} more), then {images['Test']} test images, each answered {answers} times; a report "
        "at the end\n" + "\n".join(lines),
        flush=True,
    )  # fmt: skip


def check_clip(config: Config, planned: Sequence[tuple[Path, str, list[str]]]) -> None:
    """InputError now, not after hours, when the CLIP weights that a run needs cannot be had."""
    needing = [(f, m) for f, m, _ in planned if m in ("clip_seg", "point_clip") and not is_tested(f, m, config.perturb)]
    if needing:
        from clip_seg.weights import load_vision, read_config

        if not config.clip_random_init:
            load_vision(config.clip_model)
        elif Path(config.clip_model).exists():
            read_config(config.clip_model)


def last_stage(folder: Path, model: str) -> Path:
    """Where the segmentation of a run is: the autoencoder's has a folder of its own."""
    return folder / "segmentation" if model == "autoencoder" else folder


def is_tested(folder: Path, model: str, perturbed: bool) -> bool:
    """Whether a run's test.py has written the last of its files."""
    return (last_stage(folder, model) / "test" / ("robustness.json" if perturbed else "metrics.json")).exists()


def train_and_test(model: str, folder: Path, train_flags: Sequence[str], test_flags: Sequence[str]) -> None:
    """Train and test one run as a user would; what is finished is not done again, what was stopped goes on."""
    if is_tested(folder, model, "--perturb" in test_flags):
        return
    resume = ["--resume"] if (folder / "config.json").exists() else []
    execute([f"{model}/train.py", "--out", str(folder), *train_flags, *resume])
    execute([f"{model}/test.py", "--checkpoint", str(last_stage(folder, model) / "best.pt"), *test_flags])


def execute(command: Sequence[str]) -> None:
    """Run a script of the repository; InputError when it fails, KeyboardInterrupt when it was stopped."""
    script, *arguments = command
    process = subprocess.Popen([sys.executable, str(ROOT / script), *arguments], close_fds=False)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was stopped by the same Ctrl-C, and puts its files in order
        raise
    if code == 130:
        raise KeyboardInterrupt
    if code:
        raise InputError(f"{script} failed: mend what it says above, and start the study again")


if __name__ == "__main__":
    run_script(main)
