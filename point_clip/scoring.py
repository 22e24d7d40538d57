"""Scores of a model prompted by clicks, and their pictures."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor

from dataset.pet_heatmap import Click, click_target, read_points
from point_clip.model import PointClip
from utils.dataset import CLICKS, foreground
from utils.dataset_prep import random_pixel
from utils.distributed import all_gather_objects, rank
from utils.evaluation import MASK_SUFFIXES, ImagePrediction, ModelTest, PredictBatch, example_arrays, pick_examples
from utils.figures import plot_pictures, save_figure
from utils.files import fit_name
from utils.image import picture_size, rescale_point
from utils.metric import ConfusionMatrix, count_confusion, logits_to_classes, nan_mean
from utils.predictor import resize_logits

SIDES = {True: "pet", False: "background"}
SUFFIXES = dict(zip((True, False), MASK_SUFFIXES))  # of the saved masks of clicks on the pet and on the background
RANDOM_CLICKS = 5  # on each side of each image


class ClickStatistics(NamedTuple):
    """Results of the clicks on one clean image, as plain values; counts are confusion counts (2, 2)."""

    fixed: list[tuple[bool, list[list[int]]]]  # of each fixed click: whether it is on the pet, and its counts
    random: list[tuple[bool, float]]  # of each random click: whether it is on the pet, and its object IoU
    hits: list[bool]  # of each click: whether its mask contains it
    follows: bool | None  # each of the two fixed clicks is in its own mask only; None without two clicks
    baseline: list[list[int]]  # counts of predicting the pet's true outline for every fixed click


def score_clicks(test: ModelTest) -> str:
    """Score the fixed clicks of a split and ten random clicks per image; returns the scores as text.

    Writes the files of `ModelTest.write`, predictions.png and masks/: NAME.png of the click on the pet,
    NAME_background.png of the other. Perturbed images are scored with the fixed clicks only. The classes are object and
    ground.

    `own_mask` is the share of clicks inside their own mask; `flips` the share of images where each of the two fixed
    clicks is in its own mask and not in the other's. `spread` holds the mean object IoU of the random clicks, and its
    standard deviation over the five on one side of an image, mean over images and sides. The baseline predicts the true
    outline of the pet for every click.
    """
    fixed = dict(zip(test.test_set.names, read_points(test.test_set.records)))
    own: dict[str, ClickStatistics] = {}
    evaluation = test.evaluate(predict_clicks(test, fixed, own), CLICKS)
    statistics_of = dict(all_gather_objects(list(own.items())))
    if rank() != 0:
        return ""
    per_image = [statistics_of[name] for name in test.test_set.names]
    metrics = evaluation.metrics() | summarize_clicks(per_image)
    path = test.config.results / "predictions.png"
    save_figure(plot_examples(test, per_image, fixed), path)
    title = f"{test.config.checkpoint}: {metrics['clicks']} clicks on {metrics['images']} images"
    return test.write(evaluation, metrics, title, [format_clicks(metrics, per_image), str(path)])


def predict_clicks(
    test: ModelTest, fixed: dict[str, Sequence[Click]], statistics_of: dict[str, ClickStatistics]
) -> PredictBatch:
    """Predictions for the clicks `fixed`, by image name, in pixels of the photograph.

    The statistics of the clean images are added to `statistics_of`, by name.
    """
    model, size = test.averaged, test.checkpoint["config"]["image_size"]
    index_of = {record.name: index for index, record in enumerate(test.test_set.records)}
    photo_size = {record.name: picture_size(record.image) for record in test.test_set.records}

    def predict(batch: dict[str, Any]) -> Iterator[ImagePrediction]:
        maps = model.encode(batch["image"])
        for number, (name, label) in enumerate(zip(batch["name"], batch["label"])):
            features = [part[number : number + 1] for part in maps]
            clicks = [to_label_pixels(click, photo_size[name], label.shape) for click in fixed[name]]
            masks, targets = predict_one(model, features, clicks, label, size)
            if batch["perturbation"] is None:
                random = sample_clicks(label.cpu().numpy(), np.random.default_rng([0, index_of[name]]))
                further = predict_one(model, features, random, label, size)
                statistics_of[name] = collect_statistics(label, (clicks, masks, targets), (random, *further))
            yield ImagePrediction(masks, targets, [SUFFIXES[click.on_pet] for click in clicks])

    return predict


def predict_one(
    model: PointClip, features: list[Tensor], clicks: Sequence[Click], label: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Masks and targets (K, H, W) of K clicks on one image; the clicks are in pixels of its label (H, W)."""
    if not clicks:
        return label.new_empty(0, *label.shape), label.new_empty(0, *label.shape)
    points = [rescale_point(click.x, click.y, label.shape[::-1], (size, size)) for click in clicks]
    logits = model.decode(features, torch.tensor(points, device=features[0].device), (size, size))
    on_pet = torch.tensor([click.on_pet for click in clicks], device=label.device)
    targets = click_target(label.expand(len(clicks), *label.shape), on_pet)
    return logits_to_classes(resize_logits(logits, label.shape)), targets


def sample_clicks(label: np.ndarray, rng: np.random.Generator) -> list[Click]:
    """Up to five random clicks on the pet and five on the background of a label (H, W), in its pixels."""
    clicks = []
    for on_pet, side in ((True, foreground(label)), (False, label == 0)):
        points = [random_pixel(side, rng) for _ in range(RANDOM_CLICKS)]
        clicks += [Click(*point, on_pet) for point in points if point is not None]
    return clicks


def to_label_pixels(click: Click, photo: Sequence[int], shape: Sequence[int]) -> Click:
    """A click on a photograph of size (width, height) as a pixel of its label (H, W), which may be resized."""
    point = rescale_point(click.x, click.y, photo, shape[::-1])
    x, y = (min(max(round(value), 0), edge - 1) for value, edge in zip(point, shape[::-1]))
    return Click(x, y, click.on_pet)


Clicked = tuple[Sequence[Click], Tensor, Tensor]  # K clicks, their masks and targets (K, H, W)


def collect_statistics(label: Tensor, fixed: Clicked, random: Clicked) -> ClickStatistics:
    """The statistics of one image from its fixed and its random clicks."""
    clicks, masks, targets = fixed
    outline = foreground(label).long().expand_as(targets)
    return ClickStatistics(
        fixed=[(click.on_pet, count_confusion(mask, target, 2).tolist()) for click, mask, target in zip(*fixed)],
        random=[(click.on_pet, object_iou(count_confusion(mask, target, 2))) for click, mask, target in zip(*random)],
        hits=[bool(mask[click.y, click.x]) for group in (fixed, random) for click, mask, _ in zip(*group)],
        follows=follows_click(masks, clicks) if len(clicks) == 2 else None,
        baseline=count_confusion(outline, targets, 2).tolist(),
    )


def follows_click(masks: Tensor, clicks: Sequence[Click]) -> bool:
    """Whether each of two masks (2, H, W) contains its own click and not the other's."""
    contains = [[bool(mask[click.y, click.x]) for click in clicks] for mask in masks]
    return contains == [[True, False], [False, True]]


def object_iou(counts: Tensor) -> float:
    """IoU of the clicked object from counts (2, 2); NaN if neither truth nor prediction has it."""
    return ConfusionMatrix(CLICKS.names, counts).iou()[CLICKS.value("object")]


def summarize_clicks(per_image: Sequence[ClickStatistics]) -> dict[str, Any]:
    """The keys of metrics.json that only prompted models have."""
    pairs = [pair for image in per_image for pair in image.fixed]
    by_side = {name: [counts for on_pet, counts in pairs if on_pet == side] for side, name in SIDES.items()}
    random = [[iou for on_pet, iou in image.random if on_pet == side] for image in per_image for side in SIDES]
    hits = [hit for image in per_image for hit in image.hits]
    follows = [image.follows for image in per_image if image.follows is not None]
    total = {name: torch.tensor(tables).sum(dim=0) for name, tables in by_side.items() if tables}  # (2, 2)
    baseline = torch.tensor([image.baseline for image in per_image]).sum(dim=0)
    return {
        "clicks": len(pairs),
        "skipped": {name: len(per_image) - len(tables) for name, tables in by_side.items()},
        "baseline": {"name": "true outline, blind to the click", **ConfusionMatrix(CLICKS.names, baseline).scores()},
        "by_click": {name: ConfusionMatrix(CLICKS.names, counts).scores() for name, counts in total.items()},
        "spread": {
            "clicks": 2 * RANDOM_CLICKS,
            "iou_mean": nan_mean(iou for values in random for iou in values),
            "iou_std": nan_mean(statistics.stdev(values) for values in random if len(values) > 1),
        },
        "own_mask": sum(hits) / len(hits),
        "flips": sum(follows) / len(follows) if follows else None,
    }


def format_clicks(metrics: dict[str, Any], per_image: Sequence[ClickStatistics]) -> str:
    """The scores that only prompted models have, as text, in percent."""
    spread, clicks = metrics["spread"], sum(len(image.hits) for image in per_image)
    images = sum(image.follows is not None for image in per_image)
    by_side = {side: 100 * scores["iou"]["object"] for side, scores in metrics["by_click"].items()}
    lines = [
        *(f"  clicks on the {side}: object IoU {iou:.1f}" for side, iou in by_side.items()),
        f"  {100 * metrics['own_mask']:.1f} % of {clicks} clicks are in their own mask; "
        f"the mask follows the click on {100 * (metrics['flips'] or 0):.1f} % of {images} images",
        f"  object IoU over {spread['clicks']} random clicks per image: mean {100 * spread['iou_mean']:.1f}, "
        f"standard deviation within an image {100 * spread['iou_std']:.1f}",
        f"  images without such a point, skipped: {metrics['skipped']}",
    ]
    return "\n".join(lines)


def plot_examples(test: ModelTest, per_image: Sequence[ClickStatistics], fixed: dict[str, Sequence[Click]]) -> Figure:
    """Best, median and worst images: photograph, truth, and the mask of each fixed click, with the click marked."""
    mean_iou = [nan_mean(object_iou(torch.tensor(counts)) for _, counts in image.fixed) for image in per_image]
    rows = []
    for place, index in pick_examples(mean_iou):
        record = test.test_set.records[index]
        pictures: dict[bool, np.ndarray] = {}
        for click in fixed[record.name]:
            mask_file = test.config.results / "masks" / fit_name(record.name, f"{SUFFIXES[click.on_pet]}.png")
            photo, label, mask = example_arrays(record, mask_file, test.config.score_size)
            x, y = rescale_point(click.x, click.y, picture_size(record.image), photo.shape[1::-1])
            pictures[click.on_pet] = mark_click(CLICKS.overlay(photo, mask), x, y)
        truth, blank = record.class_table.overlay(photo, label), np.full_like(photo, 255)
        caption = f"{place}: {record.name}\nobject IoU {mean_iou[index]:.2f}"
        rows.append((caption, [photo, truth, *(pictures.get(side, blank) for side in SIDES)]))
    return plot_pictures(rows, ("photograph", "truth", "click on the pet", "click on the background"), test.note)


def mark_click(pixels: np.ndarray, x: float, y: float) -> np.ndarray:
    """A copy of a picture (H, W, 3) with a white dot in a black ring at a point."""
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for radius, color in ((0.022, "black"), (0.015, "white")):
        edge = radius * max(picture.size)
        pen.ellipse((x - edge, y - edge, x + edge, y + edge), fill=color)
    return np.asarray(picture)
