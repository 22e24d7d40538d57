"""The losses. Pixels whose target is 255 have no part in them, and no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.dataset import IGNORE


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, C, H, W) over the pixels of target (B, H, W) that are not 255; 0 if all are."""
    total = F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - Dice coefficient (report eq. 12-13), soft: the class probabilities stand for the predicted sets.

    Dice = 2 |P and T| / (|P| + |T|) per class over the whole batch, averaged over the classes that the target has: one
    that it has not would weigh as much for a handful of pixels as another for half the image.
    """
    valid = (target != IGNORE).unsqueeze(1)  # (B, 1, H, W)
    probability = logits.softmax(dim=1) * valid
    truth = F.one_hot(target.long() * valid[:, 0], logits.shape[1]).permute(0, 3, 1, 2) * valid  # (B, C, H, W)
    overlap = (probability * truth).sum(dim=(0, 2, 3))  # (C,)
    size = probability.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
    present = truth.sum(dim=(0, 2, 3)) > 0
    dice = 2 * overlap / size.clamp(min=1e-6)
    return ((1 - dice) * present).sum() / present.sum().clamp(min=1)


class SegmentationLoss:
    """The loss that `--loss` and `--boundary` name, of logits (B, C, H, W) and a mask (B, H, W) with 255 = boundary.

    `boundary="background"` is the report's way: what is marked 255 is learned as background. "ignore" leaves it out.
    """

    def __init__(self, name: str, boundary: str):
        terms = {"cross-entropy": cross_entropy, "dice": dice_loss}
        self.terms = [terms[part] for part in name.split("+")]
        self.boundary = boundary

    def __call__(self, logits: Tensor, mask: Tensor) -> Tensor:
        target = torch.where(mask == IGNORE, 0, mask) if self.boundary == "background" else mask
        return torch.stack([term(logits, target) for term in self.terms]).sum()
