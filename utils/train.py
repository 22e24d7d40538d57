"""The only training loop of the repository, with early stopping and the log of a run."""

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.config import TrainConfig
from utils.distributed import all_gather_objects, all_reduce_sum, world_size
from utils.files import InputError, format_csv, write_bytes
from utils.loader import EpochBatchSampler, collate, make_loader, prepare_batch
from utils.loss import LossSums
from utils.metric import validate

if TYPE_CHECKING:
    from utils.run import Run

log = logging.getLogger(__name__)


class StepOutput(NamedTuple):
    """The result of `step(model, batch)`: the loss to minimize, and logits and target to score (None: not scored)."""

    loss: LossSums
    logits: Tensor | None = None  # (B, C, H, W)
    target: Tensor | None = None  # (B, H, W), 255 = ignored


Step = Callable[[nn.Module, dict[str, Any]], StepOutput]


class EarlyStopping:
    """Stop when the validation loss has not improved by `min_delta` for `patience` epochs (0: never stop)."""

    def __init__(self, patience: int, min_delta: float):
        self.patience, self.min_delta = patience, min_delta
        self.best, self.bad_epochs = math.inf, 0

    def update(self, loss: float) -> None:
        """Add the validation loss of an epoch."""
        if loss <= self.best - self.min_delta:
            self.best, self.bad_epochs = loss, 0
        else:
            self.bad_epochs += 1

    @property
    def should_stop(self) -> bool:
        return 0 < self.patience <= self.bad_epochs

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.best, self.bad_epochs = state["best"], state["bad_epochs"]


class TrainingLog:
    """One row per epoch, in log.csv and as TensorBoard scalars; `rows` are the earlier epochs of a resumed run."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, float]] = ()):
        self.folder = folder
        self.rows = list(rows)
        self.board = SummaryWriter(str(folder), purge_step=len(self.rows) + 1)
        self._write()

    def add(self, row: dict[str, float]) -> None:
        """Append the row of an epoch. The header is the union of all rows' columns."""
        self.rows.append(row)
        self._write()
        for name, value in row.items():
            if name != "epoch" and value is not None:
                self.board.add_scalar(name, value, row["epoch"])
        self.board.flush()

    def close(self) -> None:
        self.board.close()

    def _write(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        content = format_csv(columns, ([row.get(name) for name in columns] for row in self.rows))
        write_bytes(self.folder / "log.csv", content if self.rows else b"")


def fit(
    model: nn.Module, step: Step, train_set: Dataset, val_set: Dataset, run: "Run", model_args: dict[str, Any]
) -> None:
    """Train `model` with `step` until all epochs are done or the validation loss no longer improves.

    Writes the run folder. A resumed run continues after the epoch of last.pt, on the CPU bit for bit as if it had never
    stopped. Frozen parameters are not given to the optimizer. The data sets have `class_table` and `names`. InputError
    when the folder holds another run, there are fewer training images than `batch_size`, or the loss is not finite;
    last.pt then still holds the last complete epoch.
    """
    config, accelerator, device, class_names = run.config, run.accelerator, run.device, train_set.class_table.names
    train_loader, val_loader = make_loaders(model, step, train_set, val_set, run)
    # On the device before it is copied for the average.
    model = convert_sync_batchnorm(model, device).to(device, memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=moving_average(config.ema), use_buffers=True) if config.ema else None
    optimizer = make_optimizer(model, config)
    stopping = EarlyStopping(config.patience, config.min_delta)
    # The wrappers for compiling and for several GPUs share the parameters of `model`. Checkpoints are saved from
    # `model`, so that the wrappers add no prefix to the names.
    wrapped, optimizer = accelerator.prepare(compile_model(model, device) if config.compile else model, optimizer)
    run.open(model, average, optimizer, stopping, model_args, train_set, val_set)
    try:
        for epoch in range(run.epoch + 1, config.epochs + 1):
            if stopping.should_stop:
                break
            train_loss, columns = train_one_epoch(wrapped, step, train_loader, optimizer, run, epoch, average)
            # Unwrapped: ranks may have different numbers of validation batches and must not wait for each other.
            judged = average.module if average else accelerator.unwrap_model(wrapped)
            with accelerator.autocast():
                val_loss, confusion = validate(judged, step, val_loader, device, class_names)
            check_finite(val_loss, f"validation loss of epoch {epoch}", config)
            stopping.update(val_loss)
            scores = confusion.scores()
            iou = {f"val_iou_{name}": value for name, value in scores["iou"].items()} if confusion.counts.any() else {}
            row = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss, **iou, **columns}
            run.save(row, scores)
    except KeyboardInterrupt:
        log.info("interrupted; %s holds the last complete epoch, --resume continues after it", run.folder / "last.pt")
        raise
    finally:
        run.close()
    if run.log is not None:
        reason = "the validation loss no longer improves" if stopping.should_stop else "all epochs done"
        log.info(f"{reason}. {run.describe_best()}")
    accelerator.wait_for_everyone()  # a second stage reads the files that rank 0 wrote


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW over the trained parameters; vectors (norms and biases) have no weight decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.0}]
    if config.weight_decay:
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=True)


def learning_rate(config: TrainConfig, passed: float) -> float:
    """The learning rate in the middle of a step, `passed` epochs after the start: linear warm-up, then the schedule."""
    if passed < config.warmup:
        return config.lr * passed / config.warmup
    if config.schedule == "constant":
        return config.lr
    share = (passed - config.warmup) / (config.epochs - config.warmup)
    return config.lr * (1 + math.cos(math.pi * min(share, 1))) / 2  # Loshchilov and Hutter 2017


def moving_average(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], None]:
    """The update of an exponential moving average, for AveragedModel.

    After n updates the decay is at most (1 + n) / (10 + n), so that the average soon forgets the first weights.
    """

    @torch.no_grad()
    def update(averages: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor) -> None:
        weight = 1 - min(decay, (1 + updates.item()) / (10 + updates.item()))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, weight)
        else:  # batch norm counts its batches
            torch._foreach_copy_(averages, current)

    return update


def make_loaders(
    model: nn.Module, step: Step, train_set: Dataset, val_set: Dataset, run: "Run"
) -> tuple[DataLoader, DataLoader]:
    """Training and validation loader; each rank loads its share of every batch.

    InputError when there are fewer training images than `batch_size`, or it is smaller than the number of processes.
    """
    config, size = run.config, run.config.batch_size
    if len(train_set) < size:
        few = f"{len(train_set)} training images (after balancing) are fewer than a batch of {size}"
        raise InputError(f"{few}: use --batch-size {len(train_set)} or less, or more images")
    if size < world_size():
        raise InputError(f"--batch-size {size} cannot be shared by {world_size()} processes: start fewer")
    auto = config.micro_batch_size == "auto"
    micro = find_micro_batch_size(model, step, train_set, run) if auto else config.micro_batch_size
    train_sampler = EpochBatchSampler(len(train_set), size, micro, shuffle=True, seed=config.seed)
    val_sampler = EpochBatchSampler(len(val_set), min(size, (micro or size) * world_size()), shuffle=False)
    pairs = ((train_set, train_sampler), (val_set, val_sampler))
    train_loader, val_loader = (make_loader(*pair, config.workers, run.device) for pair in pairs)
    return train_loader, val_loader


def find_micro_batch_size(model: nn.Module, step: Step, train_set: Dataset, run: "Run") -> int:
    """A rank's share of a batch in images, halved until a step on a copy of the model fits in the GPU's memory.

    All ranks return the smallest result. The images of an optimizer step stay the same; only batch-norm statistics
    depend on the micro-batch size.
    """
    if run.device.type == "cpu":  # running out of memory kills the process there, so there is nothing to try
        raise InputError("--micro-batch-size auto needs a GPU: on a CPU give a number, or leave it out")
    size = math.ceil(run.config.batch_size / world_size())
    with torch.random.fork_rng():  # the trial must not change the random stream of the run
        while size and not step_fits(model, step, train_set, run, size):
            size //= 2
    size = min(all_gather_objects([size]))  # before the error, so that no rank waits for one that has stopped
    if not size:
        raise InputError("not even one image fits in memory: use a smaller --image-size or model")
    log.info("--micro-batch-size auto: %d", size)
    return size


def step_fits(model: nn.Module, step: Step, train_set: Dataset, run: "Run", size: int) -> bool:
    """Whether one step on a copy of `model` with slightly more than `size` images fits in the GPU's memory."""
    clear_device_cache(garbage_collection=True)
    images = size + size // 10 + 1  # a margin, because memory fragments
    batch = collate([train_set[number % len(train_set)] for number in range(images)])
    try:
        probe = copy.deepcopy(model).to(run.device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam([parameter for parameter in probe.parameters() if parameter.requires_grad])
        with run.accelerator.autocast():
            loss = step(probe, prepare_batch(batch, run.device)).loss.value
        loss.backward()
        optimizer.step()
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        return False
    return True


def convert_sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model`, with batch norm over the images of all GPUs if there are several; parameters keep their names."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if world_size() > 1 and device.type == "cuda" else model


def compile_model(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` compiled at its first call, with the same parameters. InputError if `device` has no working compiler."""
    try:
        torch.compile(torch.sin)(torch.zeros(1, device=device))
    except Exception as error:  # the compiler's back ends raise errors of their own
        needs = "a C++ compiler (apt-get install g++) on a CPU, Triton on a GPU"
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--compile needs {needs}; or leave it out. Compiling failed with: {reason}") from error
    return torch.compile(model)


def train_one_epoch(
    model: nn.Module,
    step: Step,
    loader: DataLoader,
    optimizer: Any,
    run: "Run",
    epoch: int,
    average: AveragedModel | None = None,
) -> tuple[float, dict[str, float]]:
    """One pass over `loader`; returns the mean loss per image over all ranks, and further columns of the log.

    Each step has a learning rate of its own, and updates `average`.
    """
    ranks, sampler = run.accelerator.num_processes, loader.batch_sampler
    model.train()
    sampler.set_epoch(epoch)
    loss_sum, images, began = torch.zeros((), device=run.device), 0, time.perf_counter()
    title = f"{run.folder.name}: epoch {epoch}/{run.config.epochs}"
    micro_batches, steps, counted = iter(loader), sampler.batches(), None
    with tqdm(total=sampler.samples, desc=title, unit="image", leave=False, disable=not run.is_main) as bar:
        for place, (batch_size, parts) in enumerate(steps, start=1):
            lr = learning_rate(run.config, epoch - 1 + (place - 0.5) / len(steps))
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            batches = [next(micro_batches) for _ in range(parts)]
            several = sampler.has_several(batch_size)
            loss, counted = backward(model, step, batches, batch_size, run, several=several, counted=counted)
            optimizer.step()
            if average is not None:
                average.update_parameters(run.accelerator.unwrap_model(model))
            own = sum(len(batch["image"]) for batch in batches)
            loss_sum += loss * own
            images += own
            # The bar redraws at most ten times a second. Only then is the loss read, which waits for the device.
            if bar.update(own * ranks):
                check_finite(loss_sum.item(), f"training loss in epoch {epoch}", run.config)
                bar.set_postfix(loss=f"{loss_sum.item() / images:.4f}", refresh=False)
    total_loss, total_images = all_reduce_sum(torch.stack([loss_sum, loss_sum.new_tensor(images)])).tolist()
    check_finite(total_loss, f"training loss in epoch {epoch}", run.config)
    seconds = time.perf_counter() - began
    columns = {"lr": lr, "images_per_second": total_images / seconds, "seconds": seconds}
    return total_loss / total_images, columns


def backward(
    model: nn.Module,
    step: Step,
    batches: Sequence[dict[str, Any]],
    batch_size: int,
    run: "Run",
    *,
    several: bool,
    counted: bool | None,
) -> tuple[Tensor, bool]:
    """Add the gradient of a step's loss, over all ranks, to the parameters; returns the loss, and `counted`.

    It is the loss of the whole batch of `batch_size` images, however it is cut into micro-batches, `several` in at
    least one rank, and shared by ranks. Each micro-batch takes the gradient of its own part of the sums, with the sums
    of all others as constants; they come from `sum_losses`, if there are several. A total divided by a count needs no
    such pass: it is divided by the count that is expected, and the gradient is corrected when the true one is known.
    `counted` is whether the loss is one (None: not known before the first step).
    """
    accelerator = run.accelerator
    sums = None
    if several and not counted:
        sums = sum_losses(accelerator.unwrap_model(model), step, batches, run.device)
    totals = torch.zeros(2, device=run.device)  # of a total divided by a count
    for number, batch in enumerate(batches, start=1):
        batch = prepare_batch(batch, run.device)
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            own, formula, count = step(model, batch).loss
            if several and sums is None:
                expected = count * batch_size / len(batch["image"])
                totals += own.detach()
                loss = own[0] / expected
            else:
                sums = all_reduce_sum(own.detach()) if sums is None else sums
                loss = formula(own + (sums - own.detach()))
            # Gradients are averaged over the ranks, so each loss is scaled by their number.
            accelerator.backward(loss * accelerator.num_processes)
    if sums is not None:
        return loss.detach(), count is not None
    totals = all_reduce_sum(totals)
    correction = expected / totals[1].clamp(min=1e-6)
    torch._foreach_mul_([one.grad for one in model.parameters() if one.grad is not None], correction)
    return formula(totals), True


@torch.no_grad()
def sum_losses(model: nn.Module, step: Step, batches: Sequence[dict[str, Any]], device: torch.device) -> Tensor | None:
    """The sums of the loss over the micro-batches of an optimizer step and over all ranks, by forward passes that leave
    the batch-norm statistics as they were; None for a total divided by a count, which does not need them."""
    before, total = [buffer.clone() for buffer in model.buffers()], 0
    for batch in batches:
        loss = step(model, prepare_batch(batch, device)).loss
        if loss.count is not None:
            total = None
            break
        total += loss.sums
    for buffer, saved in zip(model.buffers(), before):
        buffer.copy_(saved)
    return None if total is None else all_reduce_sum(total)


def check_finite(loss: float, name: str, config: TrainConfig) -> None:
    """InputError for a NaN or infinite loss; called before an epoch is saved, so that last.pt stays finite."""
    if not math.isfinite(loss):
        hint = f"Start again with another --out, and a lower --lr than {config.lr:g} or --precision fp32."
        raise InputError(f"{name} is {loss}. {config.out / 'last.pt'} holds the last good epoch. {hint}")
