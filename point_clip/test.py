"""python point_clip/test.py --checkpoint runs/point_clip/best.pt --data Dataset

Score a model prompted by clicks, or segment the object under a click in photographs of your own:
python point_clip/test.py --images PATH ... --point 120,80
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.config import ClipTestConfig
from utils.config import flag, parse, point, run_script
from utils.files import InputError


@dataclass
class Config(ClipTestConfig):
    """The flags of every model on CLIP, and a click."""

    checkpoint: Path = flag(Path("runs/point_clip/best.pt"), "file written by point_clip/train.py")
    point: tuple | None = flag(None, "with --images: the click, X,Y in pixels of each photograph", parse=point)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.images) != bool(self.point):
            raise InputError("--images and --point go together: give the photographs and the click")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers immediately.
    from dataset.pet import make_test_set
    from point_clip.model import build_point_clip
    from point_clip.scoring import score_clicks
    from utils.dataset import CLICKS
    from utils.distributed import init_distributed, print_once
    from utils.helper import restore_model
    from utils.predictor import Predictor, predict_photographs

    device = init_distributed(config.device)
    build = partial(build_point_clip, clip_model=config.clip_model)
    model, checkpoint = restore_model(config.checkpoint, build, "point_clip", device, default_classes=CLICKS)
    if config.images:
        print_once(predict_photographs(Predictor(model, checkpoint), config.images, config.results, config.point))
    else:
        test_set = make_test_set(config, checkpoint["config"]["image_size"])
        print_once(score_clicks(model, checkpoint, test_set, config, device))


if __name__ == "__main__":
    run_script(main)
