"""A command line from a dataclass: the fields are the flags, their defaults stand here and nowhere else.

This file imports nothing heavy, so that every script answers `--help` at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from utils.files import InputError, read_json

Config = TypeVar("Config")

# What a resumed run may change: how it is run and how long, not what is learned.
RESUMABLE = {"resume", "data", "epochs", "patience", "workers", "device", "compile", "out"}

# Of several processes on this machine each has its share of the cores.
WORKERS = min(8, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def flag(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf, **metadata: Any) -> Any:
    """A dataclass field that is a flag: `low` and `high` are the smallest and largest value allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, **metadata})


def number_or(word: str) -> Callable[[str], str | int]:
    """Reads `word`, or a positive whole number."""

    def read(text: str) -> str | int:
        if text == word:
            return text
        if not text.isdigit() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected {word!r} or a positive number, got {text!r}")
        return int(text)

    return read


@dataclass
class TrainConfig:
    """Flags that every train.py shares (report: Adam, batch 64, at most 50 epochs, cross-entropy, early stopping)."""

    data: Path = flag(Path("Dataset"), "folder that dataset/dataset_prep.py prepared")
    out: Path = flag(Path("runs/model"), "folder of this run")
    epochs: int = flag(50, "most passes over the training images", low=1)
    batch_size: int = flag(
        64,
        "images per batch and process, or 'auto': steps of 64, in batches that fit in memory",
        parse=number_or("auto"),
    )
    accumulate: int = flag(1, "batches whose gradients make one step of the optimizer: less memory", low=1)
    lr: float = flag(1e-4, "learning rate of Adam", low=0)
    schedule: Literal["constant", "cosine"] = flag(
        "constant", "how the learning rate goes: constant, or by a cosine towards zero over --epochs"
    )
    weight_decay: float = flag(0.0, "weight decay of Adam", low=0)
    image_size: int = flag(256, "edge in pixels of the square that images are resized to", low=32)
    loss: Literal["cross-entropy", "dice", "cross-entropy+dice"] = flag("cross-entropy", "what is minimized")
    boundary: Literal["background", "ignore"] = flag("background", "what the boundary band counts as in the loss")
    val_fraction: float = flag(0.1, "share of TrainVal kept for validation", low=0.001, high=0.9)
    patience: int = flag(3, "stop after so many epochs without a better validation loss (0: never)", low=0)
    min_delta: float = flag(1e-3, "what counts as better: a validation loss lower by at least this", low=0)
    workers: int = flag(WORKERS, "processes that load and augment (0: none)", low=0)
    seed: int = flag(0, "seeds the weights, the split, the order and the augmentation", low=0, high=2**32 - 1)
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to train")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto", "arithmetic of the model; auto: bf16 on a CUDA GPU, fp16 on an old one, else fp32"
    )
    compile: bool = flag(False, "compile the model with torch.compile")
    resume: bool = flag(False, "continue the run in --out with its own settings")
    limit: int | None = flag(None, "use only so many images, spread over both species (for a smoke run)", low=4)


@dataclass
class TestConfig:
    """Flags that every test.py shares."""

    checkpoint: Path = flag(Path("runs/model/best.pt"), "file that train.py wrote")
    data: Path = flag(Path("Dataset"), "folder that dataset/dataset_prep.py prepared")
    split: Literal["Test", "TrainVal"] = flag("Test", "images to score")
    out: Path | None = flag(None, "folder for the results (default: test/ beside the checkpoint)")
    batch_size: int = flag(32, "images per forward pass", low=1)
    score_size: str = flag(
        "native", "'native' (each image's own size) or the edge in pixels to score at", parse=number_or("native")
    )
    workers: int = flag(WORKERS, "processes that load images (0: none)", low=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to run the model")
    limit: int | None = flag(None, "score only so many images, spread over both species", low=1)
    images: list[Path] | None = flag(
        None, "segment these photographs (files or folders, no labels needed) instead of scoring a split"
    )
    perturb: list[str] | None = flag(
        None, "also score under these perturbations (without names: all eight), at ten levels each", nargs="*"
    )


def weighted_terms(text: str, names: Sequence[str]) -> dict[str, float]:
    """Weights by name of one of `names`, or of a weighted sum such as "mse+0.5*ssim"; an error for anything else."""
    terms: dict[str, float] = {}
    for part in text.split("+"):
        match = re.fullmatch(r"(?:(\d*\.?\d+)\*)?(\w+)", part)
        if match is None or match[2] not in names or match[2] in terms or float(match[1] or 1) == 0:
            known = ", ".join(names)
            raise argparse.ArgumentTypeError(
                f"expected one of {known}, or a weighted sum of them such as {names[0]}+0.5*{names[-1]}, got {text!r}"
            )
        terms[match[2]] = float(match[1] or 1)
    return terms


def parse(config_class: type[Config], doc: str, argv: list[str] | None = None) -> Config:
    """Read the command line into `config_class`; unknown flags and bad values end the script with exit code 2.

    With `--resume` the flags that were not given are read from the config.json of the run. InputError when there is no
    run to resume, or a flag was given that would make it another run.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        _add_argument(parser, field, hints[field.name])
    given = vars(parser.parse_args(argv))
    if not given.get("resume"):
        return config_class(**given)

    out = given.get("out", config_class.__dataclass_fields__["out"].default)
    if not (out / "config.json").is_file():
        raise InputError(f"--resume: {out} holds no run. Leave out --resume to start one.")
    saved = from_json(config_class, read_json(out / "config.json"), source=out / "config.json")
    changed = [name for name in given if name not in RESUMABLE and given[name] != saved[name]]
    if changed:
        lines = [f"  --{_dashed(name)} is {saved[name]} in the run, got {given[name]}" for name in changed]
        raise InputError(
            f"--resume: {out} was started with other settings:\n"
            + "\n".join(lines)
            + "\nLeave these flags out, or start a new run with another --out."
        )
    return config_class(**{**saved, **given, "out": out})  # the run may have been moved since


def to_json(config: Any) -> dict:
    """The config as JSON types."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in dataclasses.asdict(config).items()}


def from_json(config_class: type, values: dict, *, source: Path) -> dict:
    """Undo `to_json`: field values by name. InputError when `source` holds the config of another script."""
    hints = typing.get_type_hints(config_class)
    fields = {field.name for field in dataclasses.fields(config_class)}
    if fields - {"resume"} - set(values):
        missing = ", ".join(sorted(fields - set(values)))
        raise InputError(f"{source} belongs to another model or version (no {missing}); use another --out")
    restored = {name: values[name] for name in fields if name in values}
    return {
        name: Path(value) if isinstance(value, str) and Path in (hints[name], *typing.get_args(hints[name])) else value
        for name, value in restored.items()
    }


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main`. Exit code 1 and one line on stderr for InputError, for what the file system refuses (its
    message names the file) and for a worker that was killed; 130 for Ctrl-C."""
    logging.basicConfig(format="%(message)s")
    for package in ("utils", "dataset"):  # our own news, not the libraries'; of several processes the first one's
        logging.getLogger(package).setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        code = main()
        if processes := sys.modules.get("utils.distributed"):  # heavy, and of no concern where it was not used
            processes.leave()
        sys.exit(code)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"error: a worker that loads images was killed ({error}). Is memory short? Use fewer --workers")
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _add_argument(parser: argparse.ArgumentParser, field: dataclasses.Field, hint: Any) -> None:
    metadata = field.metadata
    default = None if field.default is MISSING else field.default
    help_text = metadata["help"] + ("" if default is None or default is False else f" (default: {default})")
    options: dict[str, Any] = {"help": help_text.replace("%", "%%")}
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # X | None
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is Literal:
        options["choices"] = typing.get_args(hint)
    elif typing.get_origin(hint) is list:
        kind = typing.get_args(hint)[0]
        options |= {"type": kind, "nargs": metadata.get("nargs", "+"), "metavar": "PATH" if kind is Path else "NAME"}
    else:
        options |= {"type": metadata.get("parse", _checked(hint, metadata)), "metavar": hint.__name__.upper()}
    parser.add_argument(f"--{_dashed(field.name)}", **options)


def _checked(kind: type, metadata: Any) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
        if isinstance(value, int | float) and not metadata["low"] <= value <= metadata["high"]:
            bounds = [f"at least {metadata['low']}"] if metadata["low"] > -math.inf else []
            bounds += [f"at most {metadata['high']}"] if metadata["high"] < math.inf else []
            raise argparse.ArgumentTypeError(f"expected {' and '.join(bounds)}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse names the type in its message for text that is no number
    return read
