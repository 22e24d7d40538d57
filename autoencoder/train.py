"""python autoencoder/train.py --data Dataset --out runs/autoencoder

Learn features by reconstruction, then train a segmentation head on the frozen encoder (report section 4). Each stage
has a run folder of its own, OUT/reconstruction and OUT/segmentation.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TrainConfig, flag, parse, run_script, weighted_terms
from utils.files import InputError


def reconstruction_loss(text: str) -> str:
    """A loss of autoencoder/reconstruction.py, or a weighted sum of them: "ssim", "mse+0.5*ssim"."""
    weighted_terms(text, ("mse", "ssim", "edge"))
    return text


@dataclass
class Config(TrainConfig):
    """The shared flags, which are the second stage's, and the autoencoder's own."""

    out: Path = flag(Path("runs/autoencoder"), "folder of this run")
    lr: float = flag(1e-3, "learning rate of the head, with Adam", low=0)
    pretrain_epochs: int = flag(50, "most passes over the training images for the reconstruction", low=1)
    pretrain_lr: float = flag(1e-3, "learning rate of the reconstruction", low=0)
    pretrain_min_delta: float = flag(1e-5, "--min-delta of the reconstruction, whose losses are smaller", low=0)
    reconstruction_loss: str = flag(
        "mse", "mse, ssim, edge or a weighted sum such as mse+0.5*ssim", parse=reconstruction_loss
    )
    encoder: str | None = flag(
        None,
        "do not pre-train: freeze the encoder of this OUT/reconstruction/best.pt, or 'random' for an untrained one",
    )
    skips: bool = flag(False, "a head that also takes the encoder's two finer feature maps")
    base_channels: int = flag(
        64, "channels of the encoder's first block; the next two have 2 and 4 times as many", low=2
    )


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers at once.
    import torch

    from autoencoder.model import Autoencoder, AutoencoderSegmenter, Encoder
    from autoencoder.reconstruction import ReconstructionLoss
    from dataset.pet import make_train_loaders
    from utils.batch_size import starting_cut
    from utils.dataset import CLASSES
    from utils.helper import load_model, seed_everything
    from utils.loss import SegmentationLoss
    from utils.train import StepOutput, claim_run, fit, make_accelerator

    reconstruction_criterion = ReconstructionLoss(config.reconstruction_loss)
    criterion = SegmentationLoss(config.loss, config.boundary)

    def reconstruct(model, batch):
        return StepOutput(reconstruction_criterion(model(batch["image"]), batch["image"]))

    def segment(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    def load_encoder(path):
        model, checkpoint = load_model(path, Autoencoder, "autoencoder/reconstruction", torch.device("cpu"))
        width = checkpoint["model_args"]["base_channels"]
        if width != config.base_channels:
            raise InputError(
                f"{path} holds an encoder of {width} base channels, expected {config.base_channels}: "
                f"give --base-channels {width}"
            )
        return model.encoder

    if (config.out / "last.pt").exists():
        raise InputError(f"{config.out} is one stage of a run: give the whole run, --out {config.out.parent}")
    accelerator = make_accelerator(config)
    cut = starting_cut(config)
    stage = dataclasses.replace(config, **({"batch_size": cut.batch_size, "accumulate": cut.accumulate} if cut else {}))
    first = dataclasses.replace(
        stage,
        out=config.out / "reconstruction",
        epochs=config.pretrain_epochs,
        lr=config.pretrain_lr,
        min_delta=config.pretrain_min_delta,
    )
    second = dataclasses.replace(stage, out=config.out / "segmentation")
    second_began = (second.out / "last.pt").exists()

    train_loader, val_loader, split = make_train_loaders(config)
    model_args = {"base_channels": config.base_channels}

    def train(model, step, config, model_name, model_args):
        fit(
            model,
            step,
            train_loader,
            val_loader,
            config,
            accelerator=accelerator,
            model_name=model_name,
            model_args=model_args,
            split=split,
        )

    encoder = None
    if config.encoder == "random":
        encoder = Encoder(**model_args)
    elif config.encoder is not None:
        encoder = load_encoder(Path(config.encoder))
    elif second_began and config.resume and not (first.out / "best.pt").exists():
        raise InputError(
            f"--resume: {second.out} has begun, but {first.out / 'best.pt'}, the encoder that it stands on, is gone. "
            "Put it back, or start anew with another --out"
        )
    if accelerator.is_main_process:
        claim_run(config, step=cut and cut._asdict())
    if encoder is None:
        if not second_began:
            train(Autoencoder(**model_args), reconstruct, first, "autoencoder/reconstruction", model_args)
        encoder = load_encoder(first.out / "best.pt")

    seed_everything(config.seed)  # the head starts the same whether or not the first stage ran in this process
    segmenter = AutoencoderSegmenter(encoder, len(CLASSES), skips=config.skips)
    options = {"num_classes": len(CLASSES), "skips": config.skips}
    train(segmenter, segment, second, "autoencoder", model_args | options)


if __name__ == "__main__":
    run_script(main)
