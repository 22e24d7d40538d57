"""Scores from one confusion matrix over all pixels, and the validation loop."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from utils.dataset import IGNORE
from utils.distributed import all_gather_objects, all_reduce_sum
from utils.loader import prepare_batch


def logits_to_classes(logits: Tensor) -> Tensor:
    """Classes (B, H, W) uint8 of logits (B, C, H, W): the largest, or with a single logit 1 where it is positive."""
    best, *others = logits.unbind(dim=1)
    if not others:
        return (best > 0).to(torch.uint8)
    # On a CPU argmax over the second dimension takes forty times as long as these comparisons of whole maps.
    classes = torch.zeros(best.shape, dtype=torch.uint8, device=best.device)
    for value, other in enumerate(others, start=1):
        classes.masked_fill_(other > best, value)
        best = torch.maximum(best, other)
    return classes


def count_confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Pixel counts (num_classes, num_classes) int64, row = truth, column = prediction; target 255 counts nowhere."""
    dtype = torch.uint8 if num_classes < 16 else torch.int32  # bytes are counted twice as fast
    truth = torch.where(target == IGNORE, num_classes, target).to(dtype)  # ignored pixels get an extra row
    pairs = truth * num_classes + prediction.to(dtype)
    counts = torch.bincount(pairs.flatten(), minlength=(num_classes + 1) * num_classes)
    return counts.view(num_classes + 1, num_classes)[:num_classes]


BAND = 0.02  # width of the band of boundary IoU, as a share of the image's diagonal (Cheng et al. 2021)


def count_boundary(prediction: np.ndarray, target: np.ndarray, num_classes: int) -> np.ndarray:
    """Pixels (num_classes, 2) int64 of prediction and target (H, W): intersection and union of each class's bands.

    The band of a class is what lies in it within 2 % of the diagonal from its border or the image's. Pixels with target
    255 belong to no class in either, so that their width does not matter.
    """
    radius = max(1, round(BAND * math.hypot(*target.shape)))
    kernel, valid = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8), target != IGNORE

    def band(mask: np.ndarray) -> np.ndarray:
        inner = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        return mask & (inner == 0)

    counts = np.zeros((num_classes, 2), np.int64)
    for value in range(num_classes):
        ours, theirs = (band((classes == value) & valid) for classes in (prediction, target))
        counts[value] = (ours & theirs).sum(), (ours | theirs).sum()
    return counts


class ConfusionMatrix:
    """Pixel counts over any number of images, and the scores computed from them (report eq. 14-16).

    Counts are summed before any ratio is formed, so that neither the batch size nor the order of the images matters. A
    class that is absent from truth and prediction has no score: NaN, left out of the mean.
    """

    def __init__(self, class_names: Sequence[str], counts: Tensor | None = None):
        self.class_names = tuple(class_names)
        shape = (len(class_names), len(class_names))
        self.counts = torch.zeros(shape, dtype=torch.int64) if counts is None else counts

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add predictions and targets of equal shape, in classes, target 255 = ignored."""
        self.counts = self.counts.to(target.device) + count_confusion(prediction, target, len(self.class_names))

    def iou(self) -> list[float]:
        """Intersection over union TP / (TP + FP + FN) per class."""
        hit, truth, predicted = self._parts()
        return (hit / (truth + predicted - hit)).tolist()

    def dice(self) -> list[float]:
        """Dice coefficient 2 TP / (2 TP + FP + FN) per class."""
        hit, truth, predicted = self._parts()
        return (2 * hit / (truth + predicted)).tolist()

    def accuracy(self) -> list[float]:
        """(TP + TN) / all pixels, of each class against the rest (report eq. 16)."""
        hit, truth, predicted = self._parts()
        correct = (truth.sum() - truth - predicted + 2 * hit) / truth.sum()
        return torch.where(truth + predicted > 0, correct, math.nan).tolist()

    def pixel_accuracy(self) -> float:
        """Share of pixels whose class is correct."""
        hit, truth, _ = self._parts()
        return (hit.sum() / truth.sum()).item()

    def scores(self) -> dict[str, Any]:
        """IoU, Dice and accuracy per class and as mean, and the pixel accuracy, all in 0..1; None = no such class."""
        scores: dict[str, Any] = {}
        for name, values in (("iou", self.iou()), ("dice", self.dice()), ("accuracy", self.accuracy())):
            scores[name] = with_mean(self.class_names, values)
        return {**scores, "pixel_accuracy": _or_none(self.pixel_accuracy())}

    def baseline(self) -> "ConfusionMatrix":
        """The counts of predicting class 0 everywhere on the same pixels."""
        counts = torch.zeros_like(self.counts)
        counts[:, 0] = self.counts.sum(dim=1)
        return ConfusionMatrix(self.class_names, counts)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Correct, true and predicted pixels (C,) of each class, as floats: exact below 2^53, and 0 / 0 is NaN."""
        counts = self.counts.cpu().double()
        return counts.diag(), counts.sum(dim=1), counts.sum(dim=0)


def nan_mean(values: Iterable[float]) -> float:
    """Mean of the values that are not NaN; NaN if none is."""
    kept = [value for value in values if not math.isnan(value)]
    return sum(kept) / len(kept) if kept else math.nan


def with_mean(names: Sequence[str], values: Sequence[float]) -> dict[str, float | None]:
    """Scores by class, and their mean; None instead of NaN."""
    return {name: _or_none(value) for name, value in zip((*names, "mean"), (*values, nan_mean(values)))}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


@torch.inference_mode()
def validate(
    model: nn.Module, step: Callable, loader: Iterable[dict[str, Any]], device: torch.device, class_names: Sequence[str]
) -> tuple[float, ConfusionMatrix]:
    """Loss and confusion matrix (empty for a step without logits) of all images of `loader`, summed over ranks."""
    model.eval()
    confusion, sums, formula = ConfusionMatrix(class_names), 0, None
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    for batch in loader:
        output = step(model, prepare_batch(batch, device))
        sums += output.loss.sums.to(dtype)  # on the device: reading a number from it would make it wait
        formula = output.loss.formula
        if output.logits is not None:
            # A boundary that is learned as a class of its own is not scored.
            confusion.update(logits_to_classes(output.logits[:, : len(class_names)]), output.target)
    # A rank may have no image.
    parts = all_gather_objects([sums.tolist()] if formula else [])
    losses = [formula(torch.tensor(parts, dtype=torch.float64).sum(dim=0)).item()] if formula else []
    (loss, *_) = all_gather_objects(losses)
    return loss, ConfusionMatrix(class_names, all_reduce_sum(confusion.counts.to(device)).cpu())
