"""U-Net from scratch (Ronneberger et al. 2015; report section 3), with options of later papers (section 8.2.3)."""

from torch import Tensor, nn
from torch.nn import functional as F

from utils.layers import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ClassHead,
    DoubleConv,
    Normalize,
    ResidualConv,
    UpBlock,
    pad_to_multiple,
)

LEVELS = 4
SCALES = 3  # of deep supervision: full, half and quarter resolution


class UNet(nn.Module):
    """Four levels down to a bottleneck of 16 x `base_channels` and up again, with concatenated skips.

    Takes images (B, 3, H, W) in [0, 1], returns logits (B, num_classes, H, W), for any H and W.

    `residual`: blocks with shortcuts (He et al. 2016). `attention`: gated skips (Oktay et al. 2018).
    `deep_supervision`: heads at half and quarter resolution, for training (Lee et al. 2015).
    """

    def __init__(
        self,
        num_classes: int = 3,
        *,
        base_channels: int = 64,
        residual: bool = False,
        attention: bool = False,
        deep_supervision: bool = False,
    ):
        super().__init__()
        channels = [base_channels * 2**level for level in range(LEVELS + 1)]  # 64, 128, 256, 512, 1024
        block = ResidualConv if residual else DoubleConv
        options = {"residual": residual, "attention": attention}
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.encoder = nn.ModuleList(block(*pair) for pair in zip([3, *channels], channels[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = block(channels[-2], channels[-1])
        self.decoder = nn.ModuleList(
            UpBlock(below, level, skip_channels=level, **options)
            for below, level in zip(channels[:0:-1], channels[-2::-1])
        )
        self.head = ClassHead(base_channels, num_classes)
        coarse = channels[1:SCALES] if deep_supervision else []
        self.coarse_heads = nn.ModuleList(ClassHead(width, num_classes) for width in coarse)

    def forward(self, image: Tensor, *, all_scales: bool = False) -> Tensor | list[Tensor]:
        """The logits; with `all_scales` a list of them and of those of the coarser heads, all (B, C, H, W)."""
        height, width = image.shape[-2:]
        x = pad_to_multiple(self.normalize(image), 2**LEVELS)
        size, skips, features = x.shape[-2:], [], []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottleneck(x)  # (B, 1024, H/16, W/16)
        for block in self.decoder:
            x = block(x, skips.pop())
            features.append(x)
        logits = self.head(x)[..., :height, :width]
        if not all_scales:
            return logits
        coarse = zip(self.coarse_heads, features[-2::-1])  # half the resolution, then a quarter
        resized = (F.interpolate(head(part), size, mode="bilinear", align_corners=False) for head, part in coarse)
        return [logits, *(part[..., :height, :width] for part in resized)]
