"""Scores of a model prompted by clicks, and its picture."""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

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
from utils.distributed import gather_samples, rank
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
    index_of = {record.name: index for index, record in enumerate(records)}
    answers: list[ImageAnswer] = []
    began = time.perf_counter()
    for batch in tqdm(loader, desc="test", leave=False, disable=rank() != 0):
        features = model.encode(to_device(batch, device)["image"])
        for position, (name, label) in enumerate(zip(batch["name"], batch["label"])):
            index = index_of[name]
            clicks = [in_label(click, photos[index], label.shape) for click in fixed[index]]
            more = draw_clicks(label, np.random.default_rng([0, index]))
            image_features = [part[position : position + 1] for part in features]
            answer, masks = answer_image(model, image_features, label, clicks, more, size)
            answers.append(answer)
            for click, mask in zip(clicks, masks):
                if click.on_pet:
                    save_mask(out / "masks" / f"{name}.png", mask.to(torch.uint8).cpu().numpy())
    answers = gather_samples(loader, answers)
    seconds = time.perf_counter() - began

    every = [pair for answer in answers for pair in answer.fixed]
    both = [sum_counts(counts for _, counts in answer.fixed) for answer in answers]
    of_kind = {kind: [counts for on_pet, counts in every if on_pet == is_pet] for is_pet, kind in KINDS.items()}
    drawn = [[iou for on_pet, iou in answer.drawn if on_pet == is_pet] for answer in answers for is_pet in KINDS]
    own = [inside for answer in answers for inside in answer.own]
    flips = [answer.flipped for answer in answers if answer.flipped is not None]
    names, labels = [record.name for record in records], [answer.label for answer in answers]
    evaluation = Evaluation(torch.stack(both), CLASS_NAMES, seconds, names, labels)
    outline = ConfusionMatrix(CLASS_NAMES, sum_counts(answer.blind for answer in answers))
    source = provenance(model, checkpoint, config, device, synthetic=synthetic)
    metrics = evaluation.metrics() | {
        "clicks": len(every),
        "skipped": {kind: len(answers) - len(tables) for kind, tables in of_kind.items()},
        "baseline": {"name": "true outline, blind to the click", **outline.scores()},
        "by_click": {
            kind: ConfusionMatrix(CLASS_NAMES, sum_counts(tables)).scores()
            for kind, tables in of_kind.items()
            if tables
        },
        "spread": {
            "clicks": 2 * DRAWN,
            "iou_mean": nan_mean(iou for values in drawn for iou in values),
            "iou_std": nan_mean(statistics.stdev(values) for values in drawn if len(values) > 1),
        },
        "own_mask": sum(own) / len(own),
        "flips": sum(flips) / len(flips) if flips else None,
        "images_per_second": len(answers) / seconds,
        **source,
    }
    note = SYNTHETIC_NOTE if synthetic else ""
    if rank() == 0:
        evaluation.write_images(out / "images.csv")
        write_json(out / "metrics.json", metrics)
        image_iou = [
            nan_mean(ConfusionMatrix(CLASS_NAMES, torch.tensor(counts)).iou()[1] for _, counts in answer.fixed)
            for answer in answers
        ]
        plot_examples(model, records, fixed, image_iou, out / "predictions.png", size, device, note)
        title = f"{config.checkpoint}: {len(every)} clicks on {len(answers)} images of {config.data / config.split}"
        print(format_scores(metrics, f"{title} ({note})" if note else title))
        print(format_clicks(metrics, len(own), len(flips)))
        print(f"{out / 'metrics.json'}\n{out / 'predictions.png'}")
    if damage:
        prompts = {record.name: prompt for record, *prompt in zip(records, photos, fixed)}
        study_robustness(answer_clicks(model, prompts, size), damage, device, CLASS_NAMES, out, source, note)
    return metrics


def format_clicks(metrics: dict[str, Any], clicks: int, images: int) -> str:
    """What is particular to clicks, in percent: of so many `clicks`, and of so many `images` with one of each kind."""
    spread, flips = metrics["spread"], metrics["flips"] or 0
    lines = [
        f"  clicks on the {kind}: object IoU {100 * scores['iou']['object']:.1f}"
        for kind, scores in metrics["by_click"].items()
    ]
    lines += [
        f"  {100 * metrics['own_mask']:.1f} % of {clicks} clicks lie in their own mask; "
        f"moving the click flips it on {100 * flips:.1f} % of {images} images",
        f"  object IoU over {spread['clicks']} clicks an image: mean {100 * spread['iou_mean']:.1f}, "
        f"standard deviation within an image {100 * spread['iou_std']:.1f}",
        f"  without such a point, skipped: {metrics['skipped']}",
    ]
    return "\n".join(lines)


class ImageAnswer(NamedTuple):
    """How well the clicks on one image were answered, in plain values; counts are confusion counts (2, 2)."""

    label: int  # checksum
    fixed: list[tuple[bool, list[list[int]]]]  # of each fixed click: whether it is on the pet, and its counts
    drawn: list[tuple[bool, float]]  # of each further click: whether it is on the pet, and its object IoU
    own: list[bool]  # of each click: whether its mask holds it
    flipped: bool | None  # whether both fixed clicks lie in their own mask alone; None without such a pair
    blind: list[list[int]]  # of the pet's true outline, given as the answer to every fixed click


def answer_image(
    model: PointClip,
    features: Sequence[Tensor],
    label: np.ndarray,
    clicks: Sequence[Click],
    more: Sequence[Click],
    size: int,
) -> tuple[ImageAnswer, Tensor]:
    """Answer the fixed and `more` clicks on an image, whose features were computed at `size` pixels; also the masks."""
    # Apart, so that the scores of the fixed clicks are those of the sweep's level 0 to the bit.
    answers = [predict_clicks(model, features, some, label.shape, size) for some in (clicks, more) if some]
    masks = torch.cat(answers) if answers else torch.empty(0)
    targets = [target_of(label, click) for click in (*clicks, *more)]
    tables = [count_confusion(mask.cpu(), target, 2) for mask, target in zip(masks, targets)]
    outline = torch.from_numpy(pet_pixels(label)).long()
    answer = ImageAnswer(
        label=zlib.crc32(label),
        fixed=[(click.on_pet, table.tolist()) for click, table in zip(clicks, tables)],
        drawn=[
            (click.on_pet, ConfusionMatrix(CLASS_NAMES, table).iou()[1])
            for click, table in zip(more, tables[len(clicks) :])
        ],
        own=[bool(mask[int(click.y), int(click.x)]) for click, mask in zip((*clicks, *more), masks)],
        flipped=all(flipped(masks[:2], clicks)) if len(clicks) == 2 else None,
        blind=sum_counts(count_confusion(outline, target, 2) for target in targets[: len(clicks)]).tolist(),
    )
    return answer, masks


def sum_counts(tables: Iterable[Tensor | list[list[int]]]) -> Tensor:
    """The sum of confusion counts (2, 2), zeros where there are none."""
    return sum((torch.as_tensor(table) for table in tables), torch.zeros(2, 2, dtype=torch.int64))


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
    for place, index in pick_examples(image_iou):
        photo = to_rgb(load_picture(records[index].image))
        pixels = np.asarray(photo)
        answers = {kind: np.full_like(pixels, 255) for kind in KINDS}
        for click in fixed[index]:
            mask = segment(model, photo, size, device, point=(click.x, click.y))
            answers[click.on_pet] = with_mark(overlay(pixels, mask), click.x, click.y)
        caption = f"{place}: {records[index].name}\nobject IoU {image_iou[index]:.2f}"
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
