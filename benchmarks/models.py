"""Images per second and memory of training, for every experiment; CLIP has random weights."""

from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from benchmarks.timing import DEVICE, compare
from clip_seg.config import DEFAULT_CLIP
from clip_seg.model import make_encoder
from models import MODELS
from point_clip.model import PointClip
from study import experiments
from tests.helpers import peak_memory, segmentation_step
from utils.config import TrainConfig
from utils.files import InputError
from utils.loader import EpochBatchSampler, prepare_batch
from utils.loss import cross_entropy
from utils.run import start_run
from utils.train import compile_model, train_one_epoch

# On a GPU the report's settings, on a CPU small ones.
SIZE, CHANNELS, BATCH, STEPS = (256, 64, 64, 20) if DEVICE.type == "cuda" else (128, 16, 4, 10)


class Training:
    """Steps of a bare training loop on one batch in memory; PointClip gets two clicks on each image."""

    def __init__(self, model: nn.Module, steps: int = STEPS):
        self.model, self.steps = model.to(DEVICE, memory_format=torch.channels_last).train(), steps
        self.optimizer = torch.optim.Adam([w for w in model.parameters() if w.requires_grad], 1e-6, fused=True)
        self.points = [torch.rand(2 * BATCH, 2, device=DEVICE) * (SIZE - 1)] if isinstance(model, PointClip) else []
        masks = torch.randint(0, 2, (2 * BATCH if self.points else BATCH, SIZE, SIZE), dtype=torch.uint8)
        self.batch = {"image": torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8), "mask": masks}

    def __call__(self, network: nn.Module | None = None, bf16: bool = False) -> None:
        for _ in range(self.steps):
            batch = prepare_batch(self.batch, DEVICE)
            self.optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                logits = (self.model if network is None else network)(batch["image"], *self.points)
                logits = torch.cat([torch.zeros_like(logits), logits], dim=1) if self.points else logits
                loss = cross_entropy(logits, batch["mask"])
            loss.backward()
            self.optimizer.step()


class MemoryLoader(list):
    batch_sampler = EpochBatchSampler(BATCH * STEPS, BATCH, shuffle=False)


def measure(base: Path, repeats: int) -> dict:
    figures = {"image_size": SIZE, "base_channels": CHANNELS, "batch_size": BATCH}
    for experiment in experiments.EXPERIMENTS:
        figures[experiment.name] = measure_training(build_model(experiment), min(repeats, 3))
    unet = build_model(experiments.EXPERIMENTS[0])
    run = start_run(TrainConfig(out=base / "run", device=DEVICE.type, precision="fp32"), "unet")
    bare = Training(unet)
    model, optimizer = run.accelerator.prepare(unet, bare.optimizer)
    loop = partial(train_one_epoch, model, segmentation_step, MemoryLoader([bare.batch] * STEPS), optimizer, run, 1)
    return figures | {"unet_step": compare(4 * repeats, {"bare_loop": bare, "training_loop": loop}, STEPS)}


def build_model(experiment: experiments.Experiment, base_channels: int = CHANNELS) -> nn.Module:
    options = {"skips": True} if "--skips" in experiment.flags else {}
    options |= {"encoding": "disk"} if "disk" in experiment.flags else {}
    is_clip = "clip" in experiment.model
    options |= (
        {"encoder": make_encoder(DEFAULT_CLIP, random_init=True)[1]} if is_clip else {"base_channels": base_channels}
    )
    build = getattr(import_module(f"{experiment.model}.model"), MODELS[experiment.model].build)
    return build(**options).to(DEVICE, memory_format=torch.channels_last)


def measure_training(model: nn.Module, repeats: int) -> dict:
    is_slow = DEVICE.type == "cpu" and hasattr(model.encoder, "vision")  # ViT-B/32 needs seconds for a step
    train = Training(model, 1 if is_slow else STEPS)
    variants, memory = {"fp32": train, "bf16": partial(train, bf16=True)}, peak_memory(DEVICE, train)
    torch.compiler.reset()
    with suppress(InputError):  # without a compiler the other figures are still measured
        variants["compiled"] = partial(train, compile_model(model, DEVICE))
    return {"training": compare(repeats, variants, train.steps * BATCH, rate=True), "training_MiB": memory}
