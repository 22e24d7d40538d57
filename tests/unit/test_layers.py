"""utils/layers.py."""

from __future__ import annotations

import torch

from utils.layers import ClassHead, Normalize


def test_no_class_starts_with_an_advantage():
    features = torch.full((1, 16, 2, 2), 0.4)  # what batch norm and ReLU give on average
    for seed in range(5):
        torch.manual_seed(seed)
        logits = ClassHead(16, 3)(features)
        torch.testing.assert_close(logits, torch.zeros_like(logits), atol=1e-6, rtol=0)


def test_normalize_shifts_and_scales_each_channel():
    normalize = Normalize((0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    assert normalize(torch.full((1, 3, 1, 1), 0.75)).flatten().tolist() == [0.5, 2.0, 0.75]
    assert normalize.state_dict() == {}
