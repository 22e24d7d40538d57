"""utils/layers.py: parts that several models share."""

from __future__ import annotations

import pytest
import torch

from utils.layers import ClassHead, Normalize, pad_to_multiple


def test_head_starts_without_a_preferred_class():
    features = torch.full((1, 16, 2, 2), 0.4)  # the mean behind batch norm and ReLU
    for seed in range(5):
        torch.manual_seed(seed)
        logits = ClassHead(16, 3)(features)
        torch.testing.assert_close(logits, torch.zeros_like(logits), atol=1e-6, rtol=0)


def test_normalize_shifts_and_scales_each_channel():
    normalize = Normalize((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    assert normalize(torch.full((1, 3, 1, 1), 0.75)).flatten().tolist() == [0.5, 2.0, 0.75]
    assert normalize.state_dict() == {}, "mean and std stay out of checkpoints"


@pytest.mark.parametrize(("size", "padded"), [((8, 8), (8, 8)), ((9, 15), (16, 16)), ((1, 24), (8, 24))])
def test_padding_adds_zeros_at_the_right_and_the_bottom(size, padded):
    image = torch.rand(1, 2, *size) + 1
    result = pad_to_multiple(image, 8)
    assert result.shape[-2:] == padded
    assert torch.equal(result[..., : size[0], : size[1]], image)
    assert result.sum() == pytest.approx(image.sum().item())
