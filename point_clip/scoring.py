"""Scores of a model prompted by clicks, and its picture."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from dataset.pet_heatmap import Click, picture_size, read_points, under_click
from point_clip.model import CLASS_NAMES, PointClip
from utils.config import TestConfig
from utils.dataset import overlay, pet_pixels, rescale_point, to_rgb
from utils.dataset_prep import random_pixel
from utils.evaluation import (
    SYNTHETIC_NOTE,
    Answer,
    Evaluation,
    format_scores,
    pick_examples,
    provenance,
    resize_logits,
    results_folder,
    save_mask,
    segment,
)
from utils.files import load_picture, write_json
from utils.helper import to_device
from utils.metric import ConfusionMatrix, count_confusion, nan_mean, predict
from utils.plot import plot_pictures
from utils.robustness import Damage, study_robustness

KINDS = {True: "pet", False: "background"}
DRAWN = 5  # clicks on either side for the spread: ten an image


@torch.inference_mode()
def score_clicks(
    model: PointClip,
    checkpoint: dict[str, Any],
    loader: DataLoader,
    config: TestConfig,
    device: torch.device,
    *,
    synthetic: bool,
    damage: Damage | None = None,
) -> dict[str, Any]:
    """Score the fixed clicks of a split and ten more per image, print the scores and return them.

    Writes metrics.json, images.csv, masks/ (of the fixed clicks on the pets) and predictions.png; under `damage`, the
    fixed clicks alone, what `utils.robustness` does.

    The scores are over object and ground, both kinds of click together and apart. `own_mask` is the share of clicks
    inside their own mask; `flips` the share of images where each of the two fixed clicks lies in its own mask and not
    in the other's. `spread` is the standard deviation of an image's object IoU over five clicks of a kind, mean over
    images. The baseline knows the pet's true outline and never looks at the click.
    """
    out = results_folder(config)
    records = loader.dataset.records
    fixed, photos = read_points(records), [picture_size(record.image) for record in records]
    size = checkpoint["config"]["image_size"]
    counts: dict[str, list[Tensor]] = {kind: [] for kind in KINDS.values()}
    both: list[Tensor] = []  # of the fixed clicks of each image together
    blind: list[Tensor] = []
    labels: list[int] = []
    drawn: list[dict[bool, list[float]]] = []
    image_iou: list[float] = []
    own: list[bool] = []
    flips: list[bool] = []
    began, done = time.perf_counter(), 0
    for batch in tqdm(loader, desc="test", leave=False):
        features = model.encode(to_device(batch, device)["image"])
        for position, label in enumerate(batch["label"]):
            image_features = [part[position : position + 1] for part in features]
            clicks = [in_label(click, photos[done], label.shape) for click in fixed[done]]
            more = draw_clicks(label, np.random.default_rng([0, done]))
            # Apart, so that the scores of the fixed clicks are those of the sweep's level 0 to the bit.
            answers = [
                predict_clicks(model, image_features, some, label.shape, size) for some in (clicks, more) if some
            ]
            masks = torch.cat(answers) if answers else torch.empty(0)
            tables = []
            for click, mask in zip([*clicks, *more], masks):
                tables.append(count_confusion(mask.cpu(), target_of(label, click), 2))
                own.append(bool(mask[int(click.y), int(click.x)]))
            scores = [ConfusionMatrix(CLASS_NAMES, table).iou()[1] for table in tables]
            for click, table in zip(clicks, tables):
                counts[KINDS[click.on_pet]].append(table)
                blind.append(count_confusion(torch.from_numpy(pet_pixels(label)).long(), target_of(label, click), 2))
            both.append(
                torch.stack(tables[: len(clicks)]).sum(dim=0) if clicks else torch.zeros(2, 2, dtype=torch.int64)
            )
            image_iou.append(nan_mean(scores[: len(clicks)]))
            if len(clicks) == 2:
                flips.append(all(flipped(masks[: len(clicks)], clicks)))
            labels.append(zlib.crc32(label))
            for click, mask in zip(clicks, masks):
                if click.on_pet:
                    save_mask(out / "masks" / f"{records[done].name}.png", mask.to(torch.uint8).cpu().numpy())
            drawn.append({on_pet: [] for on_pet in KINDS})
            for click, iou in zip(more, scores[len(clicks) :]):
                drawn[-1][click.on_pet].append(iou)
            done += 1
    seconds = time.perf_counter() - began

    evaluation = Evaluation(torch.stack(both), CLASS_NAMES, seconds, [record.name for record in records], labels)
    evaluation.write_images(out / "images.csv")
    source = provenance(model, checkpoint, config, device, synthetic=synthetic)
    metrics = evaluation.metrics()
    outline = ConfusionMatrix(CLASS_NAMES, torch.stack(blind).sum(dim=0))
    spread = [statistics.stdev(values) for image in drawn for values in image.values() if len(values) > 1]
    metrics |= {
        "images": len(image_iou),
        "clicks": len(blind),
        "skipped": {kind: len(image_iou) - len(tables) for kind, tables in counts.items()},
        "baseline": {"name": "true outline, blind to the click", **outline.scores()},
        "by_click": {
            kind: ConfusionMatrix(CLASS_NAMES, torch.stack(tables).sum(dim=0)).scores()
            for kind, tables in counts.items()
            if tables
        },
        "spread": {
            "clicks": 2 * DRAWN,
            "iou_mean": nan_mean(value for image in drawn for values in image.values() for value in values),
            "iou_std": nan_mean(spread),
        },
        "own_mask": sum(own) / len(own),
        "flips": sum(flips) / len(flips) if flips else None,
        "images_per_second": len(image_iou) / seconds,
        **source,
    }
    write_json(out / "metrics.json", metrics)
    note = SYNTHETIC_NOTE if synthetic else ""
    plot_examples(model, records, fixed, image_iou, out / "predictions.png", size, device, note)
    title = f"{config.checkpoint}: {len(blind)} clicks on {len(image_iou)} images of {config.data / config.split}"
    print(format_scores(metrics, f"{title} ({note})" if note else title))
    for kind, scores in metrics["by_click"].items():
        print(f"  clicks on the {kind}: object IoU {100 * scores['iou']['object']:.1f}")
    print(
        f"  {100 * metrics['own_mask']:.1f} % of {len(own)} clicks lie in their own mask; moving the click flips it on "
        f"{100 * metrics['flips'] if flips else 0:.1f} % of {len(flips)} images\n"
        f"  object IoU over {2 * DRAWN} clicks an image: mean {100 * metrics['spread']['iou_mean']:.1f}, "
        f"standard deviation within an image {100 * metrics['spread']['iou_std']:.1f}\n"
        f"  without such a point, skipped: {metrics['skipped']}\n{out / 'metrics.json'}\n{out / 'predictions.png'}"
    )
    if damage:
        prompts = {record.name: prompt for record, *prompt in zip(records, photos, fixed)}
        study_robustness(answer_clicks(model, prompts, size), damage, device, CLASS_NAMES, out, source, note)
    return metrics


def answer_clicks(model: PointClip, prompts: dict[str, tuple[Sequence[int], Sequence[Click]]], size: int) -> Answer:
    """Masks and targets (K, H, W) of the K clicks on each image; `prompts` are its (width, height) and its clicks."""

    def answer(batch: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        features = model.encode(batch["image"])
        for position, (name, label) in enumerate(zip(batch["name"], batch["label"])):
            photo, fixed = prompts[name]
            clicks = [in_label(click, photo, label.shape) for click in fixed]
            if clicks:
                image_features = [part[position : position + 1] for part in features]
                targets = torch.stack([target_of(label, click) for click in clicks])
                yield predict_clicks(model, image_features, clicks, label.shape, size), targets.to(features[0].device)

    return answer


def draw_clicks(label: np.ndarray, rng: np.random.Generator) -> list[Click]:
    """Up to five random clicks on the pet and five on the background of a label (H, W)."""
    clicks = []
    for on_pet, where in ((True, pet_pixels(label)), (False, label == 0)):
        points = [random_pixel(where, rng) for _ in range(DRAWN)]
        clicks += [Click(*point, on_pet) for point in points if point is not None]
    return clicks


def predict_clicks(
    model: PointClip, features: Sequence[Tensor], clicks: Sequence[Click], shape: Sequence[int], size: int
) -> Tensor:
    """Masks (N, H, W) of N clicks on one image of `shape` (H, W), whose features were computed at `size` pixels."""
    points = [rescale_point(click.x, click.y, shape[::-1], (size, size)) for click in clicks]
    logits = model.decode(features, torch.tensor(points, device=features[0].device), (size, size))
    return predict(resize_logits(logits, shape))


def flipped(masks: Tensor, clicks: Sequence[Click]) -> list[bool]:
    """Of each of two masks: does it hold its own click, and not the other's?"""
    inside = [[bool(mask[int(click.y), int(click.x)]) for click in clicks] for mask in masks]
    return [row[index] and not row[1 - index] for index, row in enumerate(inside)]


def in_label(click: Click, photo: Sequence[int], shape: Sequence[int]) -> Click:
    """A click of a photograph of size (width, height) as a pixel of its label (H, W), which may be resized."""
    point = rescale_point(click.x, click.y, photo, shape[::-1])
    x, y = (min(max(round(place), 0), edge - 1) for place, edge in zip(point, shape[::-1]))
    return Click(x, y, click.on_pet)


def target_of(label: np.ndarray | Tensor, click: Click) -> Tensor:
    """What lies under a click: 1 there, 0 elsewhere, 255 on the boundary; (H, W)."""
    label = torch.as_tensor(label)
    return under_click(label[None], torch.tensor([click.on_pet], device=label.device))[0]


def plot_examples(
    model: PointClip,
    records: Sequence[Any],
    fixed: Sequence[Sequence[Click]],
    image_iou: Sequence[float],
    path: Any,
    size: int,
    device: torch.device,
    note: str,
) -> None:
    """Best, median and worst images: photograph, truth, and the answer to either click, which is marked."""
    rows = []
    for rank, index in pick_examples(image_iou):
        photo = to_rgb(load_picture(records[index].image))
        pixels = np.asarray(photo)
        answers = {kind: np.full_like(pixels, 255) for kind in KINDS}
        for click in fixed[index]:
            mask = segment(model, photo, size, device, point=(click.x, click.y))
            answers[click.on_pet] = with_mark(overlay(pixels, mask), click.x, click.y)
        caption = f"{rank}: {records[index].name}\nobject IoU {image_iou[index]:.2f}"
        rows.append((caption, [pixels, overlay(pixels, records[index].load_label()), *answers.values()]))
    plot_pictures(path, rows, ("photograph", "truth", "click on the pet", "click beside it"), note)


def with_mark(pixels: np.ndarray, x: float, y: float) -> np.ndarray:
    """A copy of a picture (H, W, 3) with a white dot, ringed in black, at a point."""
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for radius, color in ((0.022, "black"), (0.015, "white")):
        edge = radius * max(picture.size)
        draw.ellipse((x - edge, y - edge, x + edge, y + edge), fill=color)
    return np.asarray(picture)
