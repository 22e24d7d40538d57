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

# From the report's recipe to the strong one. A rung adds flags to those of another one: to the last that helped.
RUNGS = {
    "report": (None, ()),
    "ignore": ("report", ("--boundary", "ignore")),
    "cosine": ("ignore", ("--schedule", "cosine", "--warmup", "1", "--patience", "0")),
    "adamw": ("cosine", ("--optimizer", "adamw", "--lr", "1e-3", "--weight-decay", "0.01")),
    "dice": ("adamw", ("--loss", "cross-entropy+dice")),
    "jitter": ("dice", ("--augment", "jitter")),
    "average": ("adamw", ("--ema", "0.999")),
    "paste": ("average", ("--paste", "0.3")),
}


def make_ladder() -> list[Experiment]:
    """An experiment per rung, each compared with the one below."""
    ladder: dict[str, Experiment] = {}
    for name, (below, added) in RUNGS.items():
        flags = (*ladder[below].flags, *added) if below else added
        ladder[name] = Experiment(name, "unet", flags, baseline=below)
    return list(ladder.values())


# What the U-Net's options, losses and boundary modes bring, each alone on the strong recipe.
OPTIONS = {
    "strong": (), "residual": ("--residual",), "attention": ("--attention",), "deep": ("--deep-supervision",),
    "cross-entropy": ("--loss", "cross-entropy"), "balanced": ("--loss", "balanced"), "focal": ("--loss", "focal"),
    "boundary-background": ("--boundary", "background"), "boundary-object": ("--boundary", "object"),
    "boundary-class": ("--boundary", "class"),
}  # fmt: skip

LISTS = {
    "models": EXPERIMENTS,
    "pretraining": PRETRAINING,
    "ladder": make_ladder(),
    "options": [
        Experiment(name, "unet", ("--recipe", "strong", *flags), baseline="strong" if flags else None)
        for name, flags in OPTIONS.items()
    ],
}
