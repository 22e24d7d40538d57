"""CLIP's features and a clicked point: segment what lies under the click (report section 9)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_seg.model import LEVELS, ClipEncoder, Decoder, rebuild_encoder
from utils.dataset_prep import gaussian_heatmaps
from utils.files import InputError
from utils.layers import ClassHead, DoubleConv

RADIUS = 5 / 256  # of a click's disk, as a share of the image's edge
CLICK_CHANNELS = 16
CLASS_NAMES = ("ground", "object")  # object: what lies under the click


class PointClip(nn.Module):
    """One logit a pixel: does it belong to what lies under the click?

    `encoding` is how the click reaches the network. "heatmap" (the report's): a Gaussian around it goes through CLIP as
    a picture of its own, and the decoder sees both feature maps. "disk" (as in interactive segmentation: RITM, Sofiiuk
    et al. 2022; SimpleClick, Liu et al. 2023): a small disk at the decoder's resolution, beside the decoder's features,
    so that the image's part of the work is done once for any number of clicks.

    `encode(image)` is what an image costs once, `decode` what each click costs; `forward` does both.
    """

    def __init__(
        self,
        encoder: ClipEncoder,
        *,
        encoding: Literal["heatmap", "disk"] = "heatmap",
        base_channels: int = 64,
        skips: bool = False,
    ):
        super().__init__()
        self.encoder = encoder
        self.encoding = encoding
        skip_channels = encoder.channels if skips else 0
        if encoding == "heatmap":
            self.decoder = Decoder(2 * encoder.channels, skip_channels=skip_channels)  # 1536-768-384-192-96
            self.head = nn.Conv2d(self.decoder.out_channels, 1, 1)
        else:
            self.project = nn.Conv2d(encoder.channels, base_channels * 2**LEVELS, 1)
            self.decoder = Decoder(base_channels * 2**LEVELS, skip_channels=skip_channels)
            # Between -1 and 1, and 0 on average at the start (see ClassHead): the product of the features of two places
            # is positive where they are alike.
            self.reduce = nn.Sequential(ClassHead(base_channels, CLICK_CHANNELS), nn.Tanh())
            self.head = ClickHead(CLICK_CHANNELS)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of images (B, 3, H, W) in [0, 1], for `decode`."""
        features = self.encoder(image)
        if self.encoding == "heatmap":
            return features
        return [self.reduce(self.decoder(self.project(features[-1]), features[:-1]))]  # (B, 16, 112, 112)

    def decode(
        self, features: Sequence[Tensor], point: Tensor, image_size: Sequence[int], avoid: Tensor | None = None
    ) -> Tensor:
        """Logits (N, 1, H, W) for clicks `point` (N, 2), x and y in pixels of images of `image_size` (H, W).

        `features` are those of B images, `point` holds N / B clicks on the first, as many on the second, and so on.
        `avoid` (N, 2) are clicks on what is not wanted, NaN where there is none; the heatmap encoding has no place for
        them. InputError for a point that is NaN or outside the image (in eval mode alone: looking makes a GPU wait).
        """
        if self.encoding == "heatmap":
            return self._combine(features, self.encoder.tokens(self._heatmaps(point, image_size)), image_size)
        edges = point.new_tensor(image_size[::-1])
        (image_features,) = features
        image_features = image_features.repeat_interleave(len(point) // len(image_features), dim=0)
        place = self._place(point, image_size)
        logits = self.head(image_features, place, None if avoid is None else (avoid + 0.5) / edges)
        return F.interpolate(logits, tuple(image_size), mode="bilinear", align_corners=False)

    def forward(self, image: Tensor, point: Tensor, avoid: Tensor | None = None) -> Tensor:
        """Logits (N, 1, H, W) for images (B, 3, H, W) in [0, 1] and N / B clicks on each, as in `decode`."""
        size = image.shape[-2:]
        if self.encoding == "disk":
            return self.decode(self.encode(image), point, size, avoid)
        # One pass of the encoder over images and heatmaps.
        maps = self.encoder.tokens(torch.cat([self.encoder.prepare(image), self._heatmaps(point, size)]))
        return self._combine([part[: len(image)] for part in maps], [part[len(image) :] for part in maps], size)

    def _place(self, point: Tensor, image_size: Sequence[int]) -> Tensor:
        """Points (N, 2) in pixels as shares of the image: 0 and 1 at its borders."""
        edges = point.new_tensor(image_size[::-1])
        if not self.training:
            check_points(point, edges)
        return (point + 0.5) / edges

    def _heatmaps(self, point: Tensor, image_size: Sequence[int]) -> Tensor:
        size = self.encoder.image_size
        heatmaps = gaussian_heatmaps(self._place(point, image_size) * size - 0.5, size, size)
        return heatmaps[:, None].expand(-1, 3, -1, -1)  # (N, 3, 224, 224)

    def _combine(self, image_maps: Sequence[Tensor], click_maps: Sequence[Tensor], image_size: Sequence[int]) -> Tensor:
        clicks = len(click_maps[-1]) // len(image_maps[-1])  # on each image
        image_maps = [part.repeat_interleave(clicks, dim=0) for part in image_maps]
        both = torch.cat([image_maps[-1], click_maps[-1]], dim=1)  # (N, 1536, 7, 7)
        logits = self.head(self.decoder(both, image_maps[:-1]))  # (N, 1, 112, 112)
        return F.interpolate(logits, tuple(image_size), mode="bilinear", align_corners=False)


class ClickHead(nn.Module):
    """Compares every place with the one under the click: features, their products with those clicked, and disks.

    Features (N, C, h, w) and places (N, 2) in 0..1 -> logits (N, 1, h, w). The product carries the click to the far end
    of the image, the disks say exactly where it was. Its mean over the channels, how alike two places are, is where the
    logits start from.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.compare = DoubleConv(3 * channels + 2, channels)
        self.classify = nn.Conv2d(channels, 1, 1)
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, features: Tensor, place: Tensor, avoid: Tensor | None = None) -> Tensor:
        parts, disks = [features], []
        for click in (place, torch.full_like(place, math.nan) if avoid is None else avoid):
            parts.append(features * features_at(features, click))
            disks.append(draw_disks(click, *features.shape[-2:]))
        alike = parts[1].mean(dim=1, keepdim=True)  # (N, 1, h, w)
        return self.scale * alike + self.classify(self.compare(torch.cat([*parts, *disks], dim=1)))


def features_at(features: Tensor, place: Tensor) -> Tensor:
    """Features (N, C, 1, 1) of maps (N, C, h, w) at places (N, 2) in 0..1, bilinear; zeros where the place is NaN."""
    grid = (2 * place.nan_to_num(0.5) - 1)[:, None, None, :]  # (N, 1, 1, 2)
    # In float32: in bfloat16 a place would be known to a hundredth of the image only.
    found = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return torch.where(place.isnan().any(dim=1)[:, None, None, None], 0, found).to(features.dtype)


def draw_disks(place: Tensor, height: int, width: int) -> Tensor:
    """Maps (N, 1, height, width) of disks around places (N, 2) in 0..1, with soft rims; zeros where a place is NaN."""
    x = (torch.arange(width, device=place.device) + 0.5) / width
    y = (torch.arange(height, device=place.device) + 0.5) / height
    distance = torch.hypot(x - place[:, 0, None, None], y[:, None] - place[:, 1, None, None])  # (N, height, width)
    radius = max(RADIUS, 1 / width)  # at least a pixel of the map
    return ((radius - distance) * width + 0.5).clamp(0, 1).nan_to_num(0)[:, None]


def check_points(point: Tensor, edges: Tensor) -> None:
    """InputError when one of the points (N, 2) is NaN or outside an image of `edges` (width, height)."""
    outside = ~((point >= -0.5) & (point <= edges - 0.5)).all(dim=1)
    if outside.any():
        x, y = point[outside][0].tolist()
        width, height = edges.tolist()
        raise InputError(f"the point ({x:g}, {y:g}) is not in the image, which is {width:g}x{height:g} pixels")


def build_point_clip(*, encoder: dict[str, Any], **options: Any) -> PointClip:
    """The model that a checkpoint's `model_args` describe."""
    return PointClip(rebuild_encoder(**encoder), **options)
