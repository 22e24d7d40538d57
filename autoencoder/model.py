"""An autoencoder learns features without labels; its frozen encoder carries a segmentation head (report section 4)."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.layers import IMAGENET_MEAN, IMAGENET_STD, ClassHead, Normalize, UpBlock, pad_to_multiple

LEVELS = 3


class Encoder(nn.Module):
    """Three blocks of 3x3 convolution, batch norm, ReLU and 2x2 max pooling, of 1, 2 and 4 x `base_channels`.

    Takes images (B, 3, H, W) in [0, 1], returns the feature maps of its blocks, the finest first: for 256x256 images
    64x128x128, 128x64x64 and 256x32x32. Sizes that 8 does not divide are padded at the right and the bottom.
    """

    def __init__(self, *, base_channels: int = 64):
        super().__init__()
        self.channels = [base_channels * 2**level for level in range(LEVELS)]  # 64, 128, 256
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),  # the batch norm has the bias
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            )
            for inputs, outputs in zip([3, *self.channels], self.channels)
        )

    def forward(self, image: Tensor) -> list[Tensor]:
        x = pad_to_multiple(self.normalize(image), 2**LEVELS)
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features


class Autoencoder(nn.Module):
    """The encoder, and three transposed convolutions with ReLU that draw the image again from its last feature map.

    Takes images (B, 3, H, W) in [0, 1], returns their reconstructions, of the same size and range, for any H and W.
    """

    def __init__(self, *, base_channels: int = 64):
        super().__init__()
        self.encoder = Encoder(base_channels=base_channels)
        widths = [self.encoder.channels[-1] // 2**level for level in range(LEVELS + 1)]  # 256, 128, 64, 32
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            # 4x4 at stride 2: neighbors overlap, so that the 8x8 blocks of a bottleneck pixel leave no seams.
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 3, padding=1), nn.Sigmoid())

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        return self.decoder(self.encoder(image)[-1])[..., :height, :width]


class SegmentationHead(nn.Module):
    """Three 3x3 convolutions with ReLU on the encoder's last feature map, 1x1 to classes (report section 4).

    With `skips` two U-Net blocks between them double height and width and take in the encoder's finer feature maps.
    `channels` are those of the encoder's maps; returns logits at 1/8 of the image's size, with skips at 1/2.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, *, skips: bool):
        super().__init__()
        *finer, deepest = channels
        widths = [deepest // 2**step for step in range(4)]  # 256, 128, 64, 32
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        self.context = nn.Sequential(*layers)
        self.up = nn.ModuleList(UpBlock(widths[-1], widths[-1], skip_channels=skip) for skip in finer[::-1] if skips)
        self.classify = ClassHead(widths[-1], num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x = self.context(features[-1])  # (B, 32, H/8, W/8)
        for block, skip in zip(self.up, features[-2::-1]):
            x = block(x, skip)
        return self.classify(x)


class AutoencoderSegmenter(nn.Module):
    """A segmentation head on a frozen encoder: no gradients, and batch-norm statistics that never move.

    Takes images (B, 3, H, W) in [0, 1], returns logits (B, num_classes, H, W), for any H and W.
    """

    def __init__(self, encoder: Encoder, num_classes: int = 3, *, skips: bool = False):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.head = SegmentationHead(encoder.channels, num_classes, skips=skips)
        self.train()

    def train(self, mode: bool = True) -> "AutoencoderSegmenter":
        super().train(mode)
        self.encoder.eval()  # in training mode batch norm would move its statistics, frozen weights or not
        return self

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        with torch.no_grad():
            features = self.encoder(image)
        padded = [edge * 2**LEVELS for edge in features[-1].shape[-2:]]
        logits = F.interpolate(self.head(features), padded, mode="bilinear", align_corners=False)
        return logits[..., :height, :width]


def build_segmenter(num_classes: int = 3, *, base_channels: int = 64, skips: bool = False) -> "AutoencoderSegmenter":
    """The segmenter of a checkpoint's `model_args`, with an encoder of its own."""
    return AutoencoderSegmenter(Encoder(base_channels=base_channels), num_classes, skips=skips)
