"""python clip_seg/test.py --checkpoint runs/clip_seg/best.pt --data Dataset

Score a model on CLIP features, or segment photographs of your own: python clip_seg/test.py --images PATH ...
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.config import ClipTestConfig
from utils.config import flag, parse
from utils.script import run_script


@dataclass
class Config(ClipTestConfig):
    """The flags of every model on CLIP."""

    checkpoint: Path = flag(Path("runs/clip_seg/best.pt"), "file written by clip_seg/train.py")


def main() -> None:
    config = parse(Config, __doc__)

    from clip_seg.model import build_segmenter
    from dataset.pet import make_test_set
    from utils.evaluation import run_test

    run_test(config, partial(build_segmenter, clip_model=config.clip_model), "clip_seg", make_test_set)


if __name__ == "__main__":
    run_script(main)
