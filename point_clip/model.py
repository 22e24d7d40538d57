"""CLIP's features and a clicked point: segment the side of the pet's outline that was clicked (report section 9)."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clip_seg.model import LEVELS, ClipEncoder, ClipSegmenter, Decoder, rebuild_encoder
from utils.dataset import PETS
from utils.dataset_prep import gaussian_heatmaps
from utils.files import InputError
from utils.layers import ClassHead, DoubleConv

Encoding = Literal["heatmap", "disk"]
RADIUS = 5 / 256  # of a click's disk, as a share of the image's edge
CLICK_CHANNELS = 16


class PointClip(nn.Module):
    """One logit per pixel: positive where the pixel is on the clicked side of the pet's outline.

    `encoding` is the form of the click. "heatmap" (the report's): a Gaussian around the click passes through CLIP as a
    second picture, and the decoder gets both feature maps. "disk" (RITM, Sofiiuk et al. 2022; SimpleClick, Liu et al.
    2023): a small disk is concatenated to the decoder's features, so that an image is encoded once for all clicks.

    `encode(image)` is the work per image, `decode` the work per click; `forward` does both.
    """

    def __init__(
        self, encoder: ClipEncoder, *, encoding: Encoding = "heatmap", base_channels: int = 64, skips: bool = False
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
            # In [-1, 1], and 0 on average at the start (see ClassHead), so that the product of the features of two
            # pixels is positive where they are similar.
            self.reduce = nn.Sequential(ClassHead(base_channels, CLICK_CHANNELS), nn.Tanh())
            self.head = ClickHead(CLICK_CHANNELS)

    def encode(self, image: Tensor) -> list[Tensor]:
        """Features of images (B, 3, H, W) in [0, 1], for `decode`: a list of maps (B, C, h, w)."""
        features = self.encoder(image)
        if self.encoding == "heatmap":
            return features
        return [self.reduce(self.decoder(self.project(features[-1]), features[:-1]))]  # (B, 16, 112, 112)

    def decode(
        self, features: list[Tensor], points: Tensor, image_size: Sequence[int], negative_points: Tensor | None = None
    ) -> Tensor:
        """Logits (N, 1, H, W) for clicks `points` (N, 2), x and y in pixels of images of `image_size` (H, W).

        `features` are those of B images; `points` holds N / B clicks on the first, as many on the second, and so on.
        `negative_points` (N, 2) are clicks on the other side of the outline, NaN where there is none; for "disk" only.
        InputError for a point that is NaN or outside the image; not in training, where the check would delay a GPU.
        """
        if self.encoding == "heatmap":
            if negative_points is not None:
                raise InputError("a model with the heatmap encoding takes no negative click; train one with disk")
            return self._combine(features, self.encoder.tokens(self._heatmaps(points, image_size)), image_size)
        (image_features,) = features
        image_features = image_features.repeat_interleave(len(points) // len(image_features), dim=0)
        negative = None if negative_points is None else (negative_points + 0.5) / points.new_tensor(image_size[::-1])
        logits = self.head(image_features, self._relative(points, image_size), negative)
        return F.interpolate(logits, tuple(image_size), mode="bilinear", align_corners=False)

    def forward(self, image: Tensor, points: Tensor, negative_points: Tensor | None = None) -> Tensor:
        """Logits (N, 1, H, W) for images (B, 3, H, W) in [0, 1] and N / B clicks on each, as in `decode`."""
        size = image.shape[-2:]
        if self.encoding == "disk":
            return self.decode(self.encode(image), points, size, negative_points)
        # One pass of the encoder over images and heatmaps.
        maps = self.encoder.tokens(torch.cat([self.encoder.prepare(image), self._heatmaps(points, size)]))
        return self._combine([part[: len(image)] for part in maps], [part[len(image) :] for part in maps], size)

    def _relative(self, points: Tensor, image_size: Sequence[int]) -> Tensor:
        """Points (N, 2) in pixels as shares of the image: 0 and 1 at its borders."""
        edges = points.new_tensor(image_size[::-1])
        outside = ~((points >= -0.5) & (points <= edges - 0.5)).all(dim=1)
        if not self.training and outside.any():
            (x, y), (height, width) = points[outside][0].tolist(), image_size
            raise InputError(f"the point ({x:g}, {y:g}) is not in the image, which is {width}x{height} pixels")
        return (points + 0.5) / edges

    def _heatmaps(self, points: Tensor, image_size: Sequence[int]) -> Tensor:
        size = self.encoder.image_size
        heatmaps = gaussian_heatmaps(self._relative(points, image_size) * size - 0.5, size, size)
        return heatmaps[:, None].expand(-1, 3, -1, -1)  # (N, 3, 224, 224)

    def _combine(self, image_maps: Sequence[Tensor], click_maps: Sequence[Tensor], image_size: Sequence[int]) -> Tensor:
        """Logits (N, 1, H, W) from the encoder's maps of B images and of N heatmaps; `image_size` is (H, W)."""
        clicks = len(click_maps[-1]) // len(image_maps[-1])  # on each image
        image_maps = [part.repeat_interleave(clicks, dim=0) for part in image_maps]
        both = torch.cat([image_maps[-1], click_maps[-1]], dim=1)  # (N, 1536, 7, 7)
        logits = self.head(self.decoder(both, image_maps[:-1]))  # (N, 1, 112, 112)
        return F.interpolate(logits, tuple(image_size), mode="bilinear", align_corners=False)


class ClickHead(nn.Module):
    """Logits (N, 1, h, w) of features (N, C, h, w) and clicks (N, 2), x and y in 0..1.

    The inputs are the features, their products with the features under each click, and disks around the clicks. The
    products compare even distant pixels with the click; the disks mark its exact position. The logits are the
    similarity to the clicked pixel (the mean of the products over the channels) times a learned scale, plus a learned
    correction.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.compare = DoubleConv(3 * channels + 2, channels)
        self.classify = nn.Conv2d(channels, 1, 1)
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, features: Tensor, position: Tensor, negative: Tensor | None = None) -> Tensor:
        parts, disks = [features], []
        for click in (position, torch.full_like(position, math.nan) if negative is None else negative):
            parts.append(features * features_at(features, click))
            disks.append(render_disks(click, *features.shape[-2:]))
        similarity = parts[1].mean(dim=1, keepdim=True)  # (N, 1, h, w)
        return self.scale * similarity + self.classify(self.compare(torch.cat([*parts, *disks], dim=1)))


def features_at(features: Tensor, position: Tensor) -> Tensor:
    """Features (N, C, 1, 1) of maps (N, C, h, w) at positions (N, 2), x and y in 0..1, bilinear; zeros where NaN."""
    grid = (2 * position.nan_to_num(0.5) - 1)[:, None, None, :]  # (N, 1, 1, 2)
    # In float32: bfloat16 would round a position to a hundredth of the image.
    found = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return torch.where(position.isnan().any(dim=1)[:, None, None, None], 0, found).to(features.dtype)


def render_disks(position: Tensor, height: int, width: int) -> Tensor:
    """Maps (N, 1, height, width) of disks with soft edges around positions (N, 2), x and y in 0..1; zeros where NaN."""
    x = (torch.arange(width, device=position.device) + 0.5) / width
    y = (torch.arange(height, device=position.device) + 0.5) / height
    distance = torch.hypot(x - position[:, 0, None, None], y[:, None] - position[:, 1, None, None])  # (N, h, w)
    radius = max(RADIUS, 1 / width)  # at least one pixel of the map
    return ((radius - distance) * width + 0.5).clamp(0, 1).nan_to_num(0)[:, None]


START_SCALE = 0.2  # of a segmenter's weights, so that the tanh after them does not saturate


def from_segmenter(segmenter: ClipSegmenter, **options: Any) -> PointClip:
    """A PointClip that starts from a trained segmenter: its encoder, and for the disk encoding also its decoder.

    The disk's features then start near the segmenter's difference between the logits of pets and background: most
    errors are background pixels that resemble the pet, or the reverse, and the segmenter classifies most of these
    pixels correctly. `options` are those of PointClip; base_channels and skips must be the segmenter's.
    """
    model = PointClip(segmenter.encoder, **options)
    if model.encoding == "disk":
        model.project, model.decoder = segmenter.project, segmenter.decoder
        reduce, classes = model.reduce[0], segmenter.head  # 1x1: weights (C, base_channels, 1, 1), biases (C,)
        with torch.no_grad():
            reduce.weight += START_SCALE * (classes.weight[1 : len(PETS)].mean(dim=0) - classes.weight[0])
            reduce.bias += START_SCALE * (classes.bias[1 : len(PETS)].mean(dim=0) - classes.bias[0])
    return model


def build_point_clip(*, encoder: dict[str, Any], clip_model: str | None = None, **options: Any) -> PointClip:
    """The model of a checkpoint's `model_args`. `clip_model`: id or folder of external weights that have moved."""
    if clip_model:
        encoder = {**encoder, "clip_model": clip_model}
    return PointClip(rebuild_encoder(**encoder), **options)
