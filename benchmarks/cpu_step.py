"""Training steps on a CPU: a plain PyTorch loop, and ours with its parts switched on one after the other.

Each measurement is a process of its own: python benchmarks/cpu_step.py MODEL VARIANT prints it as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.machine import keep_freed_memory

SIZE, WARM_UP, STEPS = 256, 1, 3
BATCHES = {
    "unet_16_channels": 16, "unet": 4, "autoencoder_reconstruction": 16, "autoencoder_head": 16, "clip": 8,
    "point_disk": 8,
}  # fmt: skip
# The parts of ours that each variant uses. "plain": float32, contiguous tensors, Adam without fusing, `loss.item()`.
VARIANTS = {
    "plain": (),
    "memory": ("memory",),
    "channels_last": ("memory", "layout"),
    "fused_adam": ("memory", "layout", "fused"),
    "ours": ("memory", "layout", "fused", "bf16"),
}
EVERY_PART = ("unet_16_channels",)  # the other models: the first and the last variant, at most three times


def measure(_: Path, repeats: int) -> dict:
    from benchmarks.timing import summarize

    if sys.platform != "linux":
        return {"skipped": "page faults and peak memory are counted as on Linux"}
    peaks = [run("mm") for _ in range(repeats)]
    mm = {name: median(peak[name] for peak in peaks) for name in peaks[0]}
    figures = {"mm_GFLOP_per_second": mm}
    for model in BATCHES:
        variants = list(VARIANTS) if model in EVERY_PART else ["plain", "ours"]
        rows = {variant: [] for variant in variants}
        for repeat in range(repeats if model in EVERY_PART else min(repeats, 3)):
            for variant in variants[:: 1 if repeat % 2 else -1]:
                rows[variant].append(run(model, variant))
        columns = {key: {name: [row[key] for row in rows[name]] for name in variants} for key in rows["plain"][0]}
        shares = {
            name: columns["GFLOP"][name][0] / median(columns["seconds"][name]) / mm[precision(VARIANTS[name])]
            for name in variants
        }
        figures[model] = {
            "batch_size": BATCHES[model],
            "GFLOP_per_step": columns["GFLOP"]["plain"][0],
            "seconds_per_step": summarize(columns["seconds"]),
            "share_of_mm": {name: round(share, 3) for name, share in shares.items()},
            "page_faults_per_step": {name: median(values) for name, values in columns["faults"].items()},
            "peak_MiB": {name: median(values) for name, values in columns["MiB"].items()},
        }
    return figures


def precision(parts: tuple[str, ...]) -> str:
    """The precision of a variant: bf16 if it is among the parts and this CPU supports it, else fp32."""
    import torch

    from utils.distributed import pick_precision

    return pick_precision("auto", torch.device("cpu")) if "bf16" in parts else "fp32"


def run(*arguments: str) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_mm() -> dict[str, float]:
    """GFLOP/s of a matrix product of 4096 x 4096."""
    import torch
    from torch.utils.benchmark import Timer

    rates, size = {}, 4096
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrices = {"a": torch.rand(size, size).to(dtype), "b": torch.rand(size, size).to(dtype), "mm": torch.mm}
        timer = Timer("mm(a, b)", globals=matrices, num_threads=torch.get_num_threads())
        rates[name] = 2e-9 * size**3 / timer.timeit(5).median
    return rates


def measure_step(model_name: str, parts: tuple[str, ...]) -> dict[str, float]:
    """Seconds and page faults of a step (medians), billions of floating-point operations, and the peak memory."""
    import resource
    from timeit import default_timer

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from utils.distributed import autocast

    torch.manual_seed(0)
    memory_format = torch.channels_last if "layout" in parts else torch.contiguous_format
    model, loss_of, batch_size = *build(model_name), BATCHES[model_name]
    model = model.to("cpu", memory_format=memory_format).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-4, fused=True if "fused" in parts else None)
    pixels = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    mask = torch.randint(0, 2, (batch_size, SIZE, SIZE), dtype=torch.uint8)

    def step() -> None:
        image = pixels.float().div_(255).contiguous(memory_format=memory_format)
        optimizer.zero_grad()
        with autocast(torch.device("cpu"), precision(parts)):
            loss = loss_of(model, image, mask)
        loss.backward()
        optimizer.step()
        if "fused" not in parts:
            loss.item()

    seconds, faults = [], []
    for _ in range(WARM_UP + STEPS):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, default_timer()
        step()
        seconds.append(default_timer() - began)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with FlopCounterMode(display=False) as counter:
        step()
    return {
        "seconds": median(seconds[WARM_UP:]),
        "faults": median(faults[WARM_UP:]),
        "MiB": round(peak),
        "GFLOP": counter.get_total_flops() / 1e9,
    }


def build(name: str) -> tuple[object, Callable]:
    """A model with random weights, and the loss of (model, image, mask)."""
    import torch
    from torch.nn import functional as F

    from autoencoder.model import Autoencoder
    from benchmarks.models import build_model
    from study.experiments import EXPERIMENTS
    from unet.model import UNet
    from utils.loss import cross_entropy

    def segment(model, image, mask):
        return cross_entropy(model(image), mask)

    def reconstruct(model, image, mask):
        return F.mse_loss(model(image), image)

    def click(model, image, mask):
        points = torch.rand(len(image), 2) * (SIZE - 1)
        logits = model(image, points)
        return cross_entropy(torch.cat([torch.zeros_like(logits), logits], dim=1), mask)

    if name == "unet_16_channels":
        return UNet(base_channels=16), segment
    if name == "autoencoder_reconstruction":
        return Autoencoder(), reconstruct
    experiments = {"unet": "unet", "autoencoder_head": "autoencoder", "clip": "clip", "point_disk": "point-disk"}
    experiment = next(one for one in EXPERIMENTS if one.name == experiments[name])
    return build_model(experiment, base_channels=64), click if name == "point_disk" else segment


if __name__ == "__main__":
    if sys.argv[1] == "mm":
        keep_freed_memory()
        print(json.dumps(measure_mm()))
    else:
        parts = VARIANTS[sys.argv[2]]
        if "memory" in parts:
            keep_freed_memory()
        print(json.dumps(measure_step(sys.argv[1], parts)))
