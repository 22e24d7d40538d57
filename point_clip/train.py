"""python point_clip/train.py --data Dataset --out runs/point_clip

Train CLIP with a clicked point: what lies under the click is the object (report section 9).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.train import ClipConfig
from utils.config import flag, parse, run_script
from utils.files import InputError

if TYPE_CHECKING:
    from point_clip.model import PointClip


START_SCALE = 0.2  # a segmenter's logits are large where it is sure, and what saturates does not learn


@dataclass
class Config(ClipConfig):
    """The flags of the models on CLIP, and how the click is shown."""

    out: Path = flag(Path("runs/point_clip"), "folder of this run")
    point_encoding: Literal["heatmap", "disk"] = flag(
        "heatmap", "the click as a Gaussian heatmap through CLIP (the report's), or as a small disk in the decoder"
    )
    clip_seg: Path | None = flag(
        None, "start from this checkpoint of clip_seg/train.py: its encoder, with a disk also its decoder and classes"
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
    train_loader, val_loader, split = make_train_loaders(config, dataset_class=PetHeatmapDataset)
    options = {"encoding": config.point_encoding, "base_channels": config.base_channels, "skips": config.skips}
    if config.clip_seg:
        model, encoder_args = start_from(config, options)
    else:
        encoder, encoder_args = make_encoder(
            config.clip_model,
            image_size=config.clip_image_size,
            frozen=config.freeze_encoder,
            random_init=config.clip_random_init,
        )
        model = PointClip(encoder, **options)
    fit(
        model,
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


def start_from(config: Config, options: dict[str, Any]) -> tuple[PointClip, dict[str, Any]]:
    """A model with the trained parts of `--clip-seg`, and the plain values that describe its encoder.

    A disk's features start from the segmenter's classes: clicks on a background that looks like the pet, or the other
    way round, are what goes wrong most, and the segmenter has most of them right.

    InputError for a flag that asks for another CLIP or decoder than the checkpoint's.
    """
    import torch

    from clip_seg.model import build_segmenter
    from point_clip.model import PointClip
    from utils.helper import load_model

    segmenter, start = load_model(config.clip_seg, build_segmenter, "clip_seg", torch.device("cpu"))
    its = start["model_args"]
    for name in ("clip_model", "clip_image_size", "clip_random_init", "freeze_encoder"):
        if (value := getattr(config, name)) != getattr(Config, name) and value != start["config"][name]:
            flag_name = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag_name} {value}: --clip-seg brings its own CLIP, leave {flag_name} out")
    if options["encoding"] == "disk" and any(options[name] != its[name] for name in ("base_channels", "skips")):
        fitting = f"--base-channels {its['base_channels']}{' --skips' if its['skips'] else ''}"
        raise InputError(f"the decoder of --clip-seg {config.clip_seg} is another one: give it as {fitting}")
    model = PointClip(segmenter.encoder, **options)
    if options["encoding"] == "disk":
        model.project, model.decoder = segmenter.project, segmenter.decoder
        with torch.no_grad():  # what is compared with the click starts as what the segmenter tells apart: pet or not
            for compared, classes in zip(model.reduce[0].parameters(), segmenter.head.parameters()):
                compared += START_SCALE * (classes[1:].mean(dim=0) - classes[0])
    return model, its["encoder"]


if __name__ == "__main__":
    run_script(main)
