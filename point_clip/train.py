"""python point_clip/train.py --data Dataset --out runs/point_clip

Train CLIP with a clicked point: the object is the side of the pet's outline that was clicked (report section 9).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.config import ClipConfig
from utils.config import flag, flag_name, parse
from utils.files import InputError
from utils.script import run_script


@dataclass
class Config(ClipConfig):
    """The flags of every model on CLIP, the encoding of the click, and a segmenter to start from."""

    out: Path = flag(Path("runs/point_clip"), "folder of this run")
    point_encoding: Literal["heatmap", "disk"] = flag(
        "heatmap", "the click as a Gaussian heatmap through CLIP (the report's), or as a small disk in the decoder"
    )
    clip_seg: Path | None = flag(
        None, "start from this checkpoint of clip_seg/train.py: its encoder, with a disk also its decoder and classes"
    )


def main() -> None:
    config = parse(Config, __doc__)
    if "balanced" in config.loss:
        raise InputError(
            f"--loss {config.loss}: what is object and what is ground depends on the click, not on a class"
        )
    if config.boundary == "class":
        raise InputError("--boundary class: a click selects one of two sides, a boundary is none of them")
    if config.point_encoding == "heatmap" and config.base_channels != Config.base_channels:
        raise InputError("--base-channels is for --point-encoding disk: with a heatmap CLIP's width is the decoder's")

    # Heavy imports come after parsing, so that --help answers immediately.
    import torch

    from clip_seg.model import make_encoder
    from dataset.pet import make_train_sets
    from dataset.pet_heatmap import FixedClickDataset, RandomClickDataset, click_target
    from point_clip.model import PointClip
    from utils.dataset import IGNORE
    from utils.loss import make_criterion
    from utils.run import start_run
    from utils.train import StepOutput, fit

    def step(model, batch):
        clicks = batch["points"].shape[1]  # on every image
        mask, on_pet = batch["mask"].repeat_interleave(clicks, dim=0), batch["on_pet"].flatten()
        negative = batch["negative_points"].flatten(0, 1) if config.point_encoding == "disk" else None
        logits = model(batch["image"], batch["points"].flatten(0, 1), negative)
        # A boundary that is learned as background belongs to the object of a click on the background, else to the pet.
        band = {"background": 0, "object": 1, "ignore": IGNORE}[config.boundary]
        learned = torch.where(mask == IGNORE, band, mask)
        both = torch.cat([torch.zeros_like(logits), logits], dim=1)  # softmax over (0, z): ground and object
        return StepOutput(criterion(both, click_target(learned, on_pet)), logits, click_target(mask, on_pet))

    run = start_run(config, "point_clip")
    train_set, val_set = make_train_sets(config, RandomClickDataset, FixedClickDataset)
    criterion, _ = make_criterion(config, train_set)
    options = {"encoding": config.point_encoding, "base_channels": config.base_channels, "skips": config.skips}
    if config.clip_seg:
        model, encoder_args = start_from(config, options)
    else:
        size, frozen, random_init = config.clip_image_size, config.freeze_encoder, config.clip_random_init
        encoder, encoder_args = make_encoder(config.clip_model, image_size=size, frozen=frozen, random_init=random_init)
        model = PointClip(encoder, **options)
    fit(model, step, train_set, val_set, run, {"encoder": encoder_args, **options})


def start_from(config: Config, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A PointClip that starts from the checkpoint of `--clip-seg`, and the plain values that describe its encoder.

    InputError for a flag that selects another CLIP or decoder than the checkpoint's.
    """
    import torch

    from clip_seg.model import build_segmenter
    from point_clip.model import from_segmenter
    from utils.helper import restore_model

    segmenter, checkpoint = restore_model(config.clip_seg, build_segmenter, "clip_seg", torch.device("cpu"))
    args = checkpoint["model_args"]
    for name in ("clip_model", "clip_image_size", "clip_random_init", "freeze_encoder"):
        if (value := getattr(config, name)) not in (getattr(Config, name), checkpoint["config"][name]):
            raise InputError(f"{flag_name(name)} {value}: --clip-seg brings its own CLIP, leave {flag_name(name)} out")
    if options["encoding"] == "disk" and any(options[name] != args[name] for name in ("base_channels", "skips")):
        flags = f"--base-channels {args['base_channels']}{' --skips' if args['skips'] else ''}"
        raise InputError(f"--clip-seg {config.clip_seg} has another decoder: give its own flags, {flags}")
    return from_segmenter(segmenter, **options), args["encoder"]


if __name__ == "__main__":
    run_script(main)
