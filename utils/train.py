"""The only training loop of the repository, with early stopping and the log of a run."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.batch_size import find_cut, starting_cut
from utils.config import TrainConfig, to_json
from utils.dataset import CLASSES
from utils.distributed import add_up, join, world
from utils.files import InputError, read_json, remove_leftovers, write_bytes, write_json
from utils.helper import (
    describe_environment,
    load_checkpoint,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
    to_device,
)
from utils.metric import validate
from utils.plot import plot_curves

log = logging.getLogger(__name__)


class StepOutput(NamedTuple):
    """What `step(model, batch)` returns: the loss to minimize, and what is scored (None where nothing is)."""

    loss: Tensor
    logits: Tensor | None = None  # (B, C, H, W)
    target: Tensor | None = None  # (B, H, W), 255 = ignored


Step = Callable[[nn.Module, dict[str, Any]], StepOutput]


class EarlyStopping:
    """Says stop after `patience` epochs in a row whose validation loss was not at least `min_delta` below the best."""

    def __init__(self, patience: int, min_delta: float):
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.inf
        self.bad_epochs = 0

    def update(self, loss: float) -> None:
        """Take in the validation loss of one more epoch."""
        if loss <= self.best - self.min_delta:
            self.best = loss
            self.bad_epochs = 0
        else:
            self.bad_epochs += 1

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.bad_epochs

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best = state["best"]
        self.bad_epochs = state["bad_epochs"]


class TrainingLog:
    """One row per epoch, in log.csv and as TensorBoard scalars; `rows` is what an interrupted run had logged."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, float]] = ()):
        self.folder = folder
        self.rows = list(rows)
        self.board = SummaryWriter(str(folder), purge_step=len(self.rows) + 1)
        self._write()

    def add(self, row: dict[str, float]) -> None:
        """Append the row of an epoch; all rows have the same columns."""
        self.rows.append(row)
        self._write()
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self.board.add_scalar(name, value, row["epoch"])
        self.board.flush()

    def _write(self) -> None:
        text = io.StringIO()
        if self.rows:
            writer = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        write_bytes(self.folder / "log.csv", text.getvalue().encode())


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Devices, processes and precision as the flags say; seeds everything, so call it before a model is built."""
    device = join(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "fp32"
        if device.type == "cuda":
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and device.type == "cpu":
        raise InputError("--precision fp16 needs a GPU; on the CPU use bf16 or fp32")
    seed_everything(config.seed)
    return Accelerator(cpu=device.type == "cpu", mixed_precision={"fp32": "no"}.get(precision, precision))


def fit(
    model: nn.Module,
    step: Step,
    train_loader: DataLoader,
    val_loader: DataLoader,
    config: TrainConfig,
    *,
    accelerator: Accelerator,
    model_name: str,
    model_args: dict[str, Any],
    split: dict[str, list[str]],
    class_names: Sequence[str] = CLASSES,
) -> None:
    """Train `model` with `step` until the epochs are over or the validation loss no longer falls.

    Fills the run folder `config.out`: config.json, split.json, log.csv, TensorBoard events, curves.png, last.pt (after
    every epoch) and best.pt (the epoch with the lowest validation loss). With `config.resume` it goes on after the
    epoch of last.pt, on the CPU bit for bit as if it had never stopped. Frozen parameters stay out of the optimizer.

    Raises InputError when `config.out` holds another run, or the loss is no longer finite (last.pt is then still good).
    """
    out, device, is_main = config.out, accelerator.device, accelerator.is_main_process
    cut = starting_cut(config) or find_cut(config, model, step, train_loader, accelerator)
    for loader in (train_loader, val_loader):
        loader.batch_sampler.batch_size = cut.batch_size
    model = synchronized(model, device)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.lr,
        weight_decay=config.weight_decay,
        fused=True,
    )
    stopping = EarlyStopping(config.patience, config.min_delta)
    # Compiled and distributed wrappers share the parameters of `model`, whose plain names go into the checkpoint.
    wrapped, optimizer = accelerator.prepare(compiled(model, device) if config.compile else model, optimizer)

    start, rows, best_loss = 0, [], math.inf
    resumed = open_run(config, split, model_name, model_args) if config.resume else None
    if resumed is not None:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        stopping.load_state_dict(resumed["stopping"])
        set_random_state(resumed["random_state"])
        if accelerator.scaler is not None and resumed["scaler"]:
            accelerator.scaler.load_state_dict(resumed["scaler"])
        start, rows, best_loss = resumed["epoch"], resumed["log"], resumed["best_loss"]
        log.info("%s: continuing after epoch %d", out, start)

    def checkpoint(epoch: int, scores: dict[str, Any]) -> dict[str, Any]:
        return {
            "model_name": model_name,
            "model": model.state_dict(),
            "model_args": model_args,
            "config": to_json(config),
            "epoch": epoch,
            "scores": scores,
        }

    def save_last(epoch: int, scores: dict[str, Any]) -> None:
        state = {
            "optimizer": optimizer.state_dict(),
            "stopping": stopping.state_dict(),
            "random_state": random_state(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            "log": rows,
            "best_loss": best_loss,
        }
        save_checkpoint(out / "last.pt", checkpoint(epoch, scores) | state)

    if is_main:
        environment = describe_environment(device) | {"processes": accelerator.num_processes}
        claim_run(config, step=cut._asdict(), model_args=model_args, environment=environment)
        write_json(out / "split.json", split)
        if resumed is None:
            save_last(0, {})  # Ctrl-C in the first epoch leaves a run that resumes, too
        training_log = TrainingLog(out, rows)
        rows = training_log.rows

    try:
        for epoch in range(start + 1, config.epochs + 1):
            if stopping.should_stop:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, epoch)
            began = time.perf_counter()
            train_loss, images = train_epoch(
                wrapped, step, train_loader, optimizer, accelerator, epoch, config, accumulate=cut.accumulate
            )
            seconds = time.perf_counter() - began
            # Unwrapped: processes may have different numbers of validation batches, and must not wait for each other.
            val_loss, confusion = validate(
                accelerator.unwrap_model(wrapped),
                step,
                val_loader,
                device,
                class_names,
            )
            check_finite(val_loss, f"validation loss of epoch {epoch}", config)
            stopping.update(val_loss)
            if not is_main:
                continue
            scores = confusion.scores()
            iou = {f"val_iou_{name}": value for name, value in scores["iou"].items()} if confusion.counts.any() else {}
            row = {
                "epoch": epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                **iou,
                "lr": optimizer.param_groups[0]["lr"],
                "images_per_second": images / seconds,
                "seconds": seconds,
            }
            scores = {"val_loss": val_loss, **scores}
            if val_loss < best_loss:
                best_loss = val_loss
                save_checkpoint(out / "best.pt", checkpoint(epoch, scores))
            training_log.add(row)
            save_last(epoch, scores)
            log.info(
                "%s: epoch %d/%d  train loss %.4f  val loss %.4f%s  %.1f images/s",
                out.name,
                epoch,
                config.epochs,
                train_loss,
                val_loss,
                f"  val mIoU {iou['val_iou_mean']:.3f}" if iou else "",
                images / seconds,
            )
    except KeyboardInterrupt:
        log.info("interrupted; %s holds the last whole epoch, --resume continues after it", out / "last.pt")
        raise
    finally:
        if is_main:
            training_log.board.close()
            if training_log.rows:
                plot_curves(out / "curves.png", training_log.rows)
    if is_main:
        best = min(rows, key=lambda row: row["val_loss"])
        why = "validation loss no longer falls" if stopping.should_stop else "all epochs done"
        log.info("%s. Best epoch %d (val loss %.4f): %s", why, best["epoch"], best["val_loss"], out / "best.pt")
    accelerator.wait_for_everyone()  # a next stage reads what the main process wrote


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate of an epoch, counted from 1."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2  # Loshchilov and Hutter 2017


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, with batch norm over the images of all GPUs where there are several; parameters keep their names."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if world() > 1 and device.type == "cuda" else model


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, compiled when it is first used, with the same parameters. InputError where nothing can be compiled for
    `device`, which a model that is still on the CPU does not tell."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # the compiler's back ends fail in ways of their own
        raise InputError(
            "--compile: nothing can be compiled here. On a CPU it takes a C++ compiler (apt-get install g++), on a GPU "
            f"Triton. Or leave --compile out. The error was: {str(error).strip().splitlines()[0]}"
        ) from error
    return torch.compile(model)


def train_epoch(
    model: nn.Module,
    step: Step,
    loader: DataLoader,
    optimizer: Any,
    accelerator: Accelerator,
    epoch: int,
    config: TrainConfig,
    *,
    accumulate: int = 1,
) -> tuple[float, int]:
    """One pass over `loader`; returns the mean loss per image and the number of images, over all processes.

    The gradient of a step is that of the mean over all its images, however they are cut into `accumulate` batches
    and processes.
    """
    model.train()
    loader.batch_sampler.set_epoch(epoch)
    sizes = loader.batch_sampler.sizes  # of all processes together, which know them without asking each other
    loss_sum, images = torch.zeros((), device=accelerator.device), 0
    with tqdm(
        total=loader.batch_sampler.samples,
        desc=f"{config.out.name}: epoch {epoch}/{config.epochs}",
        unit="image",
        leave=False,
        disable=not accelerator.is_main_process,
    ) as bar:
        for number, batch in enumerate(loader):
            batch = to_device(batch, accelerator.device)
            size = len(batch["image"])
            first = number - number % accumulate
            together = sizes[first : first + accumulate]  # the batches of this step
            ends = number + 1 == first + len(together)
            if number == first:
                optimizer.zero_grad()
            with nullcontext() if ends else accelerator.no_sync(model):
                output = step(model, batch)
                # Processes' gradients are averaged: each has to count as often as there are processes.
                accelerator.backward(output.loss * (size * accelerator.num_processes / sum(together)))
            if ends:
                optimizer.step()
            loss_sum += output.loss.detach() * size
            images += size
            # The bar redraws ten times a second at most; only then is the device asked for a value, which waits for it.
            if bar.update(size * accelerator.num_processes):
                check_finite(loss_sum.item(), f"training loss in epoch {epoch}", config)
                bar.set_postfix(loss=f"{loss_sum.item() / images:.4f}", refresh=False)
    total_loss, total_images = add_up(torch.stack([loss_sum, loss_sum.new_tensor(images)])).tolist()
    check_finite(total_loss, f"training loss in epoch {epoch}", config)
    return total_loss / total_images, int(total_images)


def check_finite(loss: float, what: str, config: TrainConfig) -> None:
    """InputError when a loss is NaN or infinite: before any checkpoint is written, so the last one is good."""
    if not math.isfinite(loss):
        raise InputError(
            f"{what} is {loss}. {config.out / 'last.pt'} holds the last good epoch. "
            f"Start again, with another --out, a lower --lr than {config.lr:g} or --precision fp32."
        )


def claim_run(config: TrainConfig, **details: Any) -> None:
    """Write config.json, with `details`, into `config.out`; InputError when it holds another run, unless resuming."""
    taken = [name for name in ("config.json", "last.pt", "best.pt", "log.csv") if (config.out / name).exists()]
    if taken and not config.resume:
        raise InputError(
            f"{config.out} holds another run ({', '.join(taken)}): continue it with --resume, or choose another --out"
        )
    remove_leftovers(config.out)
    write_json(config.out / "config.json", to_json(config) | details)


def open_run(
    config: TrainConfig, split: dict[str, list[str]], model_name: str, model_args: dict[str, Any]
) -> dict[str, Any] | None:
    """The checkpoint from which `config.out` is resumed, None to start from the beginning.

    InputError when the run used other images or another model, or its checkpoint cannot be resumed from.
    """
    out = config.out
    if (out / "split.json").exists() and read_json(out / "split.json") != split:
        raise InputError(f"--resume: the images of {config.data} are not those that {out} was started with")
    if not (out / "last.pt").exists():  # killed before the first checkpoint
        return None
    last = load_checkpoint(out / "last.pt", model_name)
    if "optimizer" not in last:
        raise InputError(f"{out / 'last.pt'} cannot be resumed from: it has no optimizer (is it a copy of best.pt?)")
    if last["model_args"] != model_args:
        raise InputError(f"--resume: {out / 'last.pt'} holds {last['model_args']}, expected {model_args}")
    return last
