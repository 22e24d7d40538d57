"""Folders of tested runs: what they say, and whether their scores compare."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.files import InputError, read_json

if TYPE_CHECKING:  # the scripts that read runs answer --help at once
    import numpy as np


@dataclass
class Run:
    """What a tested run's folder says."""

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
    mark: str = ""  # why its scores are not comparable with the first run's

    @property
    def prompted(self) -> bool:
        return "object" in self.metrics["iou"]

    @property
    def title(self) -> str:
        return f"{self.name}{'*' if self.mark else ''}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Runs by their folders, named by as much of their paths as tells them apart. InputError for an untested one."""
    stages = [folder / "segmentation" if (folder / "segmentation").is_dir() else folder for folder in folders]
    named = [stage.parent if stage.name == "segmentation" else stage for stage in map(Path.absolute, stages)]
    if len(set(named)) < len(named):
        raise InputError("the same run was given twice")
    depth = 1
    while len({path.parts[-depth:] for path in named}) < len(named):
        depth += 1
    return [read_run("/".join(path.parts[-depth:]), stage) for path, stage in zip(named, stages)]


def read_run(name: str, folder: Path) -> Run:
    """One run. InputError when its folder has no scores, or lacks a file of them."""
    import numpy as np

    test = folder / "test"
    for path in (folder / "config.json", folder / "log.csv", test / "metrics.json", test / "images.csv"):
        if not path.is_file():
            what = "is no run" if path.parent == folder else "has no scores"
            raise InputError(f"{folder} {what}: {path} is missing. Train it, then score it with its model's test.py")
    metrics = read_json(test / "metrics.json")
    with (test / "images.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    classes = len(metrics["iou"]) - 1  # and the mean
    with (folder / "log.csv").open(newline="") as file:
        log = [
            {key: float(value) if value else float("nan") for key, value in row.items()} for row in csv.DictReader(file)
        ]
    robustness = test / "robustness.json"
    return Run(
        name,
        folder,
        read_json(folder / "config.json"),
        log,
        metrics,
        images=[row[0] for row in rows],
        labels=[row[1] for row in rows],
        image_iou=[float(row[2]) for row in rows],
        counts=np.array([row[3:] for row in rows], np.int64).reshape(len(rows), classes, classes),
        robustness=read_json(robustness) if robustness.is_file() else None,
    )  # fmt: skip


def mark_differences(runs: Sequence[Run], *, allowed: bool) -> None:
    """Mark the runs whose scores were made on other images or labels, or at another size, than those of the first.

    InputError, unless that is `allowed`, which says what differs.
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
            run.mark = f"perturbed at {sizes}, where the same square or blur is another one"
    marked = [f"  {run.name}: {run.mark}" for run in runs if run.mark]
    if marked and not allowed:
        raise InputError(
            "these scores do not compare:\n" + "\n".join(marked)
            + "\nScore the runs alike with test.py, or add --mixed to put them side by side all the same."
        )  # fmt: skip
