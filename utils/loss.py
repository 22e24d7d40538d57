"""The losses. Pixels whose target is 255 do not count and get no gradient.

A loss is a formula of sums over the images, divided once: sums of batches can be added up, so that the loss of a split
or of an optimizer step does not depend on how its images are cut into batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.config import weighted_sum
from utils.dataset import IGNORE


class LossSums(NamedTuple):
    """The loss of some images as sums over them."""

    sums: Tensor  # (K,)
    formula: Callable[[Tensor], Tensor]  # sums (K,) -> loss, a scalar
    per_image: bool  # the loss is the mean of the losses of single images

    @property
    def value(self) -> Tensor:
        """The loss of these images, a scalar."""
        return self.formula(self.sums)


@dataclass(frozen=True)
class Loss:
    """A loss as sums (K,) of prediction and target, and a formula of them. Called with both it returns the scalar."""

    sums: Callable[[Tensor, Tensor], Tensor]
    formula: Callable[[Tensor], Tensor]
    per_image: bool = False  # as in LossSums, if no pixel is ignored

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.formula(self.sums(prediction, target))


def ratio(sums: Tensor) -> Tensor:
    """A total divided by a count (2,); 0 if nothing is counted."""
    return sums[0] / sums[1].clamp(min=1)


def cross_entropy_sums(logits: Tensor, target: Tensor) -> Tensor:
    """Total cross-entropy of logits (B, C, H, W), and the number of pixels of target (B, H, W) that are not 255."""
    total = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="sum")
    return torch.stack([total, (target != IGNORE).sum().to(total.dtype)])


def dice_sums(logits: Tensor, target: Tensor) -> Tensor:
    """Overlap |P and T|, size |P| + |T| and pixels |T| of each class: (3C,), of logits (B, C, H, W) and target
    (B, H, W), with class probabilities as the predicted sets P."""
    valid = (target != IGNORE).unsqueeze(1)  # (B, 1, H, W)
    probability = logits.softmax(dim=1) * valid
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

    return Loss(sums, ratio, per_image=True)


cross_entropy = Loss(cross_entropy_sums, ratio, per_image=True)
dice_loss = Loss(dice_sums, dice_formula)

# The names that `--loss` knows. A loss takes logits (B, C, H, W) and target (B, H, W).
LOSSES = {"cross-entropy": cross_entropy, "dice": dice_loss}


class WeightedLoss:
    """A weighted sum of losses, such as "mse+0.5*ssim", of a prediction and a target."""

    def __init__(self, text: str, losses: dict[str, Loss]):
        self.terms = [(weight, losses[name]) for name, weight in weighted_sum(text, losses).items()]
        self.per_image = all(loss.per_image for _, loss in self.terms)

    def __call__(self, prediction: Tensor, target: Tensor) -> LossSums:
        parts = [loss.sums(prediction, target) for _, loss in self.terms]

        def formula(sums: Tensor) -> Tensor:
            split = sums.split([len(part) for part in parts])
            return torch.stack([weight * loss.formula(part) for (weight, loss), part in zip(self.terms, split)]).sum()

        return LossSums(torch.cat(parts), formula, self.per_image)


class SegmentationLoss:
    """`--loss` of logits (B, C, H, W) and a mask (B, H, W) whose boundary, 255, is background (report) or ignored."""

    def __init__(self, text: str, boundary: str):
        self.loss = WeightedLoss(text, LOSSES)
        self.boundary = boundary

    def __call__(self, logits: Tensor, mask: Tensor) -> LossSums:
        if self.boundary == "background":
            return self.loss(logits, torch.where(mask == IGNORE, 0, mask))
        return self.loss(logits, mask)._replace(per_image=False)  # images differ in the number of pixels that count
