"""python benchmarks/run.py [--data DIR] [--out FILE]

Measure script start-up, preparation, loader, train step, CLIP and the sweep over perturbations, the last four beside
what they are compared with.

DIR is a folder of photographs in the Oxford-IIIT layout that is copied, not changed; without it 200 pets are drawn.
Figures are medians over repeats. A figure and its comparison are taken in turn, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import itertools
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

from benchmarks.clip import bench_clip
from benchmarks.sweep import bench_sweep
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
    "utils/report.py",
    "utils/study.py",
)
WARM_UP, SAMPLES = 32, 256


def run_quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def bench_preparation(original: Path, folder: Path, repeats: int) -> dict:
    """Milliseconds an image of the whole script, start-up included, and of a second run that finds nothing to do."""
    images = sum(1 for _ in (original / "images").iterdir())
    first, second = [], []
    for number in range(repeats):
        base = folder / f"prep{number}"
        for part in ("images", "annotations"):
            shutil.copytree(original / part, base / part)
        command = [sys.executable, str(ROOT / SCRIPTS[0]), str(base), "--processes", "2"]
        first.append(timed(lambda command=command: run_quietly(command)))
        second.append(timed(lambda command=command: run_quietly(command)))
        if number:
            shutil.rmtree(base)
    return {
        "images": images, "processes": 2,
        "ms_per_image": spread([1000 * value / images for value in first], 2),
        "second_run_seconds": spread(second),
    }  # fmt: skip


def bench_loader(base: Path, repeats: int) -> dict:
    """Augmented 256x256 training samples per second of one worker: from the cache, and the plain way."""
    import albumentations as A
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    from dataset.augmentation import train_transform
    from dataset.pet import EpochBatches, PetDataset, find_records, make_loader

    records = find_records(base, "TrainVal")
    indices = list(itertools.islice(itertools.cycle(range(len(records))), WARM_UP + SAMPLES))

    class Plain(Dataset):
        """Decode the JPEG, resize, augment with albumentations' default ElasticTransform, in every epoch."""

        def __init__(self):
            self.transform = A.Compose(
                [A.HorizontalFlip(p=0.5), A.Rotate(limit=15, p=0.5), A.ElasticTransform(p=0.5), A.ColorJitter(p=0.5)]
            )

        def __len__(self) -> int:
            return len(indices)

        def __getitem__(self, sample: int) -> tuple[torch.Tensor, torch.Tensor]:
            record = records[indices[sample]]
            image = np.array(Image.open(record.image).convert("RGB").resize((256, 256)))
            mask = np.array(Image.open(record.label).resize((256, 256), Image.Resampling.NEAREST))
            varied = self.transform(image=image, mask=mask)
            return torch.from_numpy(varied["image"].transpose(2, 0, 1).copy()), torch.from_numpy(varied["mask"])

    def samples_per_second(loader: DataLoader) -> float:
        """After the first batches, which wait for the worker to start."""
        batches = iter(loader)
        for _ in range(WARM_UP // 16):
            next(batches)
        return SAMPLES / timed(lambda: list(batches))

    dataset = PetDataset(records, 256, indices=indices, transform=train_transform())
    rates: dict[str, list[float]] = {"cached": [], "plain": []}
    for _ in range(repeats):
        cached = make_loader(dataset, EpochBatches(len(dataset), 16, shuffle=False), workers=1)
        rates["cached"].append(samples_per_second(cached))
        rates["plain"].append(samples_per_second(DataLoader(Plain(), batch_size=16, num_workers=1)))
    return {
        "workers": 1,
        "cached_samples_per_second": spread(rates["cached"], 1),
        "plain_samples_per_second": spread(rates["plain"], 1),
        "ratio": spread([fast / plain for fast, plain in zip(rates["cached"], rates["plain"])], 2),
    }


def bench_train_step(repeats: int) -> dict:
    """Seconds per step of the U-Net in `train_epoch` against the same network in a bare loop, data in memory."""
    import torch
    from accelerate import Accelerator

    from unet.model import UNet
    from utils.config import TrainConfig
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput, train_epoch

    config = TrainConfig()
    device = Accelerator().device
    size, channels, count, steps = (256, 64, 64, 20) if device.type == "cuda" else (128, 16, 8, 5)
    batch = {
        "image": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (count, size, size), dtype=torch.uint8),
    }
    criterion = SegmentationLoss(config.loss, config.boundary)

    class Memory:
        """A loader that yields the same batch."""

        class batch_sampler:
            samples = count * steps
            sizes = (count,) * steps

            @staticmethod
            def set_epoch(epoch: int) -> None: ...

        def __iter__(self):
            return itertools.repeat(batch, steps)

    def step(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    accelerator = Accelerator(cpu=device.type == "cpu")
    model = UNet(base_channels=channels).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def loop() -> None:
        train_epoch(wrapped, step, Memory(), prepared, accelerator, 1, config)
        synchronize()

    def bare() -> None:
        for _ in range(steps):
            image = batch["image"].to(device).float().div(255).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            criterion(model(image), batch["mask"].to(device)).backward()
            optimizer.step()
        synchronize()

    seconds = in_turn(4 * repeats, loop=loop, bare=bare)  # short rounds: a noisy machine drifts over long ones
    return {
        "device": str(device), "image_size": size, "base_channels": channels, "batch_size": count,
        "loop_seconds_per_step": spread([value / steps for value in seconds["loop"]], 4),
        "bare_seconds_per_step": spread([value / steps for value in seconds["bare"]], 4),
        "ratio": spread([a / b for a, b in zip(seconds["loop"], seconds["bare"])]),
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
    args = parser.parse_args()
    if args.data and not (args.data / "images").is_dir():
        parser.error(f"{args.data} holds no images/: expected the Oxford-IIIT layout")
    if args.repeats < 1:
        parser.error(f"--repeats: at least 1, got {args.repeats}")

    import torch

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
        figures["start_up_seconds"] = bench_start(args.repeats)
        figures["preparation"] = bench_preparation(original, folder, args.repeats)
        figures["loader"] = bench_loader(folder / "prep0", args.repeats)
        figures["train_step"] = bench_train_step(args.repeats)
        figures["clip"] = bench_clip(args.repeats)
        figures["sweep"] = bench_sweep(folder / "prep0", min(args.repeats, 3))
    print(json.dumps(figures, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
