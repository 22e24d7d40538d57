"""python unet/test.py --checkpoint runs/unet/best.pt --data Dataset

Score a trained U-Net, or segment photographs of your own: python unet/test.py --images PATH ...
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TestConfig, flag, parse
from utils.script import run_script


@dataclass
class Config(TestConfig):
    """The shared flags."""

    checkpoint: Path = flag(Path("runs/unet/best.pt"), "file written by unet/train.py")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers immediately.
    from dataset.pet import make_test_set
    from unet.model import UNet
    from utils.evaluation import run_test

    run_test(config, UNet, "unet", make_test_set)


if __name__ == "__main__":
    run_script(main)
