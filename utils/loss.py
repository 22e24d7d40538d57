"""The losses. Pixels whose target is 255 do not count and get no gradient."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.config import weighted_sum
from utils.dataset import IGNORE


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C, H, W) over the pixels of target (B, H, W) that are not 255; 0 if all are."""
    total = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - soft Dice coefficient (report eq. 12-13) of logits (B, C, H, W) and target (B, H, W).

    Dice = 2 |P and T| / (|P| + |T|) per class over the whole batch, with class probabilities as the predicted sets. The
    mean is over the classes in the target: a few pixels of an absent class would weigh as much as a whole class.
    """
    valid = (target != IGNORE).unsqueeze(1)  # (B, 1, H, W)
    probability = logits.softmax(dim=1) * valid
    truth = F.one_hot(target.long() * valid[:, 0], logits.shape[1]).permute(0, 3, 1, 2) * valid  # (B, C, H, W)
    overlap = (probability * truth).sum(dim=(0, 2, 3))  # (C,)
    size = probability.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    present = truth.sum(dim=(0, 2, 3)) > 0
    dice = 2 * overlap / size.clamp(min=1e-6)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


# The names that `--loss` knows. A loss takes logits (B, C, H, W) and target (B, H, W), and returns a scalar.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": cross_entropy,
    "dice": dice_loss,
}


class WeightedLoss:
    """A weighted sum of losses, such as "mse+0.5*ssim", of a prediction and a target."""

    def __init__(self, text: str, losses: dict[str, Callable[[Tensor, Tensor], Tensor]]):
        self.terms = [(weight, losses[name]) for name, weight in weighted_sum(text, losses).items()]

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return torch.stack([weight * loss(prediction, target) for weight, loss in self.terms]).sum()


class SegmentationLoss:
    """`--loss` of logits (B, C, H, W) and a mask (B, H, W) whose boundary, 255, is background (report) or ignored."""

    def __init__(self, text: str, boundary: str):
        self.loss = WeightedLoss(text, LOSSES)
        self.boundary = boundary

    def __call__(self, logits: Tensor, mask: Tensor) -> Tensor:
        target = torch.where(mask == IGNORE, 0, mask) if self.boundary == "background" else mask
        return self.loss(logits, target)
