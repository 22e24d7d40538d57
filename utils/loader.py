"""From a data set to batches: the sampler, the loader, and batches on the device."""

import math
import os
import signal
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from utils.distributed import rank, world_size
from utils.machine import default_workers


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


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack tensors; labels at their own sizes and names become lists."""
    columns = {key: [item[key] for item in items] for key in items[0]}
    return {key: torch.stack(values) if torch.is_tensor(values[0]) else values for key, values in columns.items()}


def _start_worker(worker: int) -> None:
    cv2.setNumThreads(0)
    # Ctrl-C reaches the whole process group; the parent then stops its workers, for which SIGTERM must end them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_loader(dataset: Dataset, sampler: EpochBatchSampler, workers: int | None, device: torch.device) -> DataLoader:
    """A DataLoader over the sampler's micro-batches for a model on `device`, with `--workers`.

    `loader.batch_sampler.set_epoch` sets the epoch.
    """
    workers = default_workers(device.type) if workers is None else workers
    workers = min(workers, len(sampler), os.cpu_count() or 1)
    if not workers:
        threads = torch.get_num_threads()
        cv2.setNumThreads(threads if threads > 1 else 0)  # 0: no pool of threads; with 1 a forked process can hang
    return DataLoader(
        dataset,
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
