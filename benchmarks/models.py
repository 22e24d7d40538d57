"""Train step and evaluation of every model; the U-Net's step beside a bare loop, from memory, and part by part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from autoencoder.model import Autoencoder, AutoencoderSegmenter
from benchmarks.timing import in_turn, peak_memory, spread, synchronize, timed
from clip_seg.model import ClipSegmenter, make_encoder
from dataset.augmentation import train_transform
from dataset.pet import EpochBatches, PetDataset, find_records, make_loader, make_test_loader
from dataset.pet_heatmap import picture_size, read_points
from point_clip.model import PointClip
from point_clip.scoring import answer_clicks
from unet.model import UNet
from utils.config import TestConfig, TrainConfig
from utils.evaluation import evaluate
from utils.files import InputError
from utils.helper import to_device
from utils.loss import cross_entropy
from utils.metric import count_confusion
from utils.train import StepOutput, compiled, train_epoch

CLIP = "openai/clip-vit-base-patch32"


class Scale(NamedTuple):
    """The report's settings on a GPU; on a CPU small ones, so that a repeat takes seconds."""

    image_size: int
    base_channels: int
    batch_size: int
    steps: int  # of a measurement
    test_images: int


def scale(device: torch.device) -> Scale:
    return Scale(256, 64, 64, 20, 256) if device.type == "cuda" else Scale(128, 16, 4, 10, 16)


def pick() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Memory:
    """A loader that yields the same batch `steps` times."""

    def __init__(self, batch: dict[str, Any], steps: int):
        self.batch = batch
        self.batch_sampler = EpochBatches(len(batch["image"]) * steps, len(batch["image"]), shuffle=False)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.repeat(self.batch, len(self.batch_sampler))


def random_batch(size: int, count: int) -> dict[str, Tensor]:
    return {
        "image": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (count, size, size), dtype=torch.uint8),
        "point": torch.rand(count, 2) * (size - 1),
    }


def segment(model: nn.Module, batch: dict[str, Any]) -> StepOutput:
    logits = model(batch["image"])
    return StepOutput(cross_entropy(logits, batch["mask"]), logits, batch["mask"])


def reconstruct(model: nn.Module, batch: dict[str, Any]) -> StepOutput:
    return StepOutput(nn.functional.mse_loss(model(batch["image"]), batch["image"]))


def click(model: nn.Module, batch: dict[str, Any]) -> StepOutput:
    logits = model(batch["image"], batch["point"])
    two = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return StepOutput(cross_entropy(two, batch["mask"].clamp(max=1)))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad], 1e-6, fused=True
    )


def bench_models(base: Path, repeats: int) -> dict:
    """Images per second of training and evaluation, and memory at the peak; CLIP is ViT-B/32 with random weights."""
    device = pick()
    size, channels, count, steps, test_images = scale(device)
    test_config = TestConfig(data=base, limit=test_images, batch_size=count, workers=0)

    def clip(frozen: bool = False) -> nn.Module:
        return make_encoder(CLIP, frozen=frozen, random_init=True)[0]

    makers: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
        "unet": (lambda: UNet(base_channels=channels), segment),
        "autoencoder reconstruction": (lambda: Autoencoder(base_channels=channels), reconstruct),
        "autoencoder": (lambda: AutoencoderSegmenter(Autoencoder(base_channels=channels).encoder), segment),
        "clip_seg": (lambda: ClipSegmenter(clip()), segment),
        "clip_seg frozen": (lambda: ClipSegmenter(clip(frozen=True)), segment),
        "point_clip heatmap": (lambda: PointClip(clip()), click),
        "point_clip disk": (lambda: PointClip(clip(), encoding="disk"), click),
    }
    figures: dict[str, Any] = {
        "device": str(device), "image_size": size, "base_channels": channels, "batch_size": count,
    }  # fmt: skip
    batch = random_batch(size, count)
    for name, (make, step) in makers.items():
        torch.manual_seed(0)
        model = make().to(device, memory_format=torch.channels_last)
        optimizer = adam(model)
        rounds = 1 if "clip" in name and device.type == "cpu" else steps  # a step of ViT-B/32 takes seconds there

        def train(
            network: nn.Module,
            precision: torch.dtype | None,
            step: Callable = step,
            optimizer: Any = optimizer,
            rounds: int = rounds,
        ) -> None:
            network.train()
            for _ in range(rounds):
                optimizer.zero_grad()
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    loss = step(network, to_device(batch, device)).loss
                loss.backward()
                optimizer.step()
            synchronize(device)

        works: dict[str, Callable[[], None]] = {
            "fp32": lambda model=model, train=train: train(model, None),
            "bf16": lambda model=model, train=train: train(model, torch.bfloat16),
        }
        peak = peak_memory(device, works["fp32"])
        with suppress(InputError):  # a machine without a compiler has the other figures
            fast = compiled(model, device)
            works["compiled"] = lambda fast=fast, train=train: train(fast, None)
        seconds = in_turn(repeats, **works)

        def faster(than_fp32: str, seconds: dict[str, list[float]] = seconds) -> dict[str, float]:
            return spread([one / other for one, other in zip(seconds["fp32"], seconds[than_fp32])], 2)

        figures[name] = {
            "train_images_per_second": {
                key: spread([rounds * count / value for value in values], 1) for key, values in seconds.items()
            },
            "bf16_to_fp32": faster("bf16"),
            "compiled_to_eager": faster("compiled") if "compiled" in seconds else None,
            "train_MiB": peak,
        }
        if step is not reconstruct:
            figures[name] |= bench_evaluation(model, test_config, size, device, repeats)
        torch.compiler.reset()
    return figures


def bench_evaluation(
    model: nn.Module, config: TestConfig, size: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    """Loading and scoring at each image's own size, beside the forward passes alone."""
    loader = make_test_loader(config, size)
    records = loader.dataset.records
    model.eval()
    batches = [to_device(batch, device) for batch in loader]
    if isinstance(model, PointClip):
        prompts = {
            record.name: (picture_size(record.image), clicks) for record, clicks in zip(records, read_points(records))
        }
        answer = answer_clicks(model, prompts, size)

        @torch.inference_mode()
        def score() -> None:
            for batch in loader:
                for prediction, target in answer(to_device(batch, device)):
                    count_confusion(prediction, target, 2).cpu()

        def forward(batch: dict[str, Any]) -> Tensor:
            return model.encode(batch["image"])
    else:

        def score() -> None:
            evaluate(model, loader, device)

        def forward(batch: dict[str, Any]) -> Tensor:
            return model(batch["image"])

    @torch.inference_mode()
    def forward_alone() -> None:
        for batch in batches:
            forward(batch)
        synchronize(device)

    peak = peak_memory(device, score)
    seconds = in_turn(repeats, evaluation=score, forward_alone=forward_alone)
    return {
        "test_images_per_second": {
            key: spread([len(records) / value for value in values], 1) for key, values in seconds.items()
        },
        "test_MiB": peak,
    }


def bench_train_step(base: Path, repeats: int) -> dict:
    """The U-Net's step in `train_epoch`: beside a bare loop of the same network, and fed by the loader, not memory."""
    device = pick()
    size, channels, count, steps, _ = scale(device)
    config = TrainConfig()
    accelerator = Accelerator(cpu=device.type == "cpu")
    batch = random_batch(size, count)
    model = UNet(base_channels=channels).to(device, memory_format=torch.channels_last).train()
    optimizer = adam(model)
    wrapped, prepared = accelerator.prepare(model, optimizer)

    records = find_records(base, "TrainVal")
    indices = list(itertools.islice(itertools.cycle(range(len(records))), count * steps))
    dataset = PetDataset(records, size, indices=indices, transform=train_transform())
    loader = make_loader(dataset, EpochBatches(len(dataset), count, shuffle=True), config.workers)

    def loop(loader: Any) -> None:
        train_epoch(wrapped, segment, loader, prepared, accelerator, 1, config)
        synchronize(device)

    def bare() -> None:
        for _ in range(steps):
            image = batch["image"].to(device).float().div(255).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            cross_entropy(model(image), batch["mask"].to(device)).backward()
            optimizer.step()
        synchronize(device)

    memory = Memory(batch, steps)
    # Short rounds: a noisy machine drifts over long ones.
    seconds = in_turn(4 * repeats, loop=lambda: loop(memory), bare=bare, from_the_loader=lambda: loop(loader))
    return {
        "device": str(device), "image_size": size, "base_channels": channels, "batch_size": count,
        "workers": loader.num_workers,
        **{f"{key}_seconds_per_step": spread([v / steps for v in values], 4) for key, values in seconds.items()},
        "ratio": spread([a / b for a, b in zip(seconds["loop"], seconds["bare"])]),
        "from_the_loader_to_memory": spread([a / b for a, b in zip(seconds["from_the_loader"], seconds["loop"])]),
    }  # fmt: skip


def bench_step_parts(repeats: int) -> dict:
    """Milliseconds of each part of the U-Net's step, the device waited for after each.

    Before: planes of channels, Adam without fusing, the loss read in every step. After: channels last, fused, not read.
    """
    device = pick()
    size, channels, count, steps, _ = scale(device)
    batch = random_batch(size, count)
    stacks: dict[str, dict[str, Callable[[], object]]] = {}
    for when, layout, fused in (("before", torch.contiguous_format, False), ("after", torch.channels_last, True)):
        torch.manual_seed(0)
        model = UNet(base_channels=channels).to(device, memory_format=layout).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-6, fused=fused, foreach=False)
        stacks[when] = step_parts(model, optimizer, batch, layout, device)
    del stacks["after"]["reading the loss"]
    taken: dict[str, list[dict[str, float]]] = {when: [] for when in stacks}
    for _ in range(steps * repeats + 1):
        for when, parts in stacks.items():
            taken[when].append({name: 1000 * timed(part) for name, part in parts.items()})
    figures: dict[str, Any] = {
        "device": str(device), "image_size": size, "base_channels": channels, "batch_size": count,
    }  # fmt: skip
    for when, rounds in taken.items():
        rounds = [one | {"whole step": sum(one.values())} for one in rounds[1:]]  # the first is not counted
        figures[when] = {name: spread([one[name] for one in rounds], 2) for name in rounds[0]}
    return figures


def step_parts(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    layout: torch.memory_format,
    device: torch.device,
) -> dict[str, Callable[[], object]]:
    """The parts of a training step by name, to be called in this order; each waits for the device."""
    state: dict[str, Tensor] = {}

    def to_input() -> None:
        state["image"] = batch["image"].to(device).float().div(255).contiguous(memory_format=layout)
        state["mask"] = batch["mask"].to(device)

    def forward() -> None:
        state["logits"] = model(state["image"])

    def loss() -> None:
        state["loss"] = cross_entropy(state["logits"], state["mask"])

    def waiting(part: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            part()
            synchronize(device)

        return run

    parts = {
        "input": to_input, "forward": forward, "loss": loss, "backward": lambda: state["loss"].backward(),
        "optimizer": optimizer.step, "clear the gradients": optimizer.zero_grad,
        "reading the loss": lambda: state["loss"].item(),
    }  # fmt: skip
    return {name: waiting(part) for name, part in parts.items()}
