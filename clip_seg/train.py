"""python clip_seg/train.py --data Dataset --out runs/clip_seg

Train a U-Net decoder on CLIP's patch tokens (report section 5).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TrainConfig, flag, parse, run_script


@dataclass
class ClipConfig(TrainConfig):
    """The shared flags, and those of every model on CLIP."""

    lr: float = flag(1e-5, "learning rate of Adam", low=0)
    clip_model: str = flag("openai/clip-vit-base-patch32", "a CLIP of the hub with a vision transformer, or a folder")
    clip_image_size: int | None = flag(None, "edge at which CLIP sees the images (default: its own)", low=1)
    clip_random_init: bool = flag(False, "start from random weights instead of CLIP's")
    freeze_encoder: bool = flag(False, "train the decoder alone; CLIP's weights then stay out of the checkpoint")
    skips: bool = flag(False, "feed the decoder tokens of shallower layers, too")
    base_channels: int = flag(64, "channels of the decoder's last level; each level above has twice as many", low=1)


@dataclass
class Config(ClipConfig):
    """All of these."""

    out: Path = flag(Path("runs/clip_seg"), "folder of this run")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers at once.
    from clip_seg.model import ClipSegmenter, make_encoder
    from dataset.pet import make_train_loaders
    from utils.dataset import CLASSES
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput, fit, make_accelerator

    criterion = SegmentationLoss(config.loss, config.boundary)

    def step(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    accelerator = make_accelerator(config)
    train_loader, val_loader, split = make_train_loaders(config)
    encoder, encoder_args = make_encoder(
        config.clip_model,
        image_size=config.clip_image_size,
        frozen=config.freeze_encoder,
        random_init=config.clip_random_init,
    )
    options = {"num_classes": len(CLASSES), "base_channels": config.base_channels, "skips": config.skips}
    fit(
        ClipSegmenter(encoder, **options),
        step,
        train_loader,
        val_loader,
        config,
        accelerator=accelerator,
        model_name="clip_seg",
        model_args={"encoder": encoder_args, **options},
        split=split,
    )


if __name__ == "__main__":
    run_script(main)
