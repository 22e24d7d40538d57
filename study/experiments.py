"""The lists of experiments: what study/run.py trains, and what tests, benchmarks and docs iterate over."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Experiment:
    """One training of a model with its own flags.

    `starts_from` is (flag, experiment, file): the flag gets that file from the run of another experiment of the list,
    if it is trained too. `baseline` is the experiment whose mIoU the report subtracts. `refuses` are flags that
    train.py does not take together with `flags`.
    """

    name: str
    model: str  # folder with train.py and test.py
    flags: tuple[str, ...] = ()
    starts_from: tuple[str, str, str] | None = None
    baseline: str | None = None
    refuses: tuple[str, ...] = ()


MODELS = [
    Experiment("unet", "unet"),
    Experiment("autoencoder", "autoencoder"),
    Experiment(
        "autoencoder-skips", "autoencoder", ("--skips",),
        starts_from=("--encoder", "autoencoder", "reconstruction/best.pt"),
    ),
    Experiment("clip", "clip_seg"),
    Experiment("clip-skips", "clip_seg", ("--skips",)),
    Experiment(
        "point-heatmap", "point_clip", ("--point-encoding", "heatmap"), starts_from=("--clip-seg", "clip", "best.pt"),
        refuses=("--base-channels",),
    ),
    Experiment(
        "point-disk", "point_clip", ("--point-encoding", "disk", "--skips"),
        starts_from=("--clip-seg", "clip-skips", "best.pt"),
    ),
]  # fmt: skip


def _pretraining(encoder: str) -> list[Experiment]:
    """A frozen encoder under the report's head and under a head with skips; the second uses the first one's encoder."""
    if encoder == "random":
        first, shared = ("--encoder", "random"), None
    else:
        first, shared = ("--reconstruction-loss", encoder), ("--encoder", encoder, "reconstruction/best.pt")
    skips = (*first, "--skips") if encoder == "random" else ("--skips",)
    return [
        Experiment(encoder, "autoencoder", first, baseline="random" if shared else None),
        Experiment(f"{encoder}-skips", "autoencoder", skips, shared, baseline="random-skips" if shared else None),
    ]


# Does pre-training help? Encoders trained with each reconstruction loss, beside an untrained one and the U-Net.
PRETRAINING = [
    *(experiment for encoder in ("random", "mse", "ssim", "edge") for experiment in _pretraining(encoder)),
    Experiment("unet", "unet"),
]

LISTS = {"models": MODELS, "pretraining": PRETRAINING}
