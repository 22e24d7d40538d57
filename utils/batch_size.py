"""How a step is cut into batches: as the flags say, as it fits in memory, as the processes share it."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.config import TrainConfig
from utils.distributed import gather, world
from utils.files import InputError, read_json
from utils.helper import to_device

log = logging.getLogger(__name__)

AUTO_IMAGES = 64  # of a step, with `--batch-size auto`


class Cut(NamedTuple):
    """A step is over `accumulate` batches of `batch_size` images in each of `processes`."""

    batch_size: int
    accumulate: int
    processes: int


def starting_cut(config: TrainConfig) -> Cut | None:
    """The cut that the flags ask for; None for `--batch-size auto`. A run that is resumed has that of its config.json,
    and a step keeps its images, however many processes share them now; InputError where they cannot."""
    kept = config.out / "config.json"
    if config.resume and kept.exists() and (step := read_json(kept).get("step")):
        return share_anew(Cut(**step), config.out)
    return None if config.batch_size == "auto" else Cut(config.batch_size, config.accumulate, world())


def share_anew(before: Cut, out: Path) -> Cut:
    """A cut of as many images for the processes that there are, its batches as near as can be in size."""
    if before.processes == world():
        return before
    images = before.batch_size * before.accumulate * before.processes
    if images % world():
        raise InputError(
            f"--resume: {before.processes} processes made steps of {images} images in {out}, "
            f"which {world()} cannot share evenly"
        )
    share = images // world()
    size = min(divisors(share), key=lambda part: abs(part - before.batch_size))
    cut = Cut(size, share // size, world())
    log.info("%s: a step is still %d images: %s", out, images, cut)
    return cut


def find_cut(
    config: TrainConfig, model: nn.Module, step: Callable, loader: DataLoader, accelerator: Accelerator
) -> Cut:
    """The cut of `--batch-size auto`: 64 images a step, or all that there are, in the fewest equal batches that fit.

    So the memory decides how a step is made, not what it learns (but for batch norm).
    """
    if config.accumulate != 1:
        raise InputError("--batch-size auto sets --accumulate itself: leave that out")
    share = min(AUTO_IMAGES, loader.batch_sampler.samples) // world()

    def attempt(size: int) -> None:
        items = [loader.dataset[number % len(loader.dataset)] for number in range(size)]
        try_step(model, step, to_device(loader.collate_fn(items), accelerator.device), accelerator)

    sizes = divisors(share)
    size = min(gather([fitting_size(attempt, sizes, accelerator.device)]))  # the same for all processes
    cut = Cut(size, share // size, world())
    log.info("--batch-size auto: %s", cut)
    return cut


def divisors(number: int) -> list[int]:
    """From 1 to the number itself."""
    return [part for part in range(1, number + 1) if number % part == 0]


def fitting_size(attempt: Callable[[int], None], sizes: list[int], device: torch.device) -> int:
    """The largest of the ascending `sizes` for which `attempt(size)` does not run out of memory; InputError for none.

    A CPU does not say that its memory is full, the kernel kills the process. There it is the largest of which the
    backward pass keeps no more than half of what is free: as much again is needed at its peak.
    """
    if device.type == "cpu":
        room = psutil.virtual_memory().available / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        image = kept_for_backward(lambda: attempt(2)) - kept_for_backward(lambda: attempt(1))  # without the weights
        sizes = [size for size in sizes if size * image <= room]
        if sizes:
            return sizes[-1]
    for size in reversed(sizes):
        try:
            attempt(size + size // 10 + 1)  # a margin: a process may have one image more, and memory has gaps
            return size
        except RuntimeError as error:
            if not should_reduce_batch_size(error) and "ALLOC_FAILED" not in str(error):
                raise
        clear_device_cache(garbage_collection=True)
    raise InputError("--batch-size auto: not even one image fits in memory. Use a smaller --image-size or model")


def kept_for_backward(work: Callable[[], None]) -> int:
    """Bytes of the tensors that the forward passes in `work` keep for their backward passes."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


def try_step(model: nn.Module, step: Callable, batch: dict[str, Any], accelerator: Accelerator) -> None:
    """One step of the optimizer on a copy of the model."""
    probe = copy.deepcopy(model).to(accelerator.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam([parameter for parameter in probe.parameters() if parameter.requires_grad], lr=0)
    with accelerator.autocast():
        loss = step(probe, batch).loss
    loss.backward()
    optimizer.step()
