"""U-Net from scratch (Ronneberger et al. 2015; report section 3)."""

from torch import Tensor, nn

from utils.layers import IMAGENET_MEAN, IMAGENET_STD, ClassHead, DoubleConv, Normalize, UpBlock, pad_to_multiple

LEVELS = 4


class UNet(nn.Module):
    """Four levels down to a bottleneck of 16 x `base_channels` and up again, with concatenated skips.

    Takes images (B, 3, H, W) in [0, 1], returns logits (B, num_classes, H, W), for any H and W.
    """

    def __init__(self, num_classes: int = 3, *, base_channels: int = 64):
        super().__init__()
        channels = [base_channels * 2**level for level in range(LEVELS + 1)]  # 64, 128, 256, 512, 1024
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.encoder = nn.ModuleList(DoubleConv(*pair) for pair in zip([3, *channels], channels[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = DoubleConv(channels[-2], channels[-1])
        self.decoder = nn.ModuleList(
            UpBlock(below, level, skip_channels=level) for below, level in zip(channels[:0:-1], channels[-2::-1])
        )
        self.head = ClassHead(base_channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), 2**LEVELS)
        skips = []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)  # (B, 1024, H/16, W/16)
        for block in self.decoder:
            x = block(x, skips.pop())
        return self.head(x)[..., :height, :width]
