"""Command lines from dataclasses: each field is a flag. Defaults are defined only here and in the scripts' Configs.

This file imports nothing heavy, so that every script answers `--help` immediately.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.files import InputError, read_json

Config = TypeVar("Config")

# Flags that a resumed run may change: length, speed and place of the training. All others determine its result.
RESUMABLE = {
    "resume", "data", "cache", "epochs", "patience", "workers", "threads", "device", "compile", "out",
    "micro_batch_size",
}  # fmt: skip

# Flags of test.py that have no effect on photographs without labels.
SCORING_FLAGS = ("data", "cache", "split", "batch_size", "score_size", "workers", "limit", "perturb", "reconstruction")

# Flags of earlier versions, and their replacements.
REMOVED_FLAGS = {"--accumulate": "--batch-size counts the images of an optimizer step; use --micro-batch-size"}


def flag(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, **metadata: Any) -> Any:
    """A dataclass field that is a flag: `low` and `high` are the smallest and largest value allowed.

    `parse` turns text into a value; `positional=True` omits the dashes; `removed` maps former values to hints; `strong`
    is the default with `--recipe strong`, where it is another.
    """
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, **metadata})


def number_or(word: str) -> Callable[[str], str | int]:
    """A `parse` function for `word` or a positive whole number."""

    def read(text: str) -> str | int:
        if text != word and (not text.isdecimal() or int(text) < 1):
            raise argparse.ArgumentTypeError(f"expected {word!r} or a positive number, got {text!r}")
        return text if text == word else int(text)

    return read


def weighted_sum(text: str, names: Collection[str]) -> dict[str, float]:
    """The weight of each term of a sum such as "mse+0.5*ssim" of distinct `names`; ArgumentTypeError if it is none."""
    terms: dict[str, float] = {}
    for part in text.split("+"):
        match = re.fullmatch(r"(?:(\d*\.?\d+)\*)?([\w-]+)", part)
        if match is None or match[2] not in names or match[2] in terms or float(match[1] or 1) == 0:
            known = list(names)
            example = f"or a weighted sum of them such as {known[0]}+0.5*{known[-1]}"
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, {example}, got {text!r}")
        terms[match[2]] = float(match[1] or 1)
    return terms


def parse_point(text: str) -> tuple[float, float]:
    """(x, y) of the text `X,Y`, in pixels of a photograph, origin top left."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X,Y in pixels, such as 120,80, got {text!r}") from None
    return x, y


def parse_loss(text: str) -> str:
    """The text itself, after checking that it is a weighted sum of the losses of utils/loss.py."""
    from utils.loss import LOSSES  # imports torch, which a script that was given --loss needs anyway

    weighted_sum(text, LOSSES)
    return text


@dataclass
class TrainConfig:
    """Flags that every train.py shares. Their defaults are the report's recipe; `parse` applies another `--recipe`."""

    recipe: Literal["report", "strong"] = flag(
        "report", "defaults of the other flags: the report's, or the best that results/ladder has shown"
    )

    data: Path = flag(Path("Dataset"), "folder prepared by dataset/dataset_prep.py")
    cache: Path | None = flag(
        None, "folder for the resized images (default: cache/ in --data; where that is read-only, a temporary folder)"
    )
    out: Path = flag(Path("runs/model"), "folder of this run")
    epochs: int = flag(50, "maximum number of passes over the training images", low=1)
    batch_size: int = flag(
        64, "images per optimizer step, over all processes", low=1, removed={"auto": "use --micro-batch-size auto"}
    )
    micro_batch_size: str | int | None = flag(
        None,
        "images per forward pass in one process (default: its whole share of a batch); 'auto' halves it until a step "
        "fits in the GPU's memory",
        parse=number_or("auto"),
    )
    optimizer: Literal["adam", "adamw"] = flag("adam", "adamw: Adam with decoupled weight decay", strong="adamw")
    lr: float = flag(1e-4, "learning rate", low=0, strong=1e-3)
    schedule: Literal["constant", "cosine"] = flag(
        "constant", "learning-rate schedule: constant, or cosine decay to zero over --epochs", strong="cosine"
    )
    warmup: float = flag(
        0.0, "epochs in which the learning rate rises from zero, may be a fraction, such as 0.5", low=0, strong=1.0
    )
    weight_decay: float = flag(0.0, "weight decay, not of norms and biases", low=0, strong=1e-2)
    ema: float = flag(
        0.0,
        "validate and save an exponential moving average of the weights, with this decay (0: none)",
        low=0,
        high=0.99999,
    )
    image_size: int = flag(256, "edge in pixels of the square that images are resized to", low=32)
    loss: str = flag(
        "cross-entropy",
        "a loss of utils/loss.py, or a weighted sum such as cross-entropy+0.5*dice",
        parse=parse_loss,
    )
    boundary: Literal["background", "ignore", "object", "class"] = flag(
        "background",
        "what the loss takes the boundary band for: background, nothing, the pet, or a class of its own; never scored",
        strong="ignore",
    )
    augment: Literal["none", "report", "jitter", "strong"] = flag(
        "report", "variation of the training images (dataset/augmentation.py)"
    )
    paste: float = flag(0.0, "probability of pasting another training pet into a training image", low=0, high=1)
    val_fraction: float = flag(0.1, "share of TrainVal used for validation", low=0.001, high=0.9)
    patience: int = flag(3, "stop after this many epochs without a better validation loss (0: never)", low=0, strong=0)
    select: Literal["loss", "miou"] = flag(
        "loss",
        "best.pt is the epoch with the lowest validation loss, or with the highest validation mIoU",
    )
    min_delta: float = flag(1e-3, "a validation loss counts as better if it is lower by at least this", low=0)
    workers: int | None = flag(
        None,
        "processes that load and augment images, 0: none (default: on a GPU one per core, at most 8; on a CPU one per "
        "8 cores)",
        low=0,
    )
    threads: int | None = flag(
        None, "threads of PyTorch and OpenCV (default: OMP_NUM_THREADS, else this process's share of the cores)", low=1
    )
    seed: int = flag(0, "seed of weights, split, order and augmentation", low=0, high=2**32 - 1)
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to train")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto",
        "floating-point format of the model; auto: bf16 where the GPU or CPU supports it, else fp16 on a GPU, fp32 "
        "on a CPU",
    )
    compile: bool = flag(False, "compile the model with torch.compile")
    resume: bool = flag(False, "continue the run in --out with its own settings")
    limit: int | None = flag(
        None, "use only this many images (before the split and the balancing), for a quick try", low=4
    )

    def __post_init__(self) -> None:
        try:
            os.fspath(self.out).encode()
        except UnicodeEncodeError:
            raise InputError(f"--out {self.out!r} is no UTF-8, which TensorBoard needs: choose another name") from None
        if self.warmup and self.warmup >= self.epochs:
            raise InputError(f"--warmup {self.warmup:g} is not shorter than --epochs {self.epochs}")


@dataclass
class TestConfig:
    """Flags that every test.py shares."""

    checkpoint: Path = flag(Path("runs/model/best.pt"), "file written by train.py, or the folder of its run")
    data: Path = flag(Path("Dataset"), "folder prepared by dataset/dataset_prep.py")
    cache: Path | None = flag(None, "folder for the resized images, as in training")
    split: Literal["Test", "TrainVal"] = flag("Test", "images to score")
    out: Path | None = flag(None, "folder for the results (default: test/ beside the checkpoint)")
    batch_size: int = flag(32, "images per forward pass in one process", low=1)
    score_size: str | int = flag(
        "native", "'native' (each image's own size) or the edge in pixels to score at", parse=number_or("native")
    )
    workers: int | None = flag(None, "processes that load images, as in training", low=0)
    threads: int | None = flag(None, "threads of PyTorch and OpenCV, as in training", low=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to run the model")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "fp32", "floating-point format of the model, as in training"
    )
    limit: int | None = flag(None, "score only this many images, spread over all species", low=1)
    tta: Literal["none", "flip"] = flag("none", "flip: average the probabilities with those of the mirrored image")
    images: list[Path] | None = flag(
        None, "segment these photographs (files or folders, no labels needed) instead of scoring a split"
    )
    overwrite: bool = flag(False, "with --images: also replace masks of other photographs")
    perturb: list[str] | None = flag(
        None, "also score under these perturbations (without names: all of them) at every level", nargs="*"
    )

    def __post_init__(self) -> None:
        fields = {field.name: field for field in dataclasses.fields(self)}
        if self.checkpoint.is_dir():  # a run's folder: its best.pt is where the default has it below runs/NAME
            below = Path(*fields["checkpoint"].default.parts[2:])
            found = [path for path in (self.checkpoint / below, self.checkpoint / below.name) if path.is_file()]
            self.checkpoint = found[0] if found else self.checkpoint
        if self.overwrite and not self.images:
            raise InputError("--overwrite is about masks of photographs: give --images, or leave it out")
        for name in SCORING_FLAGS if self.images else ():
            if name in fields and getattr(self, name) != fields[name].default:
                raise InputError(f"{flag_name(name)} is for scoring a split; with --images leave it out")

    @property
    def results(self) -> Path:
        """The folder for the results."""
        test = self.checkpoint.parent / ("test" if self.split == "Test" else f"test_{self.split}")
        return self.out or (test / "images" if self.images else test)


def parse(config_class: type[Config], doc: str, argv: list[str] | None = None) -> Config:
    """Read the command line into `config_class`; unknown flags and bad values end the script with exit code 2.

    With `--resume`, flags that were not given are read from the config.json of the run, if anything was saved yet.
    InputError when its settings are lost or wrong, or a given flag that is not in RESUMABLE has another value.
    """
    parser = _make_parser(config_class, description=doc)
    for argument in sys.argv[1:] if argv is None else argv:
        if hint := REMOVED_FLAGS.get(argument.partition("=")[0]):
            parser.error(f"{argument} no longer exists: {hint}")
    given = vars(parser.parse_args(argv))
    fresh = {**recipe_defaults(config_class, given.get("recipe", "report")), **given}
    if "warmup" in fresh and "warmup" not in given:  # a short training has a short warm-up
        fresh["warmup"] = min(fresh["warmup"], fresh.get("epochs", math.inf) / 2)
    if not given.get("resume"):
        try:
            return config_class(**fresh)
        except InputError as error:  # of __post_init__: flags that do not go together
            parser.error(str(error))

    out = given.get("out", config_class.__dataclass_fields__["out"].default)
    settings = out / "config.json"
    if not settings.is_file() or not settings.stat().st_size:  # empty: the machine failed while it was written
        if trained := [path.name for path in out.rglob("*") if path.name in ("last.pt", "best.pt")]:
            raise InputError(f"--resume: {settings} is missing or empty beside {trained[0]}: restore it from a copy")
        return config_class(**fresh)  # nothing was saved yet, so that a scheduler can always give --resume
    saved = restore_fields(config_class, read_json(settings), source=settings)
    if changed := [name for name in given if name not in RESUMABLE and given[name] != saved[name]]:
        lines = "\n".join(f"  {flag_name(name)} is {saved[name]} in the run, got {given[name]}" for name in changed)
        hint = "Leave these flags out, or start a new run with another --out."
        raise InputError(f"--resume: {out} was started with other settings:\n{lines}\n{hint}")
    return config_class(**{**saved, **given, "out": out})  # the folder may have been moved since


def recipe_defaults(config_class: type, recipe: str) -> dict[str, Any]:
    """The defaults of `--recipe` that are not those of the fields."""
    fields = dataclasses.fields(config_class) if recipe == "strong" else ()
    return {field.name: field.metadata["strong"] for field in fields if "strong" in field.metadata}


def as_plain_dict(config: Any) -> dict:
    """The config as JSON types; paths become strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def restore_fields(config_class: type, values: dict, *, source: Path) -> dict:
    """Inverse of `as_plain_dict`: field values by name.

    InputError when `source` is the config of another script, or a value is none that the flag accepts.
    """
    hints = typing.get_type_hints(config_class)  # of all fields
    if "accumulate" in values:  # its batch size was that of one process
        raise InputError(f"{source} is of an earlier version: test it, or start a new run with another --out")
    missing = hints.keys() - values.keys()
    if missing - RESUMABLE:  # the others have no effect on the result
        names = ", ".join(sorted(missing))
        raise InputError(f"{source} belongs to another model or version (no {names}); use another --out")
    parser = _make_parser(config_class, exit_on_error=False)
    known = [name for name in hints if name in values]
    return {name: _restore(parser, name, hints[name], values[name], source) for name in known}


def _restore(parser: argparse.ArgumentParser, name: str, hint: Any, value: Any, source: Path) -> Any:
    """A field's value from JSON, after the checks that the command line makes."""
    kinds = (hint, *typing.get_args(hint))
    if value is None and type(None) in kinds:
        return None
    if not isinstance(value, bool if bool in kinds else str | int | float):
        raise InputError(f"{source}: {name} cannot be {value!r}")
    text = f"{flag_name(name)}={value}" if bool not in kinds else flag_name(name if value else f"no_{name}")
    try:
        return getattr(parser.parse_args([text]), name)
    except argparse.ArgumentError as error:
        raise InputError(f"{source}: {error.message} (of {name})") from None


def _make_parser(config_class: type, **options: Any) -> argparse.ArgumentParser:
    """A parser with a flag for each field."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        _add_argument(parser, field, hints[field.name])
    return parser


def flag_name(field: str) -> str:
    """The flag of a field: "batch_size" is --batch-size."""
    return f"--{field.replace('_', '-')}"


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    metadata = field.metadata
    options: dict[str, Any] = {"help": describe_flag(field).replace("%", "%%")}
    if "parse" in metadata:
        options |= {"type": metadata["parse"], "metavar": "X,Y" if tuple in (hint, *typing.get_args(hint)) else "VALUE"}
        hint = None
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        options["choices"] = typing.get_args(hint)
    elif typing.get_origin(hint) is list:
        kind = typing.get_args(hint)[0]
        options |= {"type": _checked(kind, metadata), "nargs": metadata.get("nargs", "+")}
        options["metavar"] = "PATH" if kind is Path else "NAME"
    elif hint is not None:
        options |= {"type": _checked(hint, metadata), "metavar": hint.__name__.upper()}
    if metadata.get("positional"):
        options["metavar"] = field.name.upper()
    parser.add_argument(field.name if metadata.get("positional") else flag_name(field.name), **options)


def describe_flag(field: dataclasses.Field) -> str:
    """The help text of a flag, with its default."""
    default = None if field.default is MISSING else field.default
    strong = f"; with --recipe strong: {field.metadata['strong']}" if "strong" in field.metadata else ""
    return field.metadata["help"] + ("" if default is None or default is False else f" (default: {default}{strong})")


def _read_path(text: str) -> Path:
    """A path; "~" is the home unless a file has that name."""
    path = Path(text)
    try:
        return path if path.exists() else path.expanduser()
    except (OSError, RuntimeError):  # an overlong name, or "~name" that is no user's
        return path


def _checked(kind: type, metadata: Any) -> Callable[[str], Any]:
    low, high = metadata["low"], metadata["high"]

    def read(text: str) -> Any:
        if text in metadata.get("removed", {}):
            raise argparse.ArgumentTypeError(f"{text} no longer exists: {metadata['removed'][text]}")
        if kind is Path and not text:
            raise argparse.ArgumentTypeError("expected a path, got nothing")
        value = _read_path(text) if kind is Path else kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
        if isinstance(value, int | float) and not low <= value <= high:
            bounds = [f"{side} {edge}" for side, edge in (("at least", low), ("at most", high)) if math.isfinite(edge)]
            raise argparse.ArgumentTypeError(f"expected {' and '.join(bounds)}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse names the type in its message
    return read
