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
from utils.files import InputError


@dataclass
class Config(TestConfig):
    """The shared flags, and where the decoder is."""

    checkpoint: Path = flag(
        Path("runs/autoencoder/segmentation/best.pt"), "file of the second stage of autoencoder/train.py"
    )
    reconstruction: Path | None = flag(
        None, "file of the first stage (default: the --encoder of the training, or reconstruction/best.pt of its run)"
    )


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers at once.
    from autoencoder.model import LEVELS, Autoencoder, build_segmenter
    from autoencoder.reconstruction import score_reconstruction
    from dataset.perturbation import check_flags, make_damage
    from dataset.pet import is_synthetic, make_test_loader
    from utils.distributed import join, rank
    from utils.evaluation import results_folder, score, segment_pictures
    from utils.helper import load_model

    check_flags(config)
    device = join(config.device)
    segmenter, checkpoint = load_model(config.checkpoint, build_segmenter, "autoencoder", device)
    if config.images:
        segment_pictures(segmenter, checkpoint, config, device)
        return
    encoder = checkpoint["config"]["encoder"]
    own = config.checkpoint.absolute().parent.parent / "reconstruction" / "best.pt"
    first = config.reconstruction or (Path(encoder) if encoder else own)
    autoencoder = None
    if encoder == "random" or (config.reconstruction is None and not first.exists()):
        why = "the encoder was never trained" if encoder == "random" else f"{first} is not there"
        if rank() == 0:
            print(f"the reconstruction is not scored: {why}", file=sys.stderr)
    else:
        autoencoder, _ = load_model(first, Autoencoder, "autoencoder/reconstruction", device)
        state = autoencoder.encoder.state_dict()
        if any(not value.equal(state[key]) for key, value in segmenter.encoder.state_dict().items()):
            raise InputError(
                f"{first} holds another encoder than {config.checkpoint}: give its own as --reconstruction"
            )
    size = checkpoint["config"]["image_size"]
    loader, damage = make_test_loader(config, size), make_damage(config, size)
    if autoencoder is not None:
        score_reconstruction(
            autoencoder, loader, device, results_folder(config), factor=2**LEVELS, details={"checkpoint": str(first)}
        )
    score(segmenter, checkpoint, loader, config, device, synthetic=is_synthetic(config.data), damage=damage)


if __name__ == "__main__":
    run_script(main)
