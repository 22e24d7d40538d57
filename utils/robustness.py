"""How scores fall when images are damaged: the sweep over perturbations and levels, and what it says."""

from __future__ import annotations

import csv
import io
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.distributed import add_up, rank, world
from utils.files import write_bytes, write_json
from utils.helper import to_device
from utils.metric import ConfusionMatrix, count_confusion
from utils.plot import plot_robustness

SEEDS = 3  # draws of a perturbation that chance is part of


class Damage(NamedTuple):
    """Perturbations (`dataset.perturbation`), and a loader whose batches hold as `chance/NAME` (B, draws, ...) what
    those that chance is part of need."""

    perturbations: Sequence[Any]
    loader: DataLoader


@torch.inference_mode()
def sweep(answer: Callable, damage: Damage, device: torch.device, num_classes: int) -> dict[str, Tensor]:
    """Confusion counts (levels, draws, C, C) of every perturbation, summed over all images of all processes.

    Every image is loaded once. Level 0 is the image itself, answered once for all perturbations; those without chance
    have one draw.
    """
    perturbations, loader = damage
    counts: dict[str, Tensor] = {}

    def count(batch: dict[str, Any], image: Tensor) -> Tensor:
        total = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        for prediction, target in answer(to_device(batch | {"image": image}, device)):
            total += count_confusion(prediction, target, num_classes)
        return total

    total = len(loader.dataset) * passes(perturbations)
    with tqdm(total=total, desc="perturb", unit="image", leave=False, disable=rank() != 0) as bar:
        for batch in loader:
            image = batch["image"].to(device, non_blocking=True)
            chances = {way.name: batch[f"chance/{way.name}"].to(device) for way in perturbations if way.draw}
            # What every pass needs goes to the device once.
            batch = {"name": batch["name"], "label": [torch.from_numpy(label).to(device) for label in batch["label"]]}
            clean = count(batch, image)
            bar.update(len(image) * world())
            for way in perturbations:
                draws = SEEDS if way.draw else 1
                table = counts.setdefault(way.name, clean.new_zeros(len(way.amounts), draws, *clean.shape))
                table[0] += clean
                for draw in range(draws):
                    chance = chances[way.name][:, draw] if way.draw else None
                    for level in range(1, len(way.amounts)):
                        table[level, draw] += count(batch, way(image, level, chance))
                        bar.update(len(image) * world())
    return {name: add_up(table).cpu() for name, table in counts.items()}


def passes(perturbations: Sequence[Any]) -> int:
    """How often the sweep answers each image."""
    return 1 + sum((len(way.amounts) - 1) * (SEEDS if way.draw else 1) for way in perturbations)


def study_robustness(
    answer: Callable,
    damage: Damage,
    device: torch.device,
    class_names: Sequence[str],
    out: Path,
    source: dict[str, Any],
    note: str,
) -> None:
    """Sweep, write robustness.json, robustness.csv and robustness.png into `out`, and print what was retained."""
    began = time.perf_counter()
    counts = sweep(answer, damage, device, len(class_names))
    seconds = time.perf_counter() - began
    if rank() != 0:
        return
    perturbations, images = damage.perturbations, len(damage.loader.dataset)
    scores = {name: score_levels(table, class_names) for name, table in counts.items()}
    truth = next(iter(counts.values()))[0, 0].sum(dim=1)
    present = [name for name, pixels in zip(class_names, truth) if pixels]
    summary: dict[str, Any] = {
        "images": images, "draws": SEEDS, "seconds": seconds,
        "images_per_second": images * passes(perturbations) / seconds, **source,
        "perturbations": {
            way.name: {
                "unit": way.unit, "amounts": list(way.amounts), **summarize(scores[way.name], present),
                **scores[way.name],
            }
            for way in perturbations
        },
    }  # fmt: skip
    for key in ("retained_last", "retained_mean", "area"):
        summary[key] = statistics.fmean(entry[key] for entry in summary["perturbations"].values())
    write_json(out / "robustness.json", summary)
    write_bytes(out / "robustness.csv", format_rows(summary).encode())
    plot_robustness(out / "robustness.png", summary["perturbations"], class_names, note)
    print(format_summary(summary))
    print("\n".join(str(out / f"robustness.{suffix}") for suffix in ("json", "csv", "png")))


def score_levels(counts: Tensor, class_names: Sequence[str]) -> dict[str, dict[str, list[list[float | None]]]]:
    """{"dice": {class or "mean": [[a score per draw] per level]}, "iou": ...} of counts (levels, draws, C, C)."""
    table = [[ConfusionMatrix(class_names, draw).scores() for draw in level] for level in counts]
    return {
        kind: {label: [[draw[kind][label] for draw in level] for level in table] for label in (*class_names, "mean")}
        for kind in ("dice", "iou")
    }


def summarize(scores: dict[str, Any], class_names: Sequence[str]) -> dict[str, float]:
    """The mean Dice that is left, as a share of the clean one: at the last level, and on average over levels 1 to 9;
    and the area under the curve of the mean Dice over the levels (trapezoids), 1 where it is 1 at every level.

    The mean is over `class_names`, those that the truth holds: another, once predicted, would change what is averaged.
    """
    levels = zip(*(scores["dice"][name] for name in class_names))
    curve = [statistics.fmean(value for draws in level for value in draws) for level in levels]
    clean = curve[0] or float("nan")
    area = sum((one + two) / 2 for one, two in itertools.pairwise(curve)) / (len(curve) - 1)
    return {"retained_last": curve[-1] / clean, "retained_mean": statistics.fmean(curve[1:]) / clean, "area": area}


def format_rows(summary: dict[str, Any]) -> str:
    """robustness.csv: a row per perturbation, level, draw and class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["perturbation", "level", "amount", "draw", "class", "dice", "iou"])
    for name, entry in summary["perturbations"].items():
        for level, amount in enumerate(entry["amounts"]):
            for label in entry["dice"]:
                pairs = zip(entry["dice"][label][level], entry["iou"][label][level])
                for draw, (dice, iou) in enumerate(pairs):
                    writer.writerow([name, level, amount, draw, label, *(_round(value) for value in (dice, iou))])
    return text.getvalue()


def format_summary(summary: dict[str, Any]) -> str:
    """A line per perturbation, the most harmful first, in percent."""
    lines = [f"  {'mean Dice that is left, %':26}{'last level':>12}{'all levels':>12}{'area':>8}"]
    entries = sorted(summary["perturbations"].items(), key=lambda item: item[1]["retained_last"])
    for name, entry in [*entries, ("all of these", summary)]:
        values = (100 * entry[key] for key in ("retained_last", "retained_mean", "area"))
        lines.append(f"  {name:26}" + "{:>12.1f}{:>12.1f}{:>8.1f}".format(*values))
    return "\n".join(lines)


def _round(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
