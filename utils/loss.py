"""The losses. Pixels whose target is 255 do not count and get no gradient.

A loss is a formula of sums over the images, divided once: sums of batches can be added up, so that the loss of a split
or of an optimizer step does not depend on how its images are cut into batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.config import TrainConfig, weighted_sum
from utils.dataset import IGNORE, UNCOVERED, foreground


class LossSums(NamedTuple):
    """The loss of some images as sums over them."""

    sums: Tensor  # (K,)
    formula: Callable[[Tensor], Tensor]  # sums (K,) -> loss, a scalar
    count: int | None  # if the loss is a total divided by a count: the count if no pixel were ignored; else None

    @property
    def value(self) -> Tensor:
        """The loss of these images, a scalar."""
        return self.formula(self.sums)


@dataclass(frozen=True)
class Loss:
    """A loss as sums (K,) of prediction and target, and a formula of them. Called with both it returns the scalar."""

    sums: Callable[[Tensor, Tensor], Tensor]
    formula: Callable[[Tensor], Tensor]
    counts: str = ""  # of a total divided by a count: what is counted, "pixels" or "images"

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.formula(self.sums(prediction, target))


def ratio(sums: Tensor) -> Tensor:
    """A total divided by a count (2,); 0 if nothing is counted."""
    return sums[0] / sums[1].clamp(min=1e-6)


def cross_entropy_sums(
    logits: Tensor, target: Tensor, *, gamma: float = 0, weights: Sequence[float] | None = None
) -> Tensor:
    """Total cross-entropy of logits (B, C, H, W), and the number of pixels of target (B, H, W) that are not 255.

    `gamma`: each pixel is weighted by (1 - p)^gamma, p the probability of its class (focal loss, Lin et al. 2017).
    `weights` (C,): each pixel is weighted, and counted, by the weight of its class.
    """
    logits, target = _at_least_float32(logits), target.long()
    if not gamma and weights is None:
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return torch.stack([total, (target != IGNORE).sum().to(total.dtype)])
    loss = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")  # (B, H, W), 0 where ignored
    if gamma:
        loss = loss * (-torch.expm1(-loss)) ** gamma  # 1 - p = 1 - exp(-loss)
    weight = (target != IGNORE).to(loss.dtype)
    if weights is not None:
        table = torch.tensor(weights, dtype=loss.dtype, device=loss.device)
        weight = weight * table[target.where(target != IGNORE, 0)]
    return torch.stack([(loss * weight).sum(), weight.sum()])


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def dice_sums(logits: Tensor, target: Tensor) -> Tensor:
    """Overlap |P and T|, size |P| + |T| and pixels |T| of each class: (3C,), of logits (B, C, H, W) and target
    (B, H, W), with class probabilities as the predicted sets P."""
    valid = (target != IGNORE).unsqueeze(1)  # (B, 1, H, W)
    probability = _at_least_float32(logits).softmax(dim=1) * valid
    truth = F.one_hot(target.long() * valid[:, 0], logits.shape[1]).permute(0, 3, 1, 2) * valid  # (B, C, H, W)
    pixels = truth.sum(dim=(0, 2, 3))  # (C,)
    overlap = (probability * truth).sum(dim=(0, 2, 3))
    return torch.cat([overlap, probability.sum(dim=(0, 2, 3)) + pixels, pixels])


def dice_formula(sums: Tensor) -> Tensor:
    """1 - soft Dice coefficient 2 |P and T| / (|P| + |T|), mean over classes (report eq. 12-13), of `dice_sums`.

    The mean is over the classes in the target: a few pixels of an absent class would weigh as much as a whole class.
    """
    overlap, size, pixels = sums.view(3, -1)
    present = pixels > 0
    dice = 2 * overlap / size.clamp(min=1e-6)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


def image_mean(loss: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The Loss of a function whose result for a batch is the mean over its images."""

    def sums(prediction: Tensor, target: Tensor) -> Tensor:
        mean = loss(prediction, target)
        return torch.stack([mean, torch.ones_like(mean)]) * len(target)

    return Loss(sums, ratio, "images")


def make_losses(weights: Sequence[float] | None = None) -> dict[str, Loss]:
    """The losses that `--loss` knows, by name; `weights` (C,) are those of the classes for the balanced ones."""
    focal = partial(cross_entropy_sums, gamma=2)
    return {
        "cross-entropy": Loss(cross_entropy_sums, ratio, "pixels"),
        "balanced": Loss(partial(cross_entropy_sums, weights=weights), ratio),
        "focal": Loss(focal, ratio, "pixels"),
        "balanced-focal": Loss(partial(focal, weights=weights), ratio),
        "dice": Loss(dice_sums, dice_formula),
    }


LOSSES = make_losses()
cross_entropy, dice_loss = LOSSES["cross-entropy"], LOSSES["dice"]


def make_criterion(config: TrainConfig, train_set: Any) -> tuple["SegmentationLoss", int]:
    """The loss of `--loss` and `--boundary`, and the number of classes that the model needs for it.

    Only balanced losses look at the pixels of `train_set`.
    """
    num_classes = len(train_set.class_table)
    targets = num_classes + (config.boundary == "class")
    counts = None
    if "balanced" in config.loss:
        counts = torch.zeros(256, dtype=torch.int64)
        for mask in train_set.masks():
            target = map_boundary(torch.from_numpy(mask)[None], config.boundary, num_classes)
            counts += torch.bincount(target.flatten(), minlength=256)
        counts = counts[:targets].tolist()
    return SegmentationLoss(config.loss, config.boundary, counts), targets


class WeightedLoss:
    """A weighted sum of losses, such as "mse+0.5*ssim", of a prediction and a target."""

    def __init__(self, text: str, losses: dict[str, Loss]):
        self.terms = [(weight, losses[name]) for name, weight in weighted_sum(text, losses).items()]

    def __call__(self, prediction: Tensor, target: Tensor) -> LossSums:
        counts = {"pixels": target.numel(), "images": len(target)}
        sums = [LossSums(one.sums(prediction, target), one.formula, counts.get(one.counts)) for _, one in self.terms]
        return add_losses([(weight, part) for (weight, _), part in zip(self.terms, sums)])


def add_losses(weighted: Sequence[tuple[float, LossSums]]) -> LossSums:
    """The weighted sum of losses of the same images; of ratios with the same count, it is one ratio."""
    weights, losses = zip(*weighted)
    counts = {loss.count for loss in losses}
    if len(counts) == 1 and None not in counts:
        total = torch.stack([weight * loss.sums[0] for weight, loss in weighted]).sum()
        return LossSums(torch.stack([total, losses[0].sums[1]]), ratio, losses[0].count)

    def formula(sums: Tensor) -> Tensor:
        parts = sums.split([len(loss.sums) for loss in losses])
        return torch.stack([weight * loss.formula(part) for weight, loss, part in zip(weights, losses, parts)]).sum()

    return LossSums(torch.cat([loss.sums for loss in losses]), formula, None)


def map_boundary(mask: Tensor, boundary: str, own_class: int) -> Tensor:
    """The target (B, H, W) of a mask: a class, or 255 where a pixel does not count. `own_class` is that of "class"."""
    if boundary == "object":  # the species of the image; of two pasted together, the one with the larger number
        inside = torch.where(foreground(mask), mask, 0).amax(dim=(1, 2), keepdim=True)
    else:
        inside = {"background": 0, "ignore": IGNORE, "class": own_class}[boundary]
    return torch.where(mask == UNCOVERED, IGNORE, torch.where(mask == IGNORE, inside, mask))


class SegmentationLoss:
    """`--loss` of logits (B, C, H, W) and a mask (B, H, W), whose boundary, 255, is treated as `--boundary` says.

    background: it is background, as in the report. ignore: it does not count. object: it belongs to the pet. class: it
    is a class of its own, the last of the logits. `counts` (C,) are the training pixels of each class, for the balanced
    losses: a class with n of the N pixels has the weight N / (C n).
    """

    def __init__(self, text: str, boundary: str, counts: Sequence[int] | None = None):
        weights = counts and [sum(counts) / (len(counts) * max(1, count)) for count in counts]
        self.loss = WeightedLoss(text, make_losses(weights))
        self.boundary = boundary

    def __call__(self, logits: Tensor, mask: Tensor) -> LossSums:
        return self.loss(logits, map_boundary(mask, self.boundary, logits.shape[1] - 1))
