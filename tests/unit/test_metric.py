"""utils/metric.py: scores against torchmetrics and by hand, and the validation loop."""

import math

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as reference
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dataset.pet import make_train_sets
from tests.helpers import CPU, train_config
from unet.model import UNet
from utils.dataset import IGNORE, PETS
from utils.loader import EpochBatchSampler, make_loader
from utils.loss import SegmentationLoss, WeightedLoss, image_mean
from utils.metric import ConfusionMatrix, count_boundary, logits_to_classes, nan_mean, validate
from utils.train import StepOutput


def random_masks(seed, size=24):
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, 3, (4, size, size), generator=generator)
    target = torch.randint(0, 3, (4, size, size), generator=generator).to(torch.uint8)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    return prediction, target


def matrix(prediction, target):
    confusion = ConfusionMatrix(PETS.names)
    confusion.update(prediction, target)
    return confusion


@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_torchmetrics(seed):
    prediction, target = random_masks(seed)
    confusion, truth = matrix(prediction, target), target.long()
    options = {"num_classes": 3, "ignore_index": IGNORE}
    iou = reference.multiclass_jaccard_index(prediction, truth, average="none", **options)
    dice = reference.multiclass_f1_score(prediction, truth, average="none", **options)  # Dice is F1
    torch.testing.assert_close(torch.tensor(confusion.iou()), iou, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(confusion.dice()), dice, atol=1e-6, rtol=0)
    assert torch.equal(confusion.counts, reference.multiclass_confusion_matrix(prediction, truth, **options))
    for label, accuracy in enumerate(confusion.accuracy()):
        valid = truth != IGNORE
        same = reference.binary_accuracy((prediction == label)[valid].long(), (truth == label)[valid].long())
        assert accuracy == pytest.approx(same.item(), abs=1e-6)
    micro = reference.multiclass_accuracy(prediction, truth, average="micro", **options)
    assert confusion.pixel_accuracy() == pytest.approx(micro.item(), abs=1e-6)


def test_scores_by_hand():
    target = torch.tensor([[0, 0, 1, 1, IGNORE, 2]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 1, 2, 0]])
    confusion = matrix(prediction, target)
    assert confusion.iou() == pytest.approx([1 / 3, 2 / 3, 0])
    assert confusion.dice() == pytest.approx([1 / 2, 4 / 5, 0])
    assert confusion.accuracy() == pytest.approx([3 / 5, 4 / 5, 4 / 5])
    assert confusion.pixel_accuracy() == pytest.approx(3 / 5)
    baseline = confusion.baseline().scores()
    assert baseline["iou"] == {"background": 2 / 5, "cat": 0, "dog": 0, "mean": pytest.approx(2 / 15)}


def test_absent_class_is_left_out_of_the_mean_and_no_class_has_none():
    target = torch.tensor([[0, 0, 1, 1]], dtype=torch.uint8)
    scores = matrix(torch.tensor([[0, 0, 1, 0]]), target).scores()
    mean = pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["iou"] == {"background": pytest.approx(2 / 3), "cat": 0.5, "dog": None, "mean": mean}
    assert scores["accuracy"]["dog"] is None and scores["dice"]["dog"] is None
    # A class that is absent from the truth but predicted is a mistake and counts.
    assert matrix(torch.tensor([[0, 0, 1, 2]]), target).scores()["iou"]["dog"] == 0
    scores = ConfusionMatrix(PETS.names).scores()
    assert scores["pixel_accuracy"] is None and scores["iou"]["mean"] is None
    assert math.isnan(nan_mean([]))


@given(st.integers(0, 100), st.permutations(range(4)), st.integers(1, 4))
def test_batch_size_and_order_do_not_matter(seed, order, batch):
    prediction, target = random_masks(seed, size=6)
    confusion = ConfusionMatrix(PETS.names)
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
    confusion = ConfusionMatrix(PETS.names, torch.tensor([[2**40 + 1, 0, 0], [0, 1, 0], [0, 0, 0]]))
    confusion.update(torch.tensor([[0]]), torch.tensor([[0]], dtype=torch.uint8))
    assert confusion.counts[0, 0] == 2**40 + 2


def test_class_is_the_largest_logit_or_a_positive_one():
    logits = torch.randn(2, 3, 5, 7)
    assert torch.equal(logits_to_classes(logits), logits.argmax(1))
    assert torch.equal(logits_to_classes(logits[:, :1]), (logits[:, 0] > 0).long())


def test_validation_loss_is_the_mean_over_all_images(prepared):
    """A smaller last batch weighs less."""
    model, criterion = UNet(base_channels=2), SegmentationLoss("cross-entropy", "background")

    def step(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    _, val_set = make_train_sets(train_config(prepared, prepared, val_fraction=0.5))
    results = []
    for batch_size in (1, 4, len(val_set)):
        loader = make_loader(val_set, EpochBatchSampler(len(val_set), batch_size, shuffle=False), workers=0, device=CPU)
        results.append(validate(model, step, loader, CPU, PETS.names))
    losses, matrices = zip(*results)
    assert len(val_set) % 4, "one batch is smaller"
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    assert all(torch.equal(matrix.counts, matrices[0].counts) for matrix in matrices)
    assert matrices[0].counts.sum() == sum((item["mask"] != IGNORE).sum() for item in val_set)


def test_validation_without_logits_is_not_scored(prepared):
    def mean_step(_, batch):
        mean = WeightedLoss("mean", {"mean": image_mean(lambda image, _: image.mean())})
        return StepOutput(mean(batch["image"], batch["image"]))

    _, val_set = make_train_sets(train_config(prepared, prepared))
    loader = make_loader(val_set, EpochBatchSampler(len(val_set), 2, shuffle=False), workers=0, device=CPU)
    loss, confusion = validate(nn.Identity(), mean_step, loader, CPU, ["one"])
    assert 0 < loss < 1 and not confusion.counts.any()


def square(edge, low, high, value=1):
    mask = np.zeros((edge, edge), np.uint8)
    mask[low:high, low:high] = value
    return mask


def test_boundary_iou_by_hand():
    """On 100x100 pixels the band is 2.83, so 3 pixels wide: a frame of 40x40 with 34x34 inside."""
    target = square(100, 20, 60)
    both, either = count_boundary(target, target, 2)[1]
    assert both == either == 40**2 - 34**2
    both, either = count_boundary(square(100, 21, 61), target, 2)[1]  # moved by one pixel, right and down
    ours, theirs = (set(map(tuple, np.argwhere(frame(*edges)))) for edges in ((21, 61), (20, 60)))
    assert (both, either) == (len(ours & theirs), len(ours | theirs))
    assert count_boundary(np.zeros_like(target), target, 2)[1].tolist() == [0, 40**2 - 34**2]


def frame(low, high):
    mask = square(100, low, high)
    mask[low + 3 : high - 3, low + 3 : high - 3] = 0
    return mask


def test_boundary_iou_counts_the_image_border_and_no_ignored_pixels():
    target = square(100, 0, 40)
    assert count_boundary(target, target, 2)[1].tolist() == [40**2 - 34**2] * 2, (
        "the image's border is one of the pet's"
    )
    target[38:42, :42] = target[:42, 38:42] = IGNORE
    for wrong in (square(100, 0, 38), square(100, 0, 42)):  # right wherever it counts
        both, either = count_boundary(wrong, target, 2)[1]
        assert both == either > 0


def test_boundary_iou_falls_faster_than_iou_for_a_coarse_outline():
    target = square(100, 20, 80)
    coarse = square(100, 23, 77)
    both, either = count_boundary(coarse, target, 2)[1]
    assert both == 0 < either, "bands of three pixels, three pixels apart"
    assert (coarse & target).sum() / (coarse | target).sum() == pytest.approx(54**2 / 60**2)
