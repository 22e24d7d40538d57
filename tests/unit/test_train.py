"""utils/train.py: early stopping, the log, micro-batches, and `fit`."""

import copy
import csv
import itertools
import math

import pytest
import torch
from torch import nn

from dataset.pet import PetDataset, find_records, make_train_sets
from tests.helpers import (
    CPU,
    UNET_ARGS,
    assert_same_weights,
    every_pixel_step,
    scale_loss,
    segmentation_step,
    train,
    train_config,
    without_batch_norm,
)
from unet.model import UNet
from utils import train as train_module
from utils.config import TrainConfig, recipe_defaults
from utils.files import InputError
from utils.helper import load_checkpoint
from utils.loader import EpochBatchSampler, make_loader, prepare_batch
from utils.run import start_run
from utils.train import EarlyStopping, TrainingLog, find_micro_batch_size, learning_rate, make_optimizer


def test_early_stopping_counts_epochs_without_improvement():
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    for loss, stop in [(1.0, False), (0.95, False), (0.85, False), (0.84, False), (0.80, True)]:
        stopping.update(loss)
        assert stopping.should_stop == stop, loss
    never = EarlyStopping(patience=0, min_delta=0)
    for _ in range(10):
        never.update(1.0)
    assert not never.should_stop
    exact = EarlyStopping(patience=1, min_delta=0.5)
    exact.update(1.0)
    exact.update(0.5)
    assert exact.best == 0.5 and not exact.should_stop, "an improvement of exactly min_delta counts"


def test_log_continues_after_the_rows_of_the_checkpoint(tmp_path):
    first = TrainingLog(tmp_path)
    first.add({"epoch": 1, "val_loss": 0.5})
    first.add({"epoch": 2, "val_loss": 0.4})
    resumed = TrainingLog(tmp_path, first.rows[:1])  # epoch 2 was logged, but its checkpoint was not written
    resumed.add({"epoch": 2, "val_loss": 0.3})
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert rows == [{"epoch": "1", "val_loss": "0.5"}, {"epoch": "2", "val_loss": "0.3"}]


def assert_same_run(first, second):
    """The same but for what depends on the machine's speed."""
    assert_same_weights(first, second)
    for one, two in zip(first["log"], second["log"], strict=True):
        assert {**one, "seconds": 0, "images_per_second": 0} == {**two, "seconds": 0, "images_per_second": 0}
    for key in ("stopping", "best_value", "epoch"):
        assert first[key] == second[key], key
    trained = [last.get("trained", {}) for last in (first, second)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert first.get("averaged") == second.get("averaged")
    states = (last["optimizer"]["state"].values() for last in (first, second))
    for one, two in zip(*states, strict=True):
        assert all(torch.equal(one[moment], two[moment]) for moment in ("step", "exp_avg", "exp_avg_sq"))
    assert torch.equal(first["random_state"]["cpu"], second["random_state"]["cpu"])


def interrupted_at(call):
    """A step that Ctrl-C interrupts at its n-th call, from 1."""
    calls = itertools.count(1)

    def step(model, batch):
        if next(calls) == call:
            raise KeyboardInterrupt
        return segmentation_step(model, batch)

    return step


STRONG = recipe_defaults(TrainConfig, "strong") | {
    "warmup": 0.5, "ema": 0.9, "paste": 0.5, "augment": "strong", "loss": "cross-entropy+dice",
}  # fmt: skip


@pytest.mark.parametrize(("precision", "recipe"), [("fp32", {"lr": 1e-2}), ("bf16", {"lr": 1e-2}), ("fp32", STRONG)])
def test_resumed_run_equals_the_uninterrupted_one(prepared, tmp_path, precision, recipe):
    """Bit for bit, with dropout and a learning rate that falls, after Ctrl-C in the first and in the third epoch."""
    steps = 4  # of an epoch: three to train and one to validate

    def train_part(folder, **settings):
        torch.manual_seed(1)
        model = nn.Sequential(UNet(**UNET_ARGS), nn.Dropout2d(0.3))
        settings |= {**recipe, "epochs": 4, "patience": 0, "schedule": "cosine", "precision": precision}
        return train(prepared, tmp_path / folder, model=model, **settings)

    whole = train_part("whole")
    assert ("trained" in whole) == ("ema" in recipe)
    with pytest.raises(KeyboardInterrupt):
        train_part("parts", step=interrupted_at(2))
    assert load_checkpoint(tmp_path / "parts/last.pt", "unet")["epoch"] == 0
    with pytest.raises(KeyboardInterrupt):
        train_part("parts", step=interrupted_at(2 * steps + 2), resume=True)
    assert load_checkpoint(tmp_path / "parts/last.pt", "unet")["epoch"] == 2
    assert_same_run(train_part("parts", resume=True, workers=2), whole)


@pytest.mark.parametrize(("schedule", "warmup"), [("constant", 0), ("cosine", 0), ("cosine", 1.5), ("constant", 0.25)])
def test_learning_rate_of_each_step(schedule, warmup):
    config = TrainConfig(epochs=4, lr=0.5, schedule=schedule, warmup=warmup)
    rates = [learning_rate(config, (step + 0.5) / 8) for step in range(32)]
    rising = [rate for step, rate in enumerate(rates) if (step + 0.5) / 8 < warmup]
    assert rising == pytest.approx([0.5 * (step + 0.5) / 8 / warmup for step in range(len(rising))])
    assert len(rising) == math.ceil(8 * warmup - 0.5) and all(0 < rate <= 0.5 for rate in rates)
    rest = rates[len(rising) :]
    assert rest == sorted(rest, reverse=True) and (rest[-1] < 0.01) == (schedule == "cosine")
    if schedule == "cosine" and not warmup:
        assert rates[8] == pytest.approx(0.5 * (1 + math.cos(math.pi * 8.5 / 32)) / 2)


def test_moving_average_by_hand(prepared, tmp_path):
    """The averaged weights are in `model`, those that the optimizer changes in `trained`."""
    seen = []

    def step(model, batch):
        if model.training:
            seen.append([parameter.detach().clone() for parameter in model.parameters()])
        return segmentation_step(model, batch)

    last = train(prepared, tmp_path, step=step, epochs=2, patience=0, ema=0.5)
    names = [name for name, _ in UNet(**UNET_ARGS).named_parameters()]
    after = [*seen[1:], [last["trained"][name] for name in names]]  # the weights after each step
    average = after[0]
    for number, weights in enumerate(after[1:], start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        average = [decay * one + (1 - decay) * other for one, other in zip(average, weights)]
    for name, expected in zip(names, average):
        torch.testing.assert_close(last["model"][name], expected, rtol=1e-4, atol=1e-6)
    assert last["averaged"] == len(after)
    best = load_checkpoint(tmp_path / "best.pt")
    assert "trained" not in best


def test_best_checkpoint_by_loss_or_by_miou(prepared, tmp_path, caplog):
    caplog.set_level("INFO")
    for select, key, sign in (("loss", "val_loss", 1), ("miou", "val_iou_mean", -1)):
        last = train(prepared, tmp_path / select, epochs=4, patience=0, lr=3e-2, select=select)
        best = min(last["log"], key=lambda row: sign * row[key])
        assert load_checkpoint(tmp_path / select / "best.pt")["epoch"] == best["epoch"]
        assert f"Best epoch {best['epoch']}" in caplog.messages[-1]


def test_vectors_have_no_weight_decay():
    optimizer = make_optimizer(UNet(**UNET_ARGS), TrainConfig(weight_decay=0.1, optimizer="adamw"))
    decayed, others = (group["params"] for group in optimizer.param_groups)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(one.ndim > 1 for one in decayed) and all(one.ndim == 1 for one in others)
    assert len(decayed) + len(others) == len(list(UNet(**UNET_ARGS).parameters()))


def test_longer_run_equals_the_one_with_more_epochs(prepared, tmp_path):
    whole = train(prepared, tmp_path / "whole", epochs=4, patience=0)
    train(prepared, tmp_path / "parts", epochs=2, patience=0)
    torch.manual_seed(99)
    assert_same_run(train(prepared, tmp_path / "parts", epochs=4, patience=0, resume=True), whole)


def test_auto_precision_on_another_machine_is_reported(prepared, tmp_path, monkeypatch, caplog):
    for epochs, native in ((1, False), (2, False), (3, True)):
        assert not caplog.records
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        with caplog.at_level("WARNING"):
            train(prepared, tmp_path / "run", epochs=epochs, patience=0, precision="auto", resume=epochs > 1)
    assert "run: trained in fp32, continues in bf16" in caplog.text


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run(prepared, tmp_path, bad):
    calls = itertools.count(1)

    def diverging(model, batch):
        output = segmentation_step(model, batch)
        return scale_loss(output, bad) if next(calls) > 6 else output

    with pytest.raises(InputError, match=r"loss .* is (nan|inf).*last\.pt holds the last good epoch.*lower --lr"):
        train(prepared, tmp_path, step=diverging, epochs=5, val_fraction=0.1)
    last = load_checkpoint(tmp_path / "last.pt", "unet")
    assert last["epoch"] == 1 and all(torch.isfinite(value).all() for value in last["model"].values())


def test_early_stopping_ends_the_run_also_when_resumed(prepared, tmp_path):
    last = train(prepared, tmp_path, epochs=9, patience=2, min_delta=100)
    assert last["epoch"] == 3, "the first epoch is the best, two more are not better"
    assert train(prepared, tmp_path, epochs=9, patience=2, min_delta=100, resume=True)["epoch"] == 3


def test_frozen_parameters_stay_out_of_the_optimizer(prepared, tmp_path):
    model = UNet(**UNET_ARGS)
    model.encoder.requires_grad_(False)
    last = train(prepared, tmp_path, model=model, epochs=1)
    trainable = sum(parameter.requires_grad for parameter in model.parameters())
    assert len(last["optimizer"]["param_groups"][0]["params"]) == trainable


def test_losses_are_independent_of_the_micro_batch_size(prepared, tmp_path):
    """Batches of 10 images, and a last one of 2."""

    def losses(micro):
        settings = {"batch_size": 10, "micro_batch_size": micro, "lr": 1e-2, "epochs": 2}
        last = train(prepared, tmp_path / str(micro), step=every_pixel_step, model=without_batch_norm(), **settings)
        return [row[name] for row in last["log"] for name in ("train_loss", "val_loss")]

    whole = losses(None)
    assert whole[2] < whole[0], "it learns"
    for micro in (5, 4, 1):
        assert losses(micro) == pytest.approx(whole, abs=1e-5), micro


@pytest.mark.parametrize("micro", [None, 4, 1])
def test_gradient_of_a_step_is_that_of_its_batch(prepared, tmp_path, monkeypatch, micro):
    def record(optimizer, closure=None):
        gradients.append([parameter.grad.clone() for parameter in optimizer.param_groups[0]["params"]])

    gradients = []
    monkeypatch.setattr(torch.optim.Adam, "step", record)  # the weights stay as they are
    settings = {"batch_size": 10, "micro_batch_size": micro, "epochs": 1}
    train(prepared, tmp_path, step=every_pixel_step, model=without_batch_norm(), **settings)

    model = without_batch_norm()
    train_set, _ = make_train_sets(train_config(prepared, tmp_path))
    sampler = EpochBatchSampler(len(train_set), 10, shuffle=True)
    sampler.set_epoch(1)
    batches = [prepare_batch(batch, CPU) for batch in make_loader(train_set, sampler, workers=0, device=CPU)]
    assert [len(batch["image"]) for batch in batches] == [10, 2] and len(gradients) == 2
    for batch, found in zip(batches, gradients):
        expected = torch.autograd.grad(every_pixel_step(model, batch).loss.value, list(model.parameters()))
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


def test_batch_sizes_that_cannot_be_trained_are_refused(prepared, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--micro-batch-size auto needs a GPU: on a CPU give a number"):
        train(prepared, tmp_path, micro_batch_size="auto")
    with pytest.raises(InputError, match=r"12 training images .* fewer than a batch of 13: use --batch-size 12"):
        train(prepared, tmp_path, batch_size=13)
    monkeypatch.setattr(train_module, "world_size", lambda: 5)
    with pytest.raises(InputError, match="--batch-size 4 cannot be shared by 5 processes: start fewer"):
        train(prepared, tmp_path, batch_size=4)


def step_with_memory_for(room):
    """A step that runs out of memory with more than `room` images, and that draws random numbers."""

    def step(model, batch):
        if len(batch["image"]) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        output = segmentation_step(model, batch)
        return scale_loss(output, torch.rand(()))

    return step


def find_on_gpu(model, step, train_set, run):
    """`find_micro_batch_size` with the device "meta", which computes nothing, in the place of a GPU."""
    run = copy.copy(run)
    run.device = torch.device("meta")
    return find_micro_batch_size(model, step, train_set, run)


@pytest.fixture
def find(prepared, tmp_path, monkeypatch):
    """Finds the micro-batch size for a batch of 8 and a step."""
    monkeypatch.setattr(train_module, "clear_device_cache", lambda **_: None)

    def find(step):
        run = start_run(train_config(prepared, tmp_path, batch_size=8), "unet")
        return find_on_gpu(UNet(**UNET_ARGS), step, PetDataset(find_records(prepared, "TrainVal"), 32), run)

    return find


@pytest.mark.parametrize(("room", "found"), [(100, 8), (8, 4), (5, 4), (4, 2), (2, 1)])
def test_auto_halves_the_micro_batch_until_it_fits(find, room, found):
    """With a margin of one image."""
    assert find(step_with_memory_for(room)) == found


def test_auto_refuses_too_little_memory_and_hides_no_other_error(find):
    def broken(model, batch):
        raise RuntimeError("size mismatch")

    with pytest.raises(InputError, match="not even one image fits in memory"):
        find(step_with_memory_for(0))
    with pytest.raises(RuntimeError, match="size mismatch"):
        find(broken)


def test_auto_takes_the_smallest_of_all_ranks(find, monkeypatch):
    monkeypatch.setattr(train_module, "world_size", lambda: 2)
    for other, found in ((3, 3), (7, 4)):  # 4 is the own share of 8 images
        monkeypatch.setattr(train_module, "all_gather_objects", lambda own, other=other: [*own, other])
        assert find(step_with_memory_for(100)) == found


def test_auto_run_equals_the_run_with_that_number(prepared, tmp_path, monkeypatch):
    """Trying sizes changes neither the random stream nor the weights."""
    monkeypatch.setattr(train_module, "find_micro_batch_size", find_on_gpu)
    settings = {"step": step_with_memory_for(5), "epochs": 2, "patience": 0, "batch_size": 8}
    given = train(prepared, tmp_path / "given", micro_batch_size=4, **settings)
    auto = train(prepared, tmp_path / "auto", micro_batch_size="auto", **settings)
    assert_same_run(auto, given)
