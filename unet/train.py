"""python unet/train.py --data Dataset --out runs/unet

Train the U-Net from scratch (report section 3).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TrainConfig, flag, parse
from utils.script import run_script


@dataclass
class Config(TrainConfig):
    """The shared flags, and the U-Net's own."""

    out: Path = flag(Path("runs/unet"), "folder of this run")
    base_channels: int = flag(64, "channels of the first level; each level below has twice as many", low=1)
    residual: bool = flag(False, "blocks with shortcuts")
    attention: bool = flag(False, "skips that are gated by attention")
    deep_supervision: bool = flag(False, "also train heads at half and quarter resolution, with weights 1/2 and 1/4")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers immediately.
    from dataset.pet import make_train_sets
    from unet.model import UNet
    from utils.loss import add_losses, make_criterion
    from utils.run import start_run
    from utils.train import StepOutput, fit

    def step(model, batch):
        scales = model(batch["image"], all_scales=True)
        judged = scales if model.training else scales[:1]  # the others serve training only
        weighted = [(0.5**number, criterion(logits, batch["mask"])) for number, logits in enumerate(judged)]
        return StepOutput(add_losses(weighted), scales[0], batch["mask"])

    run = start_run(config, "unet")
    train_set, val_set = make_train_sets(config)
    criterion, num_classes = make_criterion(config, train_set)
    options = ("base_channels", "residual", "attention", "deep_supervision")
    model_args = {"num_classes": num_classes, **{name: getattr(config, name) for name in options}}
    fit(UNet(**model_args), step, train_set, val_set, run, model_args)


if __name__ == "__main__":
    run_script(main)
