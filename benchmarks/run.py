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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run_quietly(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def in_turn(repeats: int, **works: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each work, one after the other and then in reverse, `repeats` times after a round not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(repeats + 1):
        for name, work in list(works.items())[:: 1 if round_number % 2 else -1]:
            elapsed = timed(work)
            if round_number:
                seconds[name].append(elapsed)
    return seconds


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    return {"median": round(statistics.median(values), digits), "min": round(min(values), digits),
            "max": round(max(values), digits)}  # fmt: skip


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

            @staticmethod
            def set_epoch(epoch: int) -> None: ...

        def __iter__(self):
            return itertools.repeat(batch, steps)

    def step(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    accelerator = Accelerator(cpu=device.type == "cpu")
    model = UNet(base_channels=channels).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
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


def bench_clip(repeats: int) -> dict:
    """ViT-B/32 of full size with random weights: its preparation of images, clicks, and training with it frozen."""
    import torch
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from clip_seg.model import ClipSegmenter, make_encoder
    from point_clip.model import PointClip
    from utils.helper import to_device
    from utils.loss import cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    name = "openai/clip-vit-base-patch32"
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8)
    images = to_device({"image": pictures}, device)["image"]

    def waiting(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            synchronize()

        return run

    encoder = make_encoder(name, frozen=True, random_init=True)[0].to(device).eval()
    bytewise = list(pictures)

    def process(processor: Callable, batch: object, **options: bool) -> Callable[[], None]:
        return waiting(lambda: processor(batch, return_tensors="pt", **options)["pixel_values"].to(device))

    # The report's way: inside `forward`, where a batch is of floats on the device; and from bytes on the host.
    preparation = in_turn(
        repeats,
        own=waiting(lambda: encoder.normalize(encoder.prepare(images))),
        pil_in_forward=waiting(lambda: process(CLIPImageProcessorPil(), list(images.cpu()), do_rescale=False)()),
        torchvision_in_forward=process(CLIPImageProcessor(), images, do_rescale=False),
        pil_of_bytes=process(CLIPImageProcessorPil(), bytewise),
        torchvision_of_bytes=process(CLIPImageProcessor(), bytewise),
    )

    clicks: dict[str, dict] = {}
    points = torch.rand(10, 2, device=device) * 255
    for encoding in ("disk", "heatmap"):
        model = PointClip(encoder, encoding=encoding).to(device, memory_format=torch.channels_last).eval()
        features = model.encode(images[:1])

        def click(count: int, model: PointClip = model) -> None:
            model.decode(model.encode(images[:1]), points[:count], (256, 256))

        with torch.inference_mode():
            seconds = in_turn(
                repeats,
                encode=waiting(lambda model=model: model.encode(images[:1])),
                decode=waiting(lambda model=model, features=features: model.decode(features, points[:1], (256, 256))),
                one_click=waiting(lambda click=click: click(1)),
                ten_clicks=waiting(lambda click=click: click(10)),
            )
        ratios = [ten / one for ten, one in zip(seconds["ten_clicks"], seconds["one_click"])]
        clicks[encoding] = {key: spread(values, 4) for key, values in seconds.items()} | {"ten_to_one": spread(ratios)}

    count = 32 if device.type == "cuda" else 4
    target = torch.randint(0, 3, (count, 256, 256), dtype=torch.uint8, device=device)
    steps: dict[str, Callable[[], None]] = {}
    kept: dict[str, float] = {}
    for kind in ("frozen", "unfrozen"):
        model = ClipSegmenter(make_encoder(name, frozen=kind == "frozen", random_init=True)[0])
        model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-6)

        def step(model: ClipSegmenter = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            cross_entropy(model(images[:count]), target).backward()
            optimizer.step()

        storages: dict[int, int] = {}  # what backward keeps in the encoder: activations, not the weights themselves
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor, storages: dict = storages, weights: set = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.encoder(images[:count])
        del features
        kept[kind] = round(sum(storages.values()) / 2**20, 1)
        steps[kind] = waiting(step)
    training = in_turn(repeats, forward_alone=waiting(lambda: _without_gradients(encoder, images[:count])), **steps)
    return {
        "device": str(device),
        "preparation_of_32_images": {key: spread(values, 4) for key, values in preparation.items()}
        | {
            f"{key}_to_own": spread([a / b for a, b in zip(preparation[key], preparation["own"])], 2)
            for key in preparation
            if key != "own"
        },
        "clicks_on_one_image": clicks,
        "train_step": {"batch_size": count}
        | {f"{key}_seconds": spread(values, 4) for key, values in training.items()}
        | {"encoder_MiB_kept_for_backward": kept},
    }


def _without_gradients(module: Callable, images: object) -> None:
    import torch

    with torch.no_grad():
        module(images)


def bench_sweep(base: Path, repeats: int) -> dict:
    """The eight perturbations of a U-Net against its forward passes alone, and against the way of the report's code.

    That loaded the model and decoded every image again for each point of each curve; here for one point of three.
    """
    import torch

    from dataset.perturbation import PERTURBATIONS, make_damage
    from dataset.pet import make_test_loader
    from unet.model import UNet
    from utils.config import TestConfig
    from utils.dataset import resize_image, to_rgb
    from utils.evaluation import answer_classes, resize_logits
    from utils.files import load_picture
    from utils.helper import load_model, pick_device, save_checkpoint, to_device
    from utils.metric import count_confusion, predict
    from utils.robustness import passes, sweep

    device = pick_device("auto")
    channels, count = (64, 256) if device.type == "cuda" else (16, 4)
    config = TestConfig(data=base, limit=count, perturb=[], batch_size=min(32, count))
    model = UNet(base_channels=channels).to(device, memory_format=torch.channels_last).eval()
    path = base / "unet.pt"
    save_checkpoint(
        path, {"model_name": "unet", "model": model.state_dict(), "model_args": {"base_channels": channels}}
    )
    damage = make_damage(config, 256)
    ways, total = list(PERTURBATIONS.values()), passes(list(PERTURBATIONS.values()))
    batches = [to_device(batch, device) for batch in make_test_loader(config, 256)]
    images = sum(len(batch["image"]) for batch in batches)
    points = (ways[1], ways[2], ways[4])  # without chance, which the report's code drew once a run

    @torch.inference_mode()
    def forward_passes() -> None:
        for _ in range(total):
            for batch in batches:
                predict(model(batch["image"]))
        if device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def plain_points() -> None:
        for way in points:
            fresh, _ = load_model(path, UNet, "unet", device)
            for record in damage.loader.dataset.records:
                picture = resize_image(to_rgb(load_picture(record.image)), 256)
                damaged = way(torch.from_numpy(picture).permute(2, 0, 1)[None], 5)
                label = torch.from_numpy(record.load_label()).to(device)
                logits = fresh(to_device({"image": damaged}, device)["image"])
                count_confusion(predict(resize_logits(logits, label.shape))[0], label, 3).cpu()

    seconds: dict[str, list[float]] = {"sweep": [], "forward_passes_alone": [], "plain_point": []}
    for _ in range(repeats):
        seconds["sweep"].append(timed(lambda: sweep(answer_classes(model), damage, device, 3)))
        seconds["forward_passes_alone"].append(timed(forward_passes))
        seconds["plain_point"].append(timed(plain_points) / len(points))
    pairs = list(zip(*seconds.values()))
    return {
        "device": str(device), "base_channels": channels, "image_size": 256, "images": images, "passes": total,
        **{f"{key}_seconds": spread(values, 2) for key, values in seconds.items()},
        "sweep_to_forward_passes": spread([sweep / alone for sweep, alone, _ in pairs]),
        "plain_to_sweep_per_pass": spread([plain / (sweep / total) for sweep, _, plain in pairs], 2),
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
