"""The lists of experiments that study/run.py trains; tests, benchmarks and docs iterate over them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """One training of a model with its own flags."""

    name: str
    model: str  # folder with train.py and test.py
    flags: tuple[str, ...] = ()
    starts_from: tuple[str, str, str] | None = None  # a flag; its value is this file of this experiment's run
    baseline: str | None = None  # experiment whose mIoU the report subtracts
    refuses: tuple[str, ...] = ()  # flags that train.py does not take together with `flags`


ENCODER = "reconstruction/best.pt"  # of an autoencoder's run

EXPERIMENTS = [
    Experiment("unet", "unet"),
    Experiment("autoencoder", "autoencoder"),
    Experiment("autoencoder-skips", "autoencoder", ("--skips",), ("--encoder", "autoencoder", ENCODER)),
    Experiment("clip", "clip_seg"),
    Experiment("clip-skips", "clip_seg", ("--skips",)),
    Experiment(
        "point-heatmap", "point_clip", ("--point-encoding", "heatmap"), ("--clip-seg", "clip", "best.pt"),
        refuses=("--base-channels",),
    ),
    Experiment(
        "point-disk", "point_clip", ("--point-encoding", "disk", "--skips"), ("--clip-seg", "clip-skips", "best.pt")
    ),
]  # fmt: skip

# Does pre-training help? Encoders trained with each reconstruction loss, beside an untrained one and the U-Net. Each
# encoder is frozen, under the report's head and under a head with skips.
PRETRAINING = [
    Experiment("random", "autoencoder", ("--encoder", "random")),
    Experiment("random-skips", "autoencoder", ("--encoder", "random", "--skips")),
    Experiment("mse", "autoencoder", ("--reconstruction-loss", "mse"), baseline="random"),
    Experiment("mse-skips", "autoencoder", ("--skips",), ("--encoder", "mse", ENCODER), "random-skips"),
    Experiment("ssim", "autoencoder", ("--reconstruction-loss", "ssim"), baseline="random"),
    Experiment("ssim-skips", "autoencoder", ("--skips",), ("--encoder", "ssim", ENCODER), "random-skips"),
    Experiment("edge", "autoencoder", ("--reconstruction-loss", "edge"), baseline="random"),
    Experiment("edge-skips", "autoencoder", ("--skips",), ("--encoder", "edge", ENCODER), "random-skips"),
    Experiment("unet", "unet"),
]

LISTS = {"models": EXPERIMENTS, "pretraining": PRETRAINING}
