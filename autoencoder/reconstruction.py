"""How good a reconstruction is: the losses that train an autoencoder, and its scores and pictures.

Images are (B, 3, H, W) in [0, 1], H and W at least 11 (the window of SSIM).
"""

import logging
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from autoencoder.model import LEVELS, Autoencoder
from utils.distributed import all_reduce_sum, autocast, rank, world_size
from utils.evaluation import ModelTest, pick_examples, score
from utils.figures import plot_pictures, save_figure
from utils.files import InputError, write_json
from utils.helper import restore_model
from utils.loader import EpochBatchSampler, make_loader, prepare_batch
from utils.loss import image_mean

log = logging.getLogger(__name__)


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB (B,), at most 100 (equal images would be infinite)."""
    return -10 * (prediction - target).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of each image (B,), in [-1, 1] (Wang et al. 2004: Gaussian window of 11 px, sigma 1.5)."""
    _, local = structural_similarity_index_measure(prediction, target, data_range=1.0, return_full_image=True)
    return local[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # whole windows only, as in Wang et al.


def ssim_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - mean SSIM."""
    return 1 - ssim(prediction, target).mean()


def edge_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference between the image gradients, so that edges count and flat areas do not.

    A gradient is the difference to the next pixel, right and down. It does not determine the brightness of an image.
    Squared, because most gradients are nearly zero: training with absolute differences ended in uniform grey.
    """
    error = prediction - target
    return error.diff(dim=-1).square().mean() + error.diff(dim=-2).square().mean()


# The names that `--reconstruction-loss` knows. A loss takes prediction and target (B, 3, H, W).
LOSSES = {"mse": image_mean(F.mse_loss), "ssim": image_mean(ssim_loss), "edge": image_mean(edge_loss)}


def trivial_reconstructions(image: Tensor, mean_image: Tensor, factor: int) -> dict[str, Tensor]:
    """Reconstructions without learning: a mean image, each image's mean color, each image at 1/factor and back."""
    small = [max(1, edge // factor) for edge in image.shape[-2:]]
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    return {
        "mean image": mean_image.expand_as(image),
        "own mean color": image.mean(dim=(2, 3), keepdim=True).expand_as(image),
        f"bilinear {small[0]}x{small[1]}": resize(resize(image, small, antialias=True), image.shape[-2:]),
    }


def score_both(test: ModelTest) -> str:
    """Score the segmentation, and the reconstruction if the first stage's checkpoint is there; returns both as text."""
    autoencoder, path = find_autoencoder(test)
    text = score(test)
    return text if autoencoder is None else f"{score_reconstruction(autoencoder, path, test)}\n{text}"


def find_autoencoder(test: ModelTest) -> tuple[Autoencoder | None, Path]:
    """The autoencoder of the first stage, and its checkpoint: `--reconstruction`, or the file that the training used.

    None, with a warning, when the encoder was never trained or the file is missing. InputError when it holds another
    encoder than the tested model.
    """
    given, encoder = test.config.reconstruction, test.checkpoint["config"]["encoder"]
    path = given or Path(encoder or test.config.checkpoint.absolute().parent.parent / "reconstruction/best.pt")
    if encoder == "random" or (given is None and not path.exists()):
        reason = "the encoder was never trained" if encoder == "random" else f"{path} is missing"
        log.warning("the reconstruction is not scored: %s", reason)
        return None, path
    autoencoder, _ = restore_model(path, Autoencoder, "autoencoder/reconstruction", test.device)
    state = autoencoder.encoder.state_dict()
    if any(not value.equal(state[key]) for key, value in test.model.encoder.state_dict().items()):
        found = f"{path} holds another encoder than {test.config.checkpoint}"
        raise InputError(f"{found}: give the right file as --reconstruction")
    return autoencoder, path


@torch.inference_mode()
def score_reconstruction(model: nn.Module, path: Path, test: ModelTest) -> str:
    """Mean PSNR and SSIM of the reconstructions of `model`, from checkpoint `path`, and of the trivial ones, as text.

    Writes reconstruction.json and reconstructions.png (best, median and worst by PSNR). The mean image is that of the
    scored images: about the best that one picture for all of them can reach.
    """
    test_set, config, device, out = test.test_set, test.config, test.device, test.config.results
    sampler = EpochBatchSampler(len(test_set), config.batch_size * world_size(), shuffle=False)
    loader = make_loader(test_set, sampler, config.workers, device)
    total = sum(batch["image"].sum(dim=0, dtype=torch.int64) for batch in loader)
    mean_image = all_reduce_sum(total.to(device)) / (255 * len(test_set))
    index_of = {name: index for index, name in enumerate(test_set.names)}
    scores: dict[str, Tensor] = {}  # PSNR and SSIM of each image (N, 2)
    for batch in tqdm(loader, desc="reconstruct", leave=False, disable=rank() != 0):
        image, indices = prepare_batch(batch, device)["image"], [index_of[name] for name in batch["name"]]
        predictions = {"autoencoder": model(image), **trivial_reconstructions(image, mean_image, 2**LEVELS)}
        for name, prediction in predictions.items():
            table = scores.setdefault(name, torch.zeros(len(test_set), 2, device=device))
            with autocast(device, "fp32"):  # SSIM convolves; a score must not be rounded by --precision
                pair = [psnr(prediction.float(), image), ssim(prediction.float(), image)]
            table[indices] = torch.stack(pair, dim=1)
    scores = {name: all_reduce_sum(table).cpu() for name, table in scores.items()}
    if rank() != 0:
        return ""

    means = {name: dict(zip(("psnr", "ssim"), part.mean(dim=0).tolist())) for name, part in scores.items()}
    height, width = mean_image.shape[-2:]
    content = {"images": len(test_set), "size": [height, width], "mean": means, "checkpoint": str(path)}
    write_json(out / "reconstruction.json", content)
    rows, own = [], scores["autoencoder"][:, 0].tolist()
    for place, index in pick_examples(own):
        image = prepare_batch({"image": test_set[index]["image"][None]}, device)["image"]
        *_, bilinear = trivial_reconstructions(image, mean_image, 2**LEVELS).values()
        pictures = (torch.cat([image, model(image), bilinear]) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        rows.append((f"{place}: {test_set.records[index].name}\n{own[index]:.1f} dB", pictures.cpu().numpy()))
    headings = ("photograph", "reconstruction", f"{list(scores)[-1]} and back")
    save_figure(plot_pictures(rows, headings), out / "reconstructions.png")
    lines = [f"reconstruction of {len(own)} images at {height}x{width}:  PSNR (dB)      SSIM"]
    lines += [f"  {name:41}{part['psnr']:>8.2f}{part['ssim']:>10.3f}" for name, part in means.items()]
    return "\n".join([*lines, str(out / "reconstruction.json"), str(out / "reconstructions.png")])
