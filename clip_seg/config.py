"""The flags of every model on CLIP, and its default weights."""

from dataclasses import dataclass

from utils.config import TestConfig, TrainConfig, flag

DEFAULT_CLIP = "openai/clip-vit-base-patch32"


@dataclass
class ClipConfig(TrainConfig):
    """The shared flags of train.py, and those of every model on CLIP."""

    lr: float = flag(1e-5, "learning rate", low=0, strong=1e-4)
    clip_model: str = flag(DEFAULT_CLIP, "a CLIP with a vision transformer: hub id or folder")
    clip_image_size: int | None = flag(None, "edge at which CLIP sees the images (default: its own)", low=1)
    clip_random_init: bool = flag(False, "start from random weights instead of CLIP's")
    freeze_encoder: bool = flag(False, "train the decoder alone; CLIP's weights then stay out of the checkpoint")
    skips: bool = flag(False, "also feed the decoder tokens of shallower layers")
    base_channels: int = flag(64, "channels of the decoder's last level; each level above has twice as many", low=1)


@dataclass
class ClipTestConfig(TestConfig):
    """The shared flags of test.py, and where the weights of a frozen CLIP are."""

    clip_model: str | None = flag(None, "where a frozen CLIP's weights are now (default: where they were in training)")
