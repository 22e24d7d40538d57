"""python unet/train.py --data Dataset --out runs/unet

Train the U-Net from scratch (report section 3).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TrainConfig, flag, parse, run_script


@dataclass
class Config(TrainConfig):
    """The shared flags, and the U-Net's own."""

    out: Path = flag(Path("runs/unet"), "folder of this run")
    base_channels: int = flag(64, "channels of the first level; each level below has twice as many", low=1)


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers at once.
    from dataset.pet import make_train_loaders
    from unet.model import UNet
    from utils.dataset import CLASSES
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput, fit, make_accelerator

    criterion = SegmentationLoss(config.loss, config.boundary)

    def step(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    accelerator = make_accelerator(config)
    train_loader, val_loader, split = make_train_loaders(config)
    model_args = {"num_classes": len(CLASSES), "base_channels": config.base_channels}
    fit(
        UNet(**model_args),
        step,
        train_loader,
        val_loader,
        config,
        accelerator=accelerator,
        model_name="unet",
        model_args=model_args,
        split=split,
    )


if __name__ == "__main__":
    run_script(main)
