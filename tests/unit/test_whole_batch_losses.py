"""Loss and gradient do not depend on batches, micro-batches or boundary mode: sums over all images, divided once."""

import pytest
import torch
from torch import nn

from tests.helpers import train
from utils.dataset import IGNORE
from utils.loss import LOSSES, SegmentationLoss
from utils.metric import validate
from utils.train import StepOutput, sum_losses

CPU = torch.device("cpu")


def losses():
    boundaries = ("background", "ignore", "object", "class")
    return [(name, boundary) for name in (*LOSSES, "cross-entropy+0.5*dice") for boundary in boundaries]


def make_loss(name, boundary):
    """A loss with weights of the classes, which the balanced ones use."""
    return SegmentationLoss(name, boundary, [900, 80, 20, 50][: 3 + (boundary == "class")])


class Pixels(nn.Module):
    """A segmenter with batch norm, whose statistics must be counted once per step."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, classes, 1))

    def forward(self, image):
        return self.layers(image)


def sample_batches(images: int, size: int):
    """Batches of at most `size` of the same images, which differ in species and in ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(images, 8, 8, dtype=torch.uint8)
    for number in range(images):
        mask[number, :, number % 8 :] = 1 + number % 2
        mask[number, : number % 5] = IGNORE
    mask[3] = IGNORE
    return [{"image": image[i : i + size], "mask": mask[i : i + size]} for i in range(0, images, size)]


@pytest.mark.parametrize(("name", "boundary"), losses())
def test_the_validation_loss_does_not_depend_on_the_batches(name, boundary):
    criterion, model = make_loss(name, boundary), Pixels(3 + (boundary == "class"))

    def step(model, batch):
        return StepOutput(criterion(model(batch["image"]), batch["mask"]))

    found = [validate(model, step, sample_batches(17, size), CPU, ["a"])[0] for size in (1, 3, 7, 16, 17)]
    (whole,) = sample_batches(17, 17)
    expected = criterion(model.eval()(whole["image"].float() / 255), whole["mask"]).value.item()
    assert found == pytest.approx([expected] * 5, rel=1e-5)


@pytest.mark.parametrize(("name", "boundary"), losses())
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_the_gradient_does_not_depend_on_the_micro_batches(prepared, tmp_path, name, boundary, micro_batch_size):
    """The weights after a step of plain Adam's first update only show signs, so the gradient itself is compared."""
    criterion, gradients = make_loss(name, boundary), []

    def step(model, batch):
        return StepOutput(criterion(model(batch["image"]), batch["mask"]))

    for micro in (None, micro_batch_size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3 + (boundary == "class"), 1))
        gradients.append(first_gradient(prepared, tmp_path / str(micro), model, step, micro))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


class Stop(Exception):
    """Ends a training at its first optimizer step."""


def first_gradient(data, out, model, step, micro):
    def stop(self, *_, **__):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch.optim.Adam, "step", stop)
        train(data, out, step=step, model=model, batch_size=6, micro_batch_size=micro)
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_sums_over_a_step_leave_batch_norm_as_it_was():
    criterion, model = SegmentationLoss("dice", "ignore"), Pixels().train()

    def step(model, batch):
        return StepOutput(criterion(model(batch["image"]), batch["mask"]))

    before = [buffer.clone() for buffer in model.buffers()]
    batches = sample_batches(12, 4)
    total = sum_losses(model, step, batches, CPU)
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
    by_hand = sum(criterion(model(batch["image"].float() / 255), batch["mask"]).sums for batch in batches)
    torch.testing.assert_close(total, by_hand)
