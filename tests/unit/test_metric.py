"""utils/metric.py: against torchmetrics, by hand, and by what must not matter."""

from __future__ import annotations

import math

import pytest
import torch
import torchmetrics.functional.classification as reference
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.segmentation import dice_score

from utils.dataset import CLASSES, IGNORE
from utils.metric import ConfusionMatrix, nan_mean, predict


def random_masks(seed: int, classes: int = 3, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, classes, (4, size, size), generator=generator)
    target = torch.randint(0, classes, (4, size, size), generator=generator).to(torch.uint8)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    return prediction, target


def matrix(prediction: torch.Tensor, target: torch.Tensor) -> ConfusionMatrix:
    confusion = ConfusionMatrix(CLASSES)
    confusion.update(prediction, target)
    return confusion


@pytest.mark.parametrize("seed", range(5))
def test_torchmetrics_agrees(seed):
    prediction, target = random_masks(seed)
    confusion = matrix(prediction, target)
    options = {"num_classes": 3, "ignore_index": IGNORE, "average": "none"}
    truth = target.long()
    iou = reference.multiclass_jaccard_index(prediction, truth, **options)
    dice = reference.multiclass_f1_score(prediction, truth, **options)  # Dice is F1
    torch.testing.assert_close(torch.tensor(confusion.iou()), iou, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(confusion.dice()), dice, atol=1e-6, rtol=0)
    expected = reference.multiclass_confusion_matrix(prediction, truth, num_classes=3, ignore_index=IGNORE)
    assert torch.equal(confusion.counts, expected)
    for label, accuracy in enumerate(confusion.accuracy()):
        valid = truth != IGNORE
        same = reference.binary_accuracy((prediction == label)[valid].long(), (truth == label)[valid].long())
        assert accuracy == pytest.approx(same.item(), abs=1e-6)
    micro = reference.multiclass_accuracy(prediction, truth, num_classes=3, ignore_index=IGNORE, average="micro")
    assert confusion.pixel_accuracy() == pytest.approx(micro.item(), abs=1e-6)


def test_dice_agrees_with_torchmetrics_segmentation_where_nothing_is_ignored():
    prediction, target = random_masks(0)
    target[target == IGNORE] = 0
    expected = dice_score(
        prediction.view(1, -1), target.long().view(1, -1), num_classes=3, average="none", input_format="index"
    )
    torch.testing.assert_close(torch.tensor([matrix(prediction, target).dice()]), expected, atol=1e-6, rtol=0)


def test_by_hand():
    target = torch.tensor([[0, 0, 1, 1, IGNORE, 2]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 1, 2, 0]])
    confusion = matrix(prediction, target)
    assert confusion.iou() == pytest.approx([1 / 3, 2 / 3, 0])
    assert confusion.dice() == pytest.approx([1 / 2, 4 / 5, 0])
    assert confusion.accuracy() == pytest.approx([3 / 5, 4 / 5, 4 / 5])
    assert confusion.pixel_accuracy() == pytest.approx(3 / 5)
    baseline = confusion.baseline().scores()
    assert baseline["iou"] == {"background": 2 / 5, "cat": 0, "dog": 0, "mean": pytest.approx(2 / 15)}


def test_an_absent_class_is_left_out_not_zero():
    target = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    scores = matrix(torch.tensor([[0, 0, 1, 0]]), target).scores()
    assert scores["iou"] == {
        "background": pytest.approx(2 / 3), "cat": 0.5, "dog": None, "mean": pytest.approx((2 / 3 + 1 / 2) / 2)
    }  # fmt: skip
    assert scores["accuracy"]["dog"] is None and scores["dice"]["dog"] is None
    # Predicted though absent from the truth: a mistake, and it counts.
    assert matrix(torch.tensor([[0, 0, 1, 2]]), target).scores()["iou"]["dog"] == 0


def test_nothing_scored_is_none():
    scores = ConfusionMatrix(CLASSES).scores()
    assert scores["pixel_accuracy"] is None and scores["iou"]["mean"] is None
    assert math.isnan(nan_mean([]))


@given(st.integers(0, 100), st.permutations(range(4)), st.integers(1, 4))
def test_batches_and_order_do_not_matter(seed, order, batch):
    prediction, target = random_masks(seed, size=6)
    confusion = ConfusionMatrix(CLASSES)
    order = torch.tensor(order)
    for start in range(0, 4, batch):
        chosen = order[start : start + batch]
        confusion.update(prediction[chosen], target[chosen])
    assert torch.equal(confusion.counts, matrix(prediction, target).counts)


@given(st.integers(0, 100))
def test_ignored_pixels_never_matter(seed):
    prediction, target = random_masks(seed, size=6)
    changed = torch.where(target == IGNORE, (prediction + 1) % 3, prediction)
    assert matrix(changed, target).scores() == matrix(prediction, target).scores()


def test_counts_are_exact_beyond_float32():
    confusion = ConfusionMatrix(CLASSES, torch.tensor([[2**40 + 1, 0, 0], [0, 1, 0], [0, 0, 0]]))
    confusion.update(torch.tensor([[0]]), torch.tensor([[0]], dtype=torch.uint8))
    assert confusion.counts[0, 0] == 2**40 + 2


def test_predict():
    logits = torch.randn(2, 3, 5, 7)
    assert torch.equal(predict(logits), logits.argmax(1))
    assert torch.equal(predict(logits[:, :1]), (logits[:, 0] > 0).long())
