"""python clip_seg/test.py --checkpoint runs/clip_seg/best.pt --data Dataset

Score a model on CLIP features, or segment photographs of your own: python clip_seg/test.py --images PATH ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TestConfig, flag, parse, run_script


@dataclass
class Config(TestConfig):
    """The shared flags, and where the weights of a frozen CLIP are."""

    checkpoint: Path = flag(Path("runs/clip_seg/best.pt"), "file that clip_seg/train.py wrote")
    clip_model: str | None = flag(None, "where a frozen CLIP's weights are now (default: where they were in training)")


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers at once.
    from clip_seg.model import build_segmenter, moved
    from dataset.perturbation import check_flags, make_damage
    from dataset.pet import is_synthetic, make_test_loader
    from utils.distributed import join
    from utils.evaluation import score, segment_pictures
    from utils.helper import load_model

    check_flags(config)
    device = join(config.device)
    model, checkpoint = load_model(config.checkpoint, moved(build_segmenter, config.clip_model), "clip_seg", device)
    if config.images:
        segment_pictures(model, checkpoint, config, device)
    else:
        size = checkpoint["config"]["image_size"]
        loader, damage = make_test_loader(config, size), make_damage(config, size)
        score(model, checkpoint, loader, config, device, synthetic=is_synthetic(config.data), damage=damage)


if __name__ == "__main__":
    run_script(main)
