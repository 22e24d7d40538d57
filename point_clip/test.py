"""python point_clip/test.py --checkpoint runs/point_clip/best.pt --data Dataset

Score a model prompted by clicks, or segment what lies under a point of photographs of your own:
python point_clip/test.py --images PATH ... --point 120,80
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TestConfig, flag, parse, run_script
from utils.files import InputError


def point(text: str) -> tuple[float, float]:
    """`X,Y` in pixels of the photograph, origin top left."""
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected X,Y in pixels, such as 120,80, got {text!r}") from None
    return x, y


@dataclass
class Config(TestConfig):
    """The shared flags, where the weights of a frozen CLIP are, and a click."""

    checkpoint: Path = flag(Path("runs/point_clip/best.pt"), "file that point_clip/train.py wrote")
    clip_model: str | None = flag(None, "where a frozen CLIP's weights are now (default: where they were in training)")
    point: tuple | None = flag(None, "with --images: the click, X,Y in pixels of each photograph", parse=point)


def main() -> None:
    config = parse(Config, __doc__)
    if bool(config.images) != bool(config.point):
        raise InputError("--images and --point go together: what lies under which point?")

    # Heavy imports come after parsing, so that --help answers at once.
    from clip_seg.model import moved
    from dataset.perturbation import check_flags, make_damage
    from dataset.pet import is_synthetic, make_test_loader
    from point_clip.model import build_point_clip
    from point_clip.scoring import score_clicks
    from utils.distributed import join
    from utils.evaluation import segment_pictures
    from utils.helper import load_model

    check_flags(config)
    device = join(config.device)
    model, checkpoint = load_model(config.checkpoint, moved(build_point_clip, config.clip_model), "point_clip", device)
    if config.images:
        segment_pictures(model, checkpoint, config, device, point=config.point)
    else:
        size = checkpoint["config"]["image_size"]
        loader, damage = make_test_loader(config, size), make_damage(config, size)
        score_clicks(model, checkpoint, loader, config, device, synthetic=is_synthetic(config.data), damage=damage)


if __name__ == "__main__":
    run_script(main)
