"""python clip_seg/test.py --checkpoint runs/clip_seg/best.pt --data Dataset

Score a model on CLIP features, or segment photographs of your own: python clip_seg/test.py --images PATH ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.config import ClipTestConfig
from utils.config import flag, parse, run_script


@dataclass
class Config(ClipTestConfig):
    """The flags of every model on CLIP."""

    checkpoint: Path = flag(Path("runs/clip_seg/best.pt"), "file written by clip_seg/train.py")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers immediately.
    from clip_seg.model import build_segmenter
    from dataset.pet import make_test_set
    from utils.distributed import init_distributed, print_once
    from utils.evaluation import score
    from utils.helper import restore_model
    from utils.predictor import Predictor, predict_photographs

    device = init_distributed(config.device)
    build = partial(build_segmenter, clip_model=config.clip_model)
    model, checkpoint = restore_model(config.checkpoint, build, "clip_seg", device)
    if config.images:
        print_once(predict_photographs(Predictor(model, checkpoint), config.images, config.results))
    else:
        test_set = make_test_set(config, checkpoint["config"]["image_size"])
        print_once(score(model, checkpoint, test_set, config, device))


if __name__ == "__main__":
    run_script(main)
