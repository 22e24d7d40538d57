"""python point_clip/train.py --data Dataset --out runs/point_clip

Train CLIP with a clicked point: what lies under the click is the object (report section 9).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.train import ClipConfig
from utils.config import flag, parse, run_script
from utils.files import InputError


@dataclass
class Config(ClipConfig):
    """The flags of the models on CLIP, and how the click is shown."""

    out: Path = flag(Path("runs/point_clip"), "folder of this run")
    point_encoding: Literal["heatmap", "disk"] = flag(
        "heatmap", "the click as a Gaussian heatmap through CLIP (the report's), or as a small disk in the decoder"
    )


def main() -> None:
    config = parse(Config, __doc__)
    if config.point_encoding == "heatmap" and config.base_channels != Config.base_channels:
        raise InputError("--base-channels is for --point-encoding disk: with a heatmap CLIP's width is the decoder's")

    # Heavy imports come after parsing, so that --help answers at once.
    import torch

    from clip_seg.model import make_encoder
    from dataset.pet import make_train_loaders
    from dataset.pet_heatmap import PetHeatmapDataset, under_click
    from point_clip.model import CLASS_NAMES, PointClip
    from utils.dataset import IGNORE
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput, fit, make_accelerator

    criterion = SegmentationLoss(config.loss, "ignore")  # the boundary is dealt with below

    def step(model, batch):
        clicks = batch["point"].shape[1]  # on every image
        mask, on_pet = batch["mask"].repeat_interleave(clicks, dim=0), batch["on_pet"].flatten()
        avoid = batch["avoid"].flatten(0, 1) if config.point_encoding == "disk" else None
        logits = model(batch["image"], batch["point"].flatten(0, 1), avoid)
        # A boundary that counts as background lies under a click on the background.
        learned = torch.where(mask == IGNORE, 0, mask) if config.boundary == "background" else mask
        two = torch.cat([torch.zeros_like(logits), logits], dim=1)  # the softmax of (0, z) is the sigmoid of z
        return StepOutput(criterion(two, under_click(learned, on_pet)), logits, under_click(mask, on_pet))

    accelerator = make_accelerator(config)
    shard = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    train_loader, val_loader, split = make_train_loaders(config, dataset_class=PetHeatmapDataset, **shard)
    encoder, encoder_args = make_encoder(
        config.clip_model,
        image_size=config.clip_image_size,
        frozen=config.freeze_encoder,
        random_init=config.clip_random_init,
    )
    options = {"encoding": config.point_encoding, "base_channels": config.base_channels, "skips": config.skips}
    fit(
        PointClip(encoder, **options),
        step,
        train_loader,
        val_loader,
        config,
        accelerator=accelerator,
        model_name="point_clip",
        model_args={"encoder": encoder_args, **options},
        split=split,
        class_names=CLASS_NAMES,
    )


if __name__ == "__main__":
    run_script(main)
