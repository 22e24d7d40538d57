"""CLIP's patch tokens under a U-Net decoder (Radford et al. 2021; report section 5)."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from clip_seg.weights import ARCHITECTURE, find_weights, hash_weights, load_vision, random_vision
from utils.files import InputError
from utils.layers import ClassHead, Normalize, UpBlock

# Mean and standard deviation of the pixels that CLIP was trained on.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LEVELS = 4


class ClipEncoder(nn.Module):
    """The patch tokens of a CLIP vision transformer as feature maps.

    Takes images (B, 3, H, W) in [0, 1], returns a list of four maps (B, channels, g, g): the tokens after 1/4, 1/2, 3/4
    and all of the layers (3, 6, 9 and 12 for B/32); g = `image_size` / patch size, 7 for B/32.

    `frozen`: no gradients, always in eval mode. `external_weights`: checkpoints hold only the hash of the weights, not
    the weights (utils/helper.py).
    """

    def __init__(
        self,
        vision: CLIPVisionModel,
        *,
        image_size: int | None = None,
        frozen: bool = False,
        external_weights: bool = False,
    ):
        super().__init__()
        self.vision = vision
        self.vision.external_weights = external_weights
        self.image_size = image_size or vision.config.image_size
        self.frozen = frozen
        patch = vision.config.patch_size
        if self.image_size % patch:
            found = f"--clip-image-size {self.image_size} is not a multiple of the patch size of {patch} pixels"
            raise InputError(f"{found}: use {max(1, round(self.image_size / patch)) * patch}")
        self.grid = self.image_size // patch
        self.channels = vision.config.hidden_size
        self.taps = [vision.config.num_hidden_layers * quarter // 4 for quarter in (1, 2, 3, 4)]
        self.normalize = Normalize(CLIP_MEAN, CLIP_STD)
        for name, parameter in vision.named_parameters():
            parameter.requires_grad_(not frozen and "post_layernorm" not in name)  # it is for the unused pooled token
        self.train()

    def train(self, mode: bool = True) -> "ClipEncoder":
        super().train(mode)
        if self.frozen:
            self.vision.eval()
        return self

    def prepare(self, image: Tensor) -> Tensor:
        """Images resized to the encoder's size, bicubic and without cropping; still in [0, 1]."""
        size = (self.image_size, self.image_size)
        if image.shape[-2:] == size:
            return image
        resize = partial(F.interpolate, size=size, mode="bicubic", antialias=True, align_corners=False)
        if image.device.type == "cpu" and not image.requires_grad:
            # A CPU resizes bytes several times faster than floats, and the images were bytes.
            return resize((image * 255).add_(0.5).clamp_(0, 255).to(torch.uint8)).float().div_(255)
        return resize(image).clamp(0, 1)

    def tokens(self, prepared: Tensor) -> list[Tensor]:
        """Feature maps of images in [0, 1] at the encoder's size (`prepare`)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            normalized = self.normalize(prepared)
            output = self.vision(normalized, interpolate_pos_encoding=True, output_hidden_states=True)
        patches = [output.hidden_states[layer][:, 1:] for layer in self.taps]  # (B, 49, 768) without the class token
        return [part.transpose(1, 2).unflatten(2, (self.grid, self.grid)) for part in patches]  # (B, 768, 7, 7)

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.tokens(self.prepare(image))


class Decoder(nn.Module):
    """The U-Net's decoder on a map of tokens: four blocks that double height and width and halve the channels.

    With `skip_channels` (the channels of a token) the first three blocks also take tokens of shallower layers.
    Transposed convolutions expand each token to its patch at the block's resolution (UNETR, Hatamizadeh et al. 2022).
    """

    def __init__(self, in_channels: int, *, skip_channels: int = 0):
        super().__init__()
        widths = [in_channels // 2**level for level in range(LEVELS + 1)]  # 1024, 512, 256, 128, 64
        self.out_channels = widths[-1]
        self.unpack = nn.ModuleList()
        if skip_channels:
            for level, width in enumerate(widths[1:LEVELS], start=1):
                self.unpack.append(nn.ConvTranspose2d(skip_channels, max(1, width // 4), 2**level, stride=2**level))
        skips = [layer.out_channels for layer in self.unpack] + [0] * (LEVELS - len(self.unpack))
        self.blocks = nn.ModuleList(
            UpBlock(inputs, outputs, skip_channels=skip) for inputs, outputs, skip in zip(widths, widths[1:], skips)
        )

    def forward(self, x: Tensor, shallower: Sequence[Tensor]) -> Tensor:
        """`x` (B, in_channels, g, g) and token maps (B, skip_channels, g, g), shallowest first -> (B, C, 16g, 16g)."""
        skips = [unpack(tokens) for unpack, tokens in zip(self.unpack, reversed(shallower))]
        for block, skip in itertools.zip_longest(self.blocks, skips):
            x = block(x, skip)  # 7 -> 14 -> 28 -> 56 -> 112
        return x


class ClipSegmenter(nn.Module):
    """CLIP's tokens, projected to 16 x `base_channels`, under the U-Net's decoder.

    Takes images (B, 3, H, W) in [0, 1], returns logits (B, num_classes, H, W), for any H and W.
    """

    def __init__(self, encoder: "ClipEncoder", num_classes: int = 3, *, base_channels: int = 64, skips: bool = False):
        super().__init__()
        self.encoder = encoder
        self.project = nn.Conv2d(encoder.channels, base_channels * 2**LEVELS, 1)
        self.decoder = Decoder(base_channels * 2**LEVELS, skip_channels=encoder.channels if skips else 0)
        self.head = ClassHead(base_channels, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        *shallower, tokens = self.encoder(image)
        x = self.decoder(self.project(tokens), shallower)  # (B, 64, 112, 112)
        return F.interpolate(self.head(x), image.shape[-2:], mode="bilinear", align_corners=False)


def make_encoder(
    clip_model: str, *, image_size: int | None = None, frozen: bool = False, random_init: bool = False
) -> tuple[ClipEncoder, dict[str, Any]]:
    """An encoder to train, and the plain values from which `rebuild_encoder` makes it again.

    A checkpoint holds random or trained weights completely, but of a frozen pre-trained CLIP only their hash.
    """
    vision = random_vision(clip_model) if random_init else load_vision(clip_model)
    external = frozen and not random_init
    encoder = ClipEncoder(vision, image_size=image_size, frozen=frozen, external_weights=external)
    return encoder, {
        "clip_model": clip_model,
        "architecture": {name: getattr(vision.config, name) for name in ARCHITECTURE},
        "image_size": encoder.image_size,
        "frozen": frozen,
        "weights_hash": hash_weights(vision) if external else None,
    }


def rebuild_encoder(
    *, clip_model: str, architecture: dict[str, Any], image_size: int, frozen: bool, weights_hash: str | None
) -> ClipEncoder:
    """The encoder of `make_encoder`, from its plain values. External weights are loaded from `clip_model`; InputError
    when they have another hash. Other weights are random here: they are loaded from the checkpoint later."""
    external = weights_hash is not None
    vision = find_weights(clip_model, weights_hash) if external else CLIPVisionModel(CLIPVisionConfig(**architecture))
    return ClipEncoder(vision, image_size=image_size, frozen=frozen, external_weights=external)


def build_segmenter(
    num_classes: int = 3, *, encoder: dict[str, Any], clip_model: str | None = None, **options: Any
) -> ClipSegmenter:
    """The segmenter of a checkpoint's `model_args`. `clip_model`: id or folder of external weights that have moved."""
    if clip_model:
        encoder = {**encoder, "clip_model": clip_model}
    return ClipSegmenter(rebuild_encoder(**encoder), num_classes, **options)
