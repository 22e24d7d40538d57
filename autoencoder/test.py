"""python autoencoder/test.py --checkpoint runs/autoencoder/segmentation/best.pt --data Dataset

Score a trained autoencoder's segmentation and its reconstruction, or segment photographs of your own:
python autoencoder/test.py --images PATH ...
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TestConfig, flag, parse
from utils.script import run_script


@dataclass
class Config(TestConfig):
    """The shared flags, and where the decoder is."""

    checkpoint: Path = flag(
        Path("runs/autoencoder/segmentation/best.pt"), "file written by the second stage of autoencoder/train.py"
    )
    reconstruction: Path | None = flag(
        None, "file of the first stage (default: the --encoder of the training, or reconstruction/best.pt of its run)"
    )


def main() -> None:
    config = parse(Config, __doc__)

    from autoencoder.model import build_segmenter
    from autoencoder.reconstruction import score_both
    from dataset.pet import make_test_set
    from utils.evaluation import run_test

    run_test(config, build_segmenter, "autoencoder", make_test_set, scoring=score_both)


if __name__ == "__main__":
    run_script(main)
