"""utils/loader.py: the batch sampler, the loader, and batches on the device."""

import math
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataset.augmentation import train_transform
from dataset.pet import PetDataset, find_records
from tests.helpers import CPU
from utils.loader import EpochBatchSampler, collate, make_loader, prepare_batch

counts = st.integers(1, 50)
batch_sizes = st.integers(1, 16)
micro_batch_sizes = st.none() | st.integers(1, 6)
world_sizes = st.integers(1, 3)


def make_sampler(samples, *sizes, rank=0, world_size=1, epoch=0):
    sampler = EpochBatchSampler(samples, *sizes, shuffle=True, seed=1)
    sampler.rank, sampler.world_size = rank, world_size
    sampler.set_epoch(epoch)
    return sampler


def list_steps(sampler):
    """The samples of each micro-batch of each step."""
    micro_batches = iter(sampler)
    return [[[sample for _, sample in next(micro_batches)] for _ in range(count)] for _, count in sampler.batches()]


@given(counts, batch_sizes, micro_batch_sizes, world_sizes, st.integers(0, 3))
def test_every_sample_comes_once_per_epoch(samples, batch_size, micro, world_size, epoch):
    seen, steps = [], set()
    for rank in range(world_size):
        sampler = make_sampler(samples, batch_size, micro, rank=rank, world_size=world_size, epoch=epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) and all(keys)
        assert all(key[0] == epoch for batch in keys for key in batch)
        seen += [sample for batch in keys for _, sample in batch]
        steps.add(len(sampler.batches()))
    assert sorted(seen) == list(range(samples))
    assert len(steps) == 1, "all ranks take as many steps"


@given(counts, batch_sizes, micro_batch_sizes, world_sizes)
def test_steps_do_not_depend_on_the_number_of_processes(samples, batch_size, micro, world_size):
    """Neither their images nor their number, except for a last step with fewer images than processes."""
    whole = [set(chain(*step)) for step in list_steps(make_sampler(samples, batch_size))]
    ranks = range(world_size)
    samplers = [make_sampler(samples, batch_size, micro, rank=rank, world_size=world_size) for rank in ranks]
    shares = [[list(chain(*step)) for step in list_steps(sampler)] for sampler in samplers]
    shared = [set(chain(*parts)) for parts in zip(*shares)]
    if samples % batch_size < world_size and 0 < samples % batch_size < samples:
        assert shared == [*whole[:-2], whole[-2] | whole[-1]], "the last step is merged into the previous one"
    else:
        assert shared == whole
    for parts in zip(*shares):
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
    for sampler in samplers:
        assert [size for size, _ in sampler.batches()] == [len(step) for step in shared]


@given(counts, batch_sizes, st.integers(1, 6))
def test_micro_batches_have_about_the_same_size(samples, batch_size, micro):
    for step in list_steps(make_sampler(samples, batch_size, micro)):
        lengths = [len(part) for part in step]
        assert max(lengths) <= micro and max(lengths) - min(lengths) <= 1
        assert len(lengths) == math.ceil(sum(lengths) / micro), "as few as possible"


def test_order_depends_on_the_seed_and_the_epoch_or_is_that_of_the_data():
    def order(seed, epoch):
        sampler = EpochBatchSampler(50, 8, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return [sample for batch in sampler for _, sample in batch]

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    sampler = EpochBatchSampler(5, 2, shuffle=False)
    assert list(sampler) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]


def test_any_number_of_workers_gives_the_same_batches(prepared):
    records = find_records(prepared, "TrainVal")
    streams = []
    for workers in (0, 1, 2):
        dataset = PetDataset(records, 32, transform=train_transform(), seed=3)
        loader = make_loader(dataset, EpochBatchSampler(len(dataset), 4, shuffle=True, seed=3), workers, CPU)
        batches = []
        for epoch in (1, 2):
            loader.batch_sampler.set_epoch(epoch)
            batches += [(batch["name"], batch["image"], batch["mask"]) for batch in loader]
        streams.append(batches)
    for stream in streams[1:]:
        for (name, image, mask), (same_name, same_image, same_mask) in zip(streams[0], stream, strict=True):
            assert name == same_name and torch.equal(image, same_image) and torch.equal(mask, same_mask)
    first, second = streams[0][:3], streams[0][3:]
    assert sum(image.sum() for _, image, _ in first) != sum(image.sum() for _, image, _ in second), "augmented"


def test_loader_does_not_draw_from_the_models_random_stream(prepared):
    dataset = PetDataset(find_records(prepared, "TrainVal"), 32)
    state = torch.get_rng_state()
    for workers in (0, 1):
        list(make_loader(dataset, EpochBatchSampler(len(dataset), 4, shuffle=True), workers, CPU))
        assert torch.equal(torch.get_rng_state(), state)


def test_collate_stacks_tensors_and_lists_the_rest():
    labels = [np.zeros((2, 3)), np.zeros((4, 1))]
    batch = collate([{"image": torch.full((1,), i), "label": labels[i], "name": str(i)} for i in range(2)])
    assert batch["image"].tolist() == [[0], [1]] and batch["name"] == ["0", "1"]
    assert batch["label"][0] is labels[0] and batch["label"][1] is labels[1]


def test_images_become_floats_on_the_device():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    batch = prepare_batch({"image": image, "name": ["a", "b"], "mask": torch.full((2, 4, 4), 255)}, CPU)
    assert batch["image"][1, :, 2, 3].tolist() == pytest.approx([0, 0.2, 1])
    assert batch["image"].is_contiguous(memory_format=torch.channels_last)
    assert batch["name"] == ["a", "b"] and (batch["mask"] == 255).all()
