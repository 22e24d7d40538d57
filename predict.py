"""python predict.py --checkpoint runs/unet/best.pt PHOTO_OR_FOLDER ... --out masks

Masks for photographs, at their own size, by any trained model: NAME_mask.png (classes as indices) and NAME_overlay.jpg,
and index.csv with the photograph of each mask. A model that is prompted by a click takes it as --point X,Y.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from utils.config import flag, parse, parse_point
from utils.script import run_script


@dataclass
class Config:
    """The flags."""

    photographs: list[Path] = flag(None, "photographs, or folders of photographs", positional=True)
    checkpoint: Path = flag(Path("runs/unet/best.pt"), "a checkpoint, or the folder of a run")
    out: Path = flag(Path("masks"), "folder for the masks")
    tta: Literal["none", "flip"] = flag("none", "flip: average the probabilities with those of the mirrored image")
    overwrite: bool = flag(False, "also replace masks of other photographs")
    point: tuple | None = flag(None, "click for a prompted model, X,Y in pixels of each photograph", parse=parse_point)
    clip_model: str | None = flag(None, "where a frozen CLIP's weights are now (default: where they were in training)")
    device: Literal["auto", "cpu", "cuda", "mps"] = flag("auto", "where to run the model")


def main() -> None:
    config = parse(Config, __doc__)

    from models import load_model
    from utils.distributed import init_distributed, print_once
    from utils.predictor import Predictor, predict_photographs, with_tta

    device = init_distributed(config.device)
    model, checkpoint = load_model(config.checkpoint, device, clip_model=config.clip_model)
    model = with_tta(model, config.tta)
    options = {"point": config.point, "overwrite": config.overwrite}
    print_once(predict_photographs(Predictor(model, checkpoint), config.photographs, config.out, **options))


if __name__ == "__main__":
    run_script(main)
