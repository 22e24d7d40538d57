"""Layers that several models share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Mean and standard deviation of ImageNet's pixels; those of other photographs are similar.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Shift and scale images in [0, 1] by a mean and standard deviation per channel, kept as non-persistent buffers."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with zeros at the right and bottom to multiples of `multiple`; the caller crops the output."""
    height, width = x.shape[-2:]
    return F.pad(x, (0, -width % multiple, 0, -height % multiple))


class DoubleConv(nn.Sequential):
    """3x3 convolution, batch norm, ReLU, twice; keeps height and width (Ronneberger et al. 2015, padded)."""

    def __init__(self, in_channels: int, out_channels: int):
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            conv = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)  # batch norm would subtract a bias
            layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class ResidualConv(nn.Module):
    """A DoubleConv without its last ReLU, plus its input (through a 1x1 convolution), then ReLU (He et al. 2016)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.body = nn.Sequential(*list(DoubleConv(in_channels, out_channels))[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class AttentionGate(nn.Module):
    """A skip, weighted per pixel by its agreement with the decoder's features (Oktay et al. 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 2)
        self.skip, self.gate = nn.Conv2d(channels, inner, 1, bias=False), nn.Conv2d(channels, inner, 1)
        self.weight = nn.Conv2d(inner, 1, 1)

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        """`skip` and `gate` (B, channels, H, W) -> the weighted skip, of the same shape."""
        return skip * torch.sigmoid(self.weight(torch.relu(self.skip(skip) + self.gate(gate))))


class ClassHead(nn.Conv2d):
    """1x1 convolution to class logits that starts without a preference for any class.

    After batch norm and ReLU all features have about the same mean. A class whose initial weights have a larger sum is
    then preferred everywhere, for hundreds of steps at the report's learning rate; here all sums and biases are zero.
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes, 1)
        with torch.no_grad():
            self.weight -= self.weight.mean(dim=1, keepdim=True)
            self.bias.zero_()


class UpBlock(nn.Module):
    """Transposed 2x2 convolution that doubles height and width, then a DoubleConv over it and the skip, if any.

    `residual`: a ResidualConv instead. `attention`: the skip, which has `out_channels`, goes through an AttentionGate.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        skip_channels: int = 0,
        residual: bool = False,
        attention: bool = False,
    ):
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.attention = AttentionGate(out_channels) if attention else None
        self.conv = (ResidualConv if residual else DoubleConv)(out_channels + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.up(x)  # (B, out, 2H, 2W)
        if self.attention is not None:
            skip = self.attention(skip, x)
        return self.conv(x if skip is None else torch.cat([skip, x], dim=1))
