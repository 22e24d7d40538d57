"""Folders of tested runs: read them, and mark scores that cannot be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.dataset import CLICKS, PETS, ClassTable
from utils.files import InputError, read_csv, read_json


@dataclass
class Run:
    """The content of a tested run's folder."""

    name: str
    folder: Path
    config: dict[str, Any]
    log: list[dict[str, float]]
    metrics: dict[str, Any]
    images: list[str]
    labels: list[str]  # checksums
    image_iou: list[float]
    counts: np.ndarray  # (images, C, C), row = truth
    robustness: dict[str, Any] | None
    reconstruction: dict[str, Any] | None
    mark: str = ""  # the reason if its scores cannot be compared with the first run's

    @property
    def prompted(self) -> bool:
        return list(self.metrics["iou"]) == [*CLICKS.names, "mean"]

    @property
    def class_table(self) -> ClassTable:
        """The classes of its masks. Older runs, whose config.json does not hold them, have today's."""
        plain = self.config.get("class_table")
        return ClassTable.from_plain_dict(plain) if plain else CLICKS if self.prompted else PETS

    @property
    def title(self) -> str:
        """The name, with an asterisk if the run is marked."""
        return f"{self.name}{'*' if self.mark else ''}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs by their folders, named by the shortest distinct ends of their paths. InputError for an untested one."""
    named = [path.parent if path.name == "segmentation" else path for path in map(Path.absolute, folders)]
    if len(set(named)) < len(named):
        raise InputError("the same run was given twice")
    depth = 1
    while len({path.parts[-depth:] for path in named}) < len(named):
        depth += 1
    return [read_run("/".join(path.parts[-depth:]), path) for path in named]


def read_run(name: str, folder: Path) -> Run:
    """One run. InputError when a file of its training or of its test is missing."""
    from models import MODELS  # imports torch

    stages = [(folder / model.checkpoint).parent for model in MODELS.values()]  # the autoencoder's is a subfolder
    folder = next((stage for stage in stages if (stage / "log.csv").exists()), folder)
    test = folder / "test"
    for path in (folder / "config.json", folder / "log.csv", test / "metrics.json", test / "images.csv"):
        if not path.is_file():
            problem = "is not a run" if path.parent == folder else "has no scores"
            raise InputError(f"{folder} {problem}: {path} is missing. Train it, then score it with its model's test.py")
    try:
        return _read_files(name, folder, test)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{folder} has files that train.py and test.py did not write ({problem}): test it again"
        ) from error


def _read_files(name: str, folder: Path, test: Path) -> Run:
    metrics = read_json(test / "metrics.json")
    rows = [list(row.values()) for row in read_csv(test / "images.csv")]
    classes = len(metrics["iou"]) - 1  # without the mean
    if len(rows) != metrics["images"]:
        raise ValueError(f"images.csv has {len(rows)} rows, metrics.json {metrics['images']} images")
    return Run(
        name=name,
        folder=folder,
        config=read_json(folder / "config.json"),
        log=[{key: float(value or "nan") for key, value in row.items()} for row in read_csv(folder / "log.csv")],
        metrics=metrics,
        images=[row[0] for row in rows],
        labels=[row[1] for row in rows],
        image_iou=[float(row[2]) for row in rows],
        counts=np.array([row[3:] for row in rows], np.int64).reshape(len(rows), classes, classes),
        robustness=read_json(test / "robustness.json") if (test / "robustness.json").is_file() else None,
        reconstruction=read_json(test / "reconstruction.json") if (test / "reconstruction.json").is_file() else None,
    )


def mark_differences(runs: Sequence[Run], *, allowed: bool) -> None:
    """Mark the runs with scores on other images, against other labels or at another size than the first run's.

    InputError that names the differences, unless they are `allowed`.
    """
    first = runs[0]
    for run in runs[1:]:
        ours, theirs = run.metrics["score_size"], first.metrics["score_size"]
        if ours != theirs:
            run.mark = f"scored at size {ours}, {first.name} at {theirs}"
        elif run.images != first.images:
            run.mark = f"scored on other images ({len(run.images)}) than {first.name} ({len(first.images)})"
        elif run.labels != first.labels:
            run.mark = f"scored against other labels than {first.name}"
        elif run.robustness and first.robustness and run.metrics["image_size"] != first.metrics["image_size"]:
            sizes = f"{run.metrics['image_size']} pixels, {first.name} at {first.metrics['image_size']}"
            run.mark = f"perturbed at {sizes}, where an occlusion or blur has another relative size"
    marked = "\n".join(f"  {run.name}: {run.mark}" for run in runs if run.mark)
    if marked and not allowed:
        hint = "Score the runs in the same way with test.py, or add --mixed to put them side by side anyway."
        raise InputError(f"these scores cannot be compared:\n{marked}\n{hint}")
