"""A run is a folder: start it, lock it, resume it, save every epoch into it."""

import logging
import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils.config import RESUMABLE, TrainConfig, as_plain_dict, flag_name
from utils.dataset import ClassTable
from utils.distributed import init_distributed, pick_precision
from utils.figures import class_styles, save_figure
from utils.files import InputError, acquire_lock, read_json, remove_leftovers, write_json
from utils.helper import (
    describe_environment,
    find_difference,
    load_checkpoint,
    load_model_state,
    model_state,
    save_checkpoint,
)
from utils.train import EarlyStopping, TrainingLog

log = logging.getLogger(__name__)

LOCK_SECONDS = 10  # loader workers of a killed process need a moment to exit and release its lock


def start_run(config: TrainConfig, model_name: str) -> "Run":
    """Join the other processes, pick device and precision, seed all generators. Call it before building the model.

    InputError when `config.out` holds another run and `config.resume` is not set. Nothing is written before `fit`.
    """
    device = init_distributed(config.device, config.threads)
    refuse_another_run(config)
    precision = pick_precision(config.precision, device)
    seed_everything(config.seed)
    mixed = "no" if precision == "fp32" else precision
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    return Run(config, model_name, Accelerator(cpu=device.type == "cpu", mixed_precision=mixed), precision)


def refuse_another_run(config: TrainConfig) -> None:
    """InputError when `config.out` holds a run that is not to be resumed."""
    found = [name for name in ("config.json", "last.pt", "best.pt", "log.csv") if _has_content(config.out / name)]
    if found and not config.resume:
        hint = "continue it with --resume, or choose another --out"
        raise InputError(f"{config.out} holds another run ({', '.join(found)}): {hint}")


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0  # an empty one: the machine failed before anything was saved


def lock_folder(folder: Path) -> ExitStack:
    """Acquire the lock of a run's folder; InputError when another process trains into it."""
    busy = f"{folder}: another process is training into this folder; wait for it, or choose another --out"
    return acquire_lock(folder / ".lock", timeout=LOCK_SECONDS, busy=busy)


class Run:
    """The folder `config.out`: config.json, split.json, log.csv, TensorBoard events, curves.png, last.pt and best.pt.

    `fit` opens it, saves each epoch and closes it. Only rank 0 writes. `epoch` is the last saved epoch (0: none).
    """

    def __init__(self, config: TrainConfig, model_name: str, accelerator: Accelerator, precision: str):
        self.config, self.model_name, self.accelerator, self.precision = config, model_name, accelerator, precision
        self.folder, self.device, self.is_main = config.out, accelerator.device, accelerator.is_main_process
        self.epoch, self.best_value = 0, math.inf
        self.log: TrainingLog | None = None
        self.settings: dict[str, dict[str, Any]] = {}  # the content of config.json and split.json

    def open(
        self,
        model: nn.Module,
        average: AveragedModel | None,
        optimizer: Any,
        stopping: EarlyStopping,
        model_args: dict[str, Any],
        train_set: Any,
        val_set: Any,
    ) -> None:
        """Lock the folder, and restore the model, its average, optimizer, early stopping and random state if resumed.

        InputError when another process is training into the folder, or the run has other images or another model.
        """
        self.model, self.average, self.optimizer, self.stopping = model, average, optimizer, stopping
        self.model_args, self.class_table = model_args, train_set.class_table
        split = {"train": train_set.names, "val": val_set.names}
        if self.is_main:
            self.lock = lock_folder(self.folder)
            refuse_another_run(self.config)  # it may have been started in the meantime
        last = self._restore(split) if self.config.resume else None
        if self.is_main:
            remove_leftovers(self.folder)
            environment = describe_environment(self.device, self.precision)
            saved = read_json(self.folder / "config.json").get("environment", {}) if last else {}
            if saved.get("precision", self.precision) != self.precision:  # --precision auto on another machine
                log.warning("%s: trained in %s, continues in %s", self.folder, saved["precision"], self.precision)
            details = {"class_table": self.class_table.as_plain_dict(), "environment": environment}
            content = {**as_plain_dict(self.config), "model_args": model_args, **details}
            self.settings = {"config.json": content, "split.json": split}
            self._write_settings()
            self.log = TrainingLog(self.folder, last["log"] if last else ())
            if last is None:
                self._save_last({})  # so that a run interrupted in its first epoch can be resumed

    def _restore(self, split: dict[str, list[str]]) -> dict[str, Any] | None:
        """Continue from last.pt; returns its content, or None when nothing was saved yet.

        InputError when last.pt is missing although an epoch was saved, or holds other parts than this run.
        """
        saved_split, path = self.folder / "split.json", self.folder / "last.pt"
        if saved_split.exists() and read_json(saved_split) != split:
            raise InputError(f"--resume: {self.folder} was started with other images than those of {self.config.data}")
        if not path.exists():
            if found := [name for name in ("best.pt", "log.csv") if _has_content(self.folder / name)]:
                hint = "put it back, or start a new run with another --out"
                raise InputError(f"--resume: {path} is missing beside {' and '.join(found)}: {hint}")
            return None
        last = load_checkpoint(path, self.model_name)
        if "optimizer" not in last:
            raise InputError(f"{path} cannot be resumed: it has no optimizer (is it a copy of best.pt?)")
        if last["model_args"] != self.model_args:
            raise InputError(f"--resume: {path} holds {last['model_args']}, expected {self.model_args}")
        settings = as_plain_dict(self.config)
        if other := [name for name in settings if name not in RESUMABLE and last["config"].get(name) != settings[name]]:
            found = f"{flag_name(other[0])} {last['config'].get(other[0])}, the run {settings[other[0]]}"
            raise InputError(f"--resume: {path} is of a run with other settings: it has {found}")
        self._check(path, last)
        load_model_state(self.model, last["trained"] if self.average else last["model"])
        if self.average:
            load_model_state(self.average.module, last["model"])
            self.average.n_averaged.fill_(last["averaged"])
        groups = self.optimizer.state_dict()["param_groups"]  # this run's own settings; `fit` sets the learning rate
        self.optimizer.load_state_dict({"state": last["optimizer"]["state"], "param_groups": groups})
        self.stopping.load_state_dict(last["stopping"])
        try:
            set_random_state(last["random_state"])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{path} cannot be resumed: its random state is damaged ({error})") from error
        if self.accelerator.scaler is not None and last["scaler"]:
            self.accelerator.scaler.load_state_dict(last["scaler"])
        self.epoch, self.best_value = last["epoch"], last["best_value"]
        if self.is_main and self.epoch and not _has_content(self.folder / "best.pt"):
            log.warning("%s is missing: the best of the following epochs is saved there", self.folder / "best.pt")
            self.best_value = math.inf
        log.info("%s: continuing after epoch %d", self.folder, self.epoch)
        return last

    def _check(self, path: Path, last: dict[str, Any]) -> None:
        """InputError when a part of last.pt has another type, shape or key than this run's state.

        PyTorch would load some of them and fail later; a fused Adam with moments of other shapes even writes to memory
        that is not its own.
        """
        expected = self._state()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = [{"step": torch.zeros(()), "exp_avg": one, "exp_avg_sq": one} for one in parameters]
        expected["optimizer"] = {"state": dict(enumerate(moments)) if last["epoch"] else {}}
        expected["random_state"]["cuda"] = []  # of any length: the run may have been on another machine
        if not expected["scaler"] or not last.get("scaler"):  # only fp16 has one
            expected.pop("scaler")
        expected["log"] = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0}] * last["epoch"]
        problem = find_difference(last, expected)
        for row in () if problem else last["log"]:
            wrong = [name for name, value in row.items() if not isinstance(value, int | float | None)]
            problem = problem or (f"log has {wrong[0]} {row[wrong[0]]!r}" if wrong else "")
        if problem:
            raise InputError(f"{path} cannot be resumed: {problem}. Put an intact copy back, or use another --out")

    def save(self, row: dict[str, float], scores: dict[str, Any]) -> None:
        """Save an epoch: its `row` of the log, last.pt, and best.pt if it is the best so far by `--select`."""
        self.epoch = row["epoch"]
        if not self.is_main:
            return
        if not (self.folder / "config.json").exists():
            log.warning("%s was deleted during the training: it is made again", self.folder)
            self._write_settings()
        scores = {"val_loss": row["val_loss"], **scores}
        value = self._judge(row)
        if value < self.best_value:
            self.best_value = value
            save_checkpoint(self.folder / "best.pt", self._checkpoint(scores))
        self.log.add(row)
        self._save_last(scores)
        names = {"train_loss": ".4f", "val_loss": ".4f", "val_iou_mean": ".3f", "images_per_second": ".1f"}
        values = [f"{name} {row[name]:{form}}" for name, form in names.items() if row.get(name) is not None]
        log.info(f"{self.folder.name}: epoch {self.epoch}/{self.config.epochs}  {'  '.join(values)}")

    def _judge(self, row: dict[str, float]) -> float:
        """The number of an epoch that is lowest for best.pt: by `--select`, a stage without scores by its loss."""
        iou = row.get("val_iou_mean") if self.config.select == "miou" else None
        return row["val_loss"] if iou is None else -iou

    def describe_best(self) -> str:
        """A sentence that names the best epochs and best.pt."""
        best = next((row for row in self.log.rows if self._judge(row) == self.best_value), None)
        if best is None:
            return f"There is no {self.folder / 'best.pt'}"
        others = []
        for key, sign in (("val_loss", 1), ("val_iou_mean", -1)):
            scored = [row for row in self.log.rows if row.get(key) is not None]
            if scored and (other := min(scored, key=lambda row: sign * row[key])) is not best:
                others.append(f"the best {key} {other[key]:.4f} is of epoch {other['epoch']}")
        found = f"Best epoch {best['epoch']} (val_loss {best['val_loss']:.4f}): {self.folder / 'best.pt'}"
        return "; ".join([found, *others])

    def _checkpoint(self, scores: dict[str, Any]) -> dict[str, Any]:
        return {
            "model_name": self.model_name,
            "model": model_state(self.average.module if self.average else self.model),
            "model_args": self.model_args,
            "class_table": self.class_table.as_plain_dict(),
            "config": as_plain_dict(self.config),
            "epoch": self.epoch,
            "scores": scores,
        }

    def _state(self) -> dict[str, Any]:
        """The parts of last.pt that a resumed run continues from, besides the log."""
        scaler = self.accelerator.scaler
        weights = {"model": model_state(self.model)}
        if self.average:  # `model` is what test.py scores, `trained` what the optimizer changes
            weights = {"model": model_state(self.average.module), "trained": weights["model"]}
            weights["averaged"] = int(self.average.n_averaged)
        return {
            **weights,
            "epoch": self.epoch,
            "optimizer": self.optimizer.state_dict(),
            "stopping": self.stopping.state_dict(),
            "random_state": random_state(),
            "scaler": scaler.state_dict() if scaler else {},
            "best_value": self.best_value,
        }

    def _save_last(self, scores: dict[str, Any]) -> None:
        save_checkpoint(self.folder / "last.pt", self._checkpoint(scores) | self._state() | {"log": self.log.rows})

    def _write_settings(self) -> None:
        for name, content in self.settings.items():
            write_json(self.folder / name, content)

    def close(self) -> None:
        """Close the log, draw curves.png, release the lock."""
        if self.log is None:
            return
        self.log.close()
        if self.log.rows:
            best = next((row["epoch"] for row in self.log.rows if self._judge(row) == self.best_value), None)
            save_figure(plot_curves(self.log.rows, self.class_table, best), self.folder / "curves.png")
        self.lock.close()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of PyTorch's random generators (CPU and CUDA), for a checkpoint."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore the result of `random_state`. The state of a GPU that this machine does not have is ignored."""
    torch.set_rng_state(state["cpu"])
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)


def plot_curves(rows: Sequence[dict[str, float]], class_table: ClassTable, best: int | None = None) -> Figure:
    """Losses over the epochs and, if the rows have them, the IoU per class on the validation images.

    The epoch `best` is marked as that of best.pt.
    """
    scored = any("val_iou_mean" in row for row in rows)
    figure = Figure(figsize=(10 if scored else 5, 3.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 + scored))
    epochs = [row["epoch"] for row in rows]
    axes[0].plot(epochs, [row["train_loss"] for row in rows], label="training", color="#0072b2")
    axes[0].plot(epochs, [row["val_loss"] for row in rows], label="validation", color="#d55e00", linestyle="--")
    if marked := [row["val_loss"] for row in rows if row["epoch"] == best]:
        axes[0].plot(best, marked[0], "o", color="#d55e00", label=f"best.pt (epoch {best})")
    axes[0].set(xlabel="epoch", ylabel="loss")
    if scored:
        for name, (color, style) in class_styles(class_table).items():
            values = np.array([row.get(f"val_iou_{name}") for row in rows], dtype=float)  # None becomes NaN
            axes[1].plot(epochs, values, label=name, color=color, linestyle=style)
        axes[1].set(xlabel="epoch", ylabel="IoU on validation images", ylim=(0, 1))
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    return figure
