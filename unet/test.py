"""python unet/test.py --checkpoint runs/unet/best.pt --data Dataset

Score a trained U-Net, or segment photographs of your own: python unet/test.py --images PATH ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TestConfig, flag, parse, run_script


@dataclass
class Config(TestConfig):
    """The shared flags."""

    checkpoint: Path = flag(Path("runs/unet/best.pt"), "file written by unet/train.py")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers immediately.
    from dataset.pet import make_test_set
    from unet.model import UNet
    from utils.distributed import init_distributed, print_once
    from utils.evaluation import score
    from utils.helper import restore_model
    from utils.predictor import Predictor, predict_photographs

    device = init_distributed(config.device)
    model, checkpoint = restore_model(config.checkpoint, UNet, "unet", device)
    if config.images:
        print_once(predict_photographs(Predictor(model, checkpoint), config.images, config.results))
    else:
        test_set = make_test_set(config, checkpoint["config"]["image_size"])
        print_once(score(model, checkpoint, test_set, config, device))


if __name__ == "__main__":
    run_script(main)
