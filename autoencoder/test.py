"""python autoencoder/test.py --checkpoint runs/autoencoder/segmentation/best.pt --data Dataset

Score a trained autoencoder's segmentation and its reconstruction, or segment photographs of your own:
python autoencoder/test.py --images PATH ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TestConfig, flag, parse, run_script


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

    # Heavy imports come after parsing, so that --help answers immediately.
    from autoencoder.model import build_segmenter
    from autoencoder.reconstruction import find_autoencoder, score_reconstruction
    from dataset.pet import make_test_set
    from utils.distributed import init_distributed, print_once
    from utils.evaluation import score
    from utils.helper import restore_model
    from utils.predictor import Predictor, predict_photographs

    device = init_distributed(config.device)
    segmenter, checkpoint = restore_model(config.checkpoint, build_segmenter, "autoencoder", device)
    if config.images:
        print_once(predict_photographs(Predictor(segmenter, checkpoint), config.images, config.results))
        return
    test_set = make_test_set(config, checkpoint["config"]["image_size"])
    autoencoder, path = find_autoencoder(segmenter, checkpoint, config.checkpoint, config.reconstruction)
    if autoencoder is not None:
        print_once(score_reconstruction(autoencoder, test_set, config, device, details={"checkpoint": str(path)}))
    print_once(score(segmenter, checkpoint, test_set, config, device))


if __name__ == "__main__":
    run_script(main)
