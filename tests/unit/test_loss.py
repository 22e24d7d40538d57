"""utils/loss.py: cross-entropy, Dice, and weighted sums of them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from utils.config import TrainConfig
from utils.dataset import IGNORE, PETS, UNCOVERED
from utils.loss import LOSSES, SegmentationLoss, add_losses, cross_entropy, dice_loss, make_criterion

NAMES = [*LOSSES, "cross-entropy+0.5*dice"]


@pytest.fixture
def target():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 3, (2, 8, 9), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_good_logits_have_a_lower_loss(name, target):
    loss, hot = SegmentationLoss(name, "ignore"), F.one_hot(target.long(), 3).permute(0, 3, 1, 2).float()
    values = [loss(confidence * hot, target).value.item() for confidence in (20, 2, 0, -2, -20)]
    assert values == sorted(values) and values[0] < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_ignored_pixels_change_nothing(name, target):
    target[:, :3] = IGNORE
    logits = torch.randn(2, 3, 8, 9, requires_grad=True)
    loss = SegmentationLoss(name, "ignore")
    value = loss(logits, target).value
    value.backward()
    assert (logits.grad[:, :, :3] == 0).all() and (logits.grad[:, :, 3:] != 0).all()
    changed = logits.detach().clone()
    changed[:, :, :3] += 5
    assert torch.equal(loss(changed, target).value, value.detach())

    logits.grad = None
    value = loss(logits, torch.full_like(target, IGNORE)).value
    value.backward()
    assert value.item() == 0 and (logits.grad == 0).all(), "nothing but ignored pixels"


@pytest.mark.parametrize("name", NAMES)
def test_boundary_is_learned_as_background(name, target):
    target[:, :3] = IGNORE
    merged = target.clone()
    merged[:, :3] = 0
    logits = torch.randn(2, 3, 8, 9)
    loss = SegmentationLoss(name, "background")(logits, target)
    assert torch.equal(loss.value, SegmentationLoss(name, "ignore")(logits, merged).value)


BAND = torch.tensor([[[0, 2, IGNORE, UNCOVERED]]], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("boundary", "target"), [("background", [0, 2, 0, IGNORE]), ("ignore", [0, 2, IGNORE, IGNORE]),
                             ("object", [0, 2, 2, IGNORE]), ("class", [0, 2, 3, IGNORE])],
)  # fmt: skip
def test_boundary_modes_and_uncovered_pixels(boundary, target):
    logits = torch.randn(1, 4 if boundary == "class" else 3, 1, 4, requires_grad=True)
    loss = SegmentationLoss("cross-entropy", boundary)(logits, BAND).value
    expected = F.cross_entropy(logits, torch.tensor([[target]]), ignore_index=IGNORE)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits.grad[..., 3] == 0).all(), "uncovered pixels have no gradient in any mode"


def test_balanced_weights_by_hand():
    """9 pixels of background, 2 of cats, 1 of dogs: weights 12 / (3 n)."""
    logits, target = torch.randn(1, 3, 1, 3), torch.tensor([[[0, 1, 2]]], dtype=torch.uint8)
    loss = SegmentationLoss("balanced", "background", [9, 2, 1])(logits, target).value
    weights = torch.tensor([12 / 27, 12 / 6, 12 / 3])
    torch.testing.assert_close(loss, F.cross_entropy(logits, target.long(), weight=weights))


class Masks:
    class_table = PETS

    def masks(self):
        yield np.array([[0, 0, 1, IGNORE]], np.uint8)
        yield np.array([[0, 2, IGNORE, UNCOVERED]], np.uint8)


@pytest.mark.parametrize(
    ("boundary", "counts"),
    [("background", [5, 1, 1]), ("ignore", [3, 1, 1]), ("object", [3, 2, 2]), ("class", [3, 1, 1, 2])],
)
def test_weights_are_those_of_the_training_pixels(boundary, counts):
    criterion, classes = make_criterion(TrainConfig(loss="balanced", boundary=boundary), Masks())
    assert classes == len(counts)
    logits, target = torch.randn(1, classes, 1, 3), torch.tensor([[[0, 1, 2]]], dtype=torch.uint8)
    weights = torch.tensor([sum(counts) / (len(counts) * count) for count in counts])
    expected = F.cross_entropy(logits, target.long(), weight=weights)
    torch.testing.assert_close(criterion(logits, target).value, expected)


def test_focal_loss_by_hand(target):
    logits = torch.randn(2, 3, 8, 9)
    p = logits.softmax(dim=1).gather(1, target.long()[:, None])
    torch.testing.assert_close(LOSSES["focal"](logits, target), (-((1 - p) ** 2) * p.log()).mean())
    assert LOSSES["focal"](logits, target) < cross_entropy(logits, target)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_summed_in_float32(name, target):
    logits = 3 * torch.randn(2, 3, 8, 9)
    half = SegmentationLoss(name, "ignore")(logits.bfloat16(), target)
    assert half.sums.dtype == torch.float32
    torch.testing.assert_close(half.value, SegmentationLoss(name, "ignore")(logits.bfloat16().float(), target).value)


def test_weights_multiply_the_terms(target):
    logits = torch.randn(2, 3, 8, 9)
    expected = 0.25 * cross_entropy(logits, target) + 2 * dice_loss(logits, target)
    loss = SegmentationLoss("0.25*cross-entropy+2*dice", "ignore")(logits, target)
    assert loss.value.item() == pytest.approx(expected.item())


@pytest.mark.parametrize("names", [("focal", "cross-entropy"), ("dice", "cross-entropy"), ("dice", "dice")])
def test_losses_of_several_outputs_add_up(names, target):
    """As with deep supervision; of two ratios with the same count it is a ratio again."""
    target[0, :3] = IGNORE
    outputs = torch.randn(2, 2, 3, 8, 9)
    losses = [SegmentationLoss(name, "ignore")(logits, target) for name, logits in zip(names, outputs)]
    total = add_losses([(1, losses[0]), (0.5, losses[1])])
    torch.testing.assert_close(total.value, losses[0].value + 0.5 * losses[1].value)
    assert (total.count is None) == ("dice" in names)


def test_cross_entropy_equals_torch(target):
    logits = torch.randn(2, 3, 8, 9)
    target[0, 0] = IGNORE
    expected = F.cross_entropy(logits, target.long(), ignore_index=IGNORE)
    assert cross_entropy(logits, target) == pytest.approx(expected.item(), rel=1e-6)


def test_dice_by_hand():
    # Two pixels, both of class 1 with probability 0.5 for it: 2 * 1 / (1 + 2) = 2/3. Class 0 is absent and left out.
    logits = torch.zeros(1, 2, 1, 2)
    assert dice_loss(logits, torch.ones(1, 1, 2, dtype=torch.uint8)).item() == pytest.approx(1 / 3)
    # Half of each class: class 0 and class 1 both have 2 * 0.5 / (1 + 1) = 1/2.
    assert dice_loss(logits, torch.tensor([[[0, 1]]], dtype=torch.uint8)).item() == pytest.approx(1 / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_derivative(name, target):
    logits = torch.randn(2, 3, 8, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: LOSSES[name](values, target), logits)
