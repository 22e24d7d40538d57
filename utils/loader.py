"""From a data set to batches: the sampler, the loader, and batches on the device."""

import logging
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.distributed import rank, world_size
from utils.files import InputError
from utils.machine import default_workers, processes_here

log = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")  # of Linux, where loader workers put their batches
BATCHES_PER_WORKER = 3  # two that PyTorch prefetches, and one in use


class EpochBatchSampler(Sampler[list[tuple[int, int]]]):
    """Micro-batches of (epoch, sample) keys: every sample once per epoch, in an order that depends on (seed, epoch).

    A batch is `batch_size` samples, shared by all ranks: rank r of w takes every w-th sample from the r-th on. Each
    rank splits it into micro-batches of at most `micro_batch_size` (None: one), as equal as possible. A last batch with
    fewer samples than ranks is merged into the previous one, so that no rank is left without a sample.
    """

    def __init__(
        self, samples: int, batch_size: int, micro_batch_size: int | None = None, *, shuffle: bool, seed: int = 0
    ):
        self.samples, self.batch_size, self.micro_batch_size = samples, batch_size, micro_batch_size
        self.rank, self.world_size = rank(), world_size()
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def batches(self) -> list[tuple[int, int]]:
        """Of each batch: its number of samples over all ranks, and its number of micro-batches in this rank."""
        whole, rest = divmod(self.samples, self.batch_size)
        sizes = [self.batch_size] * whole
        if rest >= self.world_size or (rest and not whole):
            sizes.append(rest)
        elif rest:
            sizes[-1] += rest
        limit = self.micro_batch_size or self.samples
        return [(size, math.ceil(len(range(self.rank, size, self.world_size)) / limit)) for size in sizes]

    def has_several(self, batch_size: int) -> bool:
        """Whether any rank has more than one micro-batch in a batch of this size."""
        return math.ceil(batch_size / self.world_size) > (self.micro_batch_size or batch_size)

    def __len__(self) -> int:
        return sum(micro_batches for _, micro_batches in self.batches())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.samples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples)
        for size, micro_batches in self.batches():
            batch, order = order[:size], order[size:]
            if micro_batches:
                for part in np.array_split(batch[self.rank :: self.world_size], micro_batches):
                    yield [(self.epoch, int(sample)) for sample in part]


class ErrorsAsItems(Dataset):
    """A data set whose errors are returned as items, so that they cross from a worker process as they are: PyTorch
    would wrap them in a traceback of twenty lines. `Loader` raises them."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except (InputError, OSError, MemoryError) as error:
            return error


class Loader(DataLoader):
    """A DataLoader that raises the errors of its data set without those of the worker process around them."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors; labels at their own sizes and names become lists. An error among the items is the result."""
    if error := next((item for item in items if isinstance(item, Exception)), None):
        return error
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {key: torch.stack(values) if torch.is_tensor(values[0]) else values for key, values in columns.items()}


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    # Ctrl-C reaches the whole process group; the parent then stops its workers, for which SIGTERM must end them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def limit_workers(workers: int, dataset: Dataset, sampler: EpochBatchSampler) -> int:
    """The workers whose batches fit in the shared memory through which they reach this process, at most `workers`.

    Docker gives a container 64 MB of it; a worker that finds it full dies, and the training would wait forever.
    """
    if not SHARED_MEMORY.is_dir():
        return workers
    item = dataset[0, 0]
    images = max(math.ceil(size / count / sampler.world_size) for size, count in sampler.batches() if count)
    batch = 1 + images * sum(value.nbytes for value in item.values() if torch.is_tensor(value))
    free = shutil.disk_usage(SHARED_MEMORY).free // processes_here()
    fitting = free // (BATCHES_PER_WORKER * batch)
    if fitting < workers:
        needed = f"{workers} workers need {math.ceil(workers * BATCHES_PER_WORKER * batch / 1e6)} MB"
        hint = "Docker: docker run --shm-size 2g, or --ipc=host"
        log.warning("%s has %d MB free, %s: using %d of them (%s)", SHARED_MEMORY, free / 1e6, needed, fitting, hint)
    return min(workers, fitting)


def make_loader(dataset: Dataset, sampler: EpochBatchSampler, workers: int | None, device: torch.device) -> DataLoader:
    """A DataLoader over the sampler's micro-batches for a model on `device`, with `--workers`.

    `loader.batch_sampler.set_epoch` sets the epoch.
    """
    workers = default_workers(device.type) if workers is None else workers
    workers = min(workers, len(sampler), os.cpu_count() or 1)
    if workers:
        workers = limit_workers(workers, dataset, sampler)
    if not workers:
        threads = torch.get_num_threads()
        cv2.setNumThreads(threads if threads > 1 else 0)  # 0: no pool of threads; with 1 a forked process can hang
    return Loader(
        ErrorsAsItems(dataset),
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        # Its own generator: the loader draws from it, and the model's random stream must not depend on the workers.
        generator=torch.Generator(),
    )


def prepare_batch(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch's tensors to the device; `image` changes there from uint8 to float in [0, 1], channels last."""
    batch = {key: part.to(device, non_blocking=True) if torch.is_tensor(part) else part for key, part in batch.items()}
    batch["image"] = batch["image"].float().div_(255).contiguous(memory_format=torch.channels_last)
    return batch
