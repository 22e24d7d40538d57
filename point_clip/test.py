"""python point_clip/test.py --checkpoint runs/point_clip/best.pt --data Dataset

Score a model prompted by clicks, or segment the object under a click in photographs of your own:
python point_clip/test.py --images PATH ... --point 120,80
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip_seg.config import ClipTestConfig
from utils.config import flag, parse, parse_point
from utils.files import InputError
from utils.script import run_script


@dataclass
class Config(ClipTestConfig):
    """The flags of every model on CLIP, and a click."""

    checkpoint: Path = flag(Path("runs/point_clip/best.pt"), "file written by point_clip/train.py")
    point: tuple | None = flag(None, "with --images: the click, X,Y in pixels of each photograph", parse=parse_point)

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.images) != bool(self.point):
            raise InputError("--images and --point go together: give the photographs and the click")


def main() -> None:
    config = parse(Config, __doc__)

    from dataset.pet import make_test_set
    from point_clip.model import build_point_clip
    from point_clip.scoring import score_clicks
    from utils.dataset import CLICKS
    from utils.evaluation import run_test

    build = partial(build_point_clip, clip_model=config.clip_model)
    run_test(config, build, "point_clip", make_test_set, scoring=score_clicks, default_classes=CLICKS)


if __name__ == "__main__":
    run_script(main)
