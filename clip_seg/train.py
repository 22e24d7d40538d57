"""python clip_seg/train.py --data Dataset --out runs/clip_seg

Train a U-Net decoder on CLIP's patch tokens (report section 5).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.config import ClipConfig
from utils.config import flag, parse
from utils.script import run_script


@dataclass
class Config(ClipConfig):
    """The flags of every model on CLIP."""

    out: Path = flag(Path("runs/clip_seg"), "folder of this run")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers immediately.
    from clip_seg.model import ClipSegmenter, make_encoder
    from dataset.pet import make_train_sets
    from utils.loss import make_criterion
    from utils.run import start_run
    from utils.train import StepOutput, fit

    def step(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    run = start_run(config, "clip_seg")
    train_set, val_set = make_train_sets(config)
    size, frozen, random_init = config.clip_image_size, config.freeze_encoder, config.clip_random_init
    encoder, encoder_args = make_encoder(config.clip_model, image_size=size, frozen=frozen, random_init=random_init)
    criterion, num_classes = make_criterion(config, train_set)
    options = {"num_classes": num_classes, "base_channels": config.base_channels, "skips": config.skips}
    fit(ClipSegmenter(encoder, **options), step, train_set, val_set, run, {"encoder": encoder_args, **options})


if __name__ == "__main__":
    run_script(main)
