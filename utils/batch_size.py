"""How a step is cut into batches: by what fits in memory (`--batch-size auto`), by how many processes share it."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader

from utils.config import TrainConfig
from utils.files import InputError, read_json
from utils.helper import to_device
from utils.processes import gather, world

log = logging.getLogger(__name__)


def settle_batch_size(
    config: TrainConfig,
    model: nn.Module,
    step: Callable,
    loaders: tuple[DataLoader, DataLoader],
    accelerator: Accelerator,
) -> TrainConfig:
    """`config` with the `--batch-size` and `--accumulate` to train with, to which the loaders' batches are set, too.

    With "auto" a step of the optimizer is over as many images as the training loader's batches had, in the fewest equal
    parts that fit in memory. So the memory decides how a step is made, not what it learns (but for batch norm). In a
    run that is resumed a step keeps its images, however many processes share them now.

    InputError where not even one image fits, they cannot be shared, or `--accumulate` was given beside "auto".
    """
    kept = config.out / "config.json"
    if config.resume and kept.exists():
        size, parts = shared_anew(read_json(kept), config)
    elif config.batch_size != "auto":
        return config
    elif config.accumulate != 1:
        raise InputError("--batch-size auto sets --accumulate itself: leave that out")
    else:
        whole, dataset, collate = loaders[0].batch_sampler.batch_size, loaders[0].dataset, loaders[0].collate_fn

        def attempt(size: int) -> None:
            batch = to_device(collate([dataset[sample] for sample in range(size)]), accelerator.device)
            try_step(model, step, batch, accelerator)

        most = min(gather([fitting_size(attempt, whole, accelerator.device)]))  # the same for all processes
        parts = min(2**power for power in range(whole.bit_length()) if whole // 2**power <= most)
        size = whole // parts
        log.info("--batch-size auto: %d batches of %d images make a step", parts, size)
    for loader in loaders:
        loader.batch_sampler.batch_size = size
    return dataclasses.replace(config, batch_size=size, accumulate=parts)


def shared_anew(kept: dict[str, Any], config: TrainConfig) -> tuple[int, int]:
    """Batch size and accumulation with which a step of a resumed run, whose config.json is `kept`, keeps its images."""
    size, before = kept["batch_size"], kept["environment"]["processes"]
    images = size * kept["accumulate"] * before
    if images % world():
        raise InputError(
            f"--resume: the {before} processes of {config.out} made steps of {images} images, "
            f"which {world()} cannot share"
        )
    share = images // world()
    size = max(part for part in range(1, min(size, share) + 1) if share % part == 0)
    return size, share // size


def fitting_size(attempt: Callable[[int], None], most: int, device: torch.device) -> int:
    """The largest batch for which `attempt(size)` does not run out of memory, of `most`, its half, its quarter, ...

    A CPU does not say that its memory is full, the kernel kills the process. There it is the largest batch of which the
    backward pass keeps no more than half of what is free: as much again is needed at its peak.
    """
    if device.type == "cpu":
        most = min(most, psutil.virtual_memory().available // 2 // kept_for_backward(lambda: attempt(1)))
    while most:
        if device.type == "cpu":
            return most
        try:
            attempt(most)
            return most
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
        clear_device_cache(garbage_collection=True)
        most //= 2
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
    probe = copy.deepcopy(model).to(accelerator.device).train()
    optimizer = torch.optim.Adam([parameter for parameter in probe.parameters() if parameter.requires_grad], lr=0)
    with accelerator.autocast():
        loss = step(probe, batch).loss
    loss.backward()
    optimizer.step()
