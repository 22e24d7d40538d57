"""python autoencoder/train.py --data Dataset --out runs/autoencoder

Learn features by reconstruction, then train a segmentation head on the frozen encoder (report section 4). Each stage
has its own run folder, OUT/reconstruction and OUT/segmentation.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import TrainConfig, as_plain_dict, flag, parse, weighted_sum
from utils.files import InputError, write_json
from utils.script import run_script


def parse_reconstruction_loss(text: str) -> str:
    """A weighted sum of the losses of autoencoder/reconstruction.py."""
    from autoencoder.reconstruction import LOSSES  # imports torch, which a script that was given the flag needs anyway

    weighted_sum(text, LOSSES)
    return text


@dataclass
class Config(TrainConfig):
    """The shared flags, which apply to the second stage, and the autoencoder's own."""

    out: Path = flag(Path("runs/autoencoder"), "folder of this run")
    lr: float = flag(1e-3, "learning rate of the head", low=0)
    pretrain_epochs: int = flag(50, "maximum number of epochs of the reconstruction", low=1)
    pretrain_lr: float = flag(1e-3, "learning rate of the reconstruction", low=0)
    pretrain_min_delta: float = flag(1e-5, "--min-delta of the reconstruction, whose losses are smaller", low=0)
    reconstruction_loss: str = flag(
        "mse", "a loss of autoencoder/reconstruction.py, or a weighted sum such as mse+0.5*ssim",
        parse=parse_reconstruction_loss,
    )  # fmt: skip
    encoder: str | None = flag(
        None,
        "do not pre-train: freeze the encoder of this OUT/reconstruction/best.pt, or 'random' for an untrained one",
    )
    skips: bool = flag(False, "a head that also uses the encoder's two finer feature maps")
    base_channels: int = flag(
        64, "channels of the encoder's first block; the next two have 2 and 4 times as many", low=2
    )


def main() -> None:
    config = parse(Config, __doc__)

    # Heavy imports come after parsing, so that --help answers immediately.
    from autoencoder.model import Autoencoder, AutoencoderSegmenter, Encoder
    from autoencoder.reconstruction import LOSSES
    from dataset.pet import make_train_sets
    from utils.loss import WeightedLoss, make_criterion
    from utils.run import lock_folder, refuse_another_run, start_run
    from utils.train import StepOutput, fit

    reconstruction_criterion = WeightedLoss(config.reconstruction_loss, LOSSES)

    def reconstruct(model, batch):
        return StepOutput(reconstruction_criterion(model(batch["image"]), batch["image"]))

    def segment(model, batch):
        logits = model(batch["image"])
        return StepOutput(criterion(logits, batch["mask"]), logits, batch["mask"])

    if (config.out / "last.pt").exists():
        raise InputError(f"{config.out} is one stage of a run: give the whole run, --out {config.out.parent}")
    refuse_another_run(config)
    own = {"epochs": config.pretrain_epochs, "lr": config.pretrain_lr, "min_delta": config.pretrain_min_delta}
    own["warmup"] = min(config.warmup, config.pretrain_epochs / 2)
    pretraining = dataclasses.replace(config, out=config.out / "reconstruction", **own)
    training = dataclasses.replace(config, out=config.out / "segmentation")
    second_stage_began = (training.out / "last.pt").exists()

    run = start_run(pretraining, "autoencoder/reconstruction")
    train_set, val_set = make_train_sets(config)
    model_args = {"base_channels": config.base_channels}
    encoder = None
    if config.encoder == "random":
        encoder = Encoder(**model_args)
    elif config.encoder is not None:
        encoder = load_encoder(Path(config.encoder), config)
    elif second_stage_began and config.resume and not (pretraining.out / "best.pt").exists():
        missing = f"{pretraining.out / 'best.pt'}, the encoder that it depends on, is missing"
        raise InputError(f"--resume: {training.out} has begun, but {missing}: put it back, or use another --out")
    if run.is_main:
        _lock = lock_folder(config.out)  # until this process ends
        write_json(config.out / "config.json", as_plain_dict(config))
    if encoder is None:
        if not second_stage_began:
            fit(Autoencoder(**model_args), reconstruct, train_set, val_set, run, model_args)
        encoder = load_encoder(pretraining.out / "best.pt", config)

    run = start_run(training, "autoencoder")  # seeds again: the head is the same with or without a first stage
    criterion, num_classes = make_criterion(config, train_set)
    options = {"num_classes": num_classes, "skips": config.skips}
    fit(AutoencoderSegmenter(encoder, **options), segment, train_set, val_set, run, model_args | options)


def load_encoder(path: Path, config: Config):
    """The encoder of a first stage's checkpoint. InputError when it has another width than `config` asks for."""
    import torch

    from autoencoder.model import Autoencoder
    from utils.helper import restore_model

    model, checkpoint = restore_model(path, Autoencoder, "autoencoder/reconstruction", torch.device("cpu"))
    width = checkpoint["model_args"]["base_channels"]
    if width != config.base_channels:
        found = f"{path} holds an encoder of {width} base channels, expected {config.base_channels}"
        raise InputError(f"{found}: give --base-channels {width}")
    return model.encoder


if __name__ == "__main__":
    run_script(main)
