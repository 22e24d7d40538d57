"""Seconds of CLIP ViT-B/32 with random weights: preparation of images, clicks, a step with CLIP frozen and trained."""

from functools import partial
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.models import BATCH, Training, build_model
from benchmarks.timing import DEVICE, compare
from clip_seg.config import DEFAULT_CLIP
from clip_seg.model import ClipEncoder, ClipSegmenter, make_encoder
from study.experiments import EXPERIMENTS
from utils.loader import prepare_batch


def measure(_: Path, repeats: int) -> dict:
    pixels = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8)
    images = prepare_batch({"image": pixels}, DEVICE)["image"]
    frozen, trained = (make_encoder(DEFAULT_CLIP, frozen=f, random_init=True)[0].to(DEVICE) for f in (True, False))
    encoders = {"frozen": frozen, "trained": trained}
    pil, torchvision, options = CLIPImageProcessorPil(), CLIPImageProcessor(), {"return_tensors": "pt"}
    preparations = {  # on floats, as inside a model, and on bytes
        "ours": lambda: frozen.normalize(frozen.prepare(images)),
        "pil_floats": lambda: pil(list(images.cpu()), do_rescale=False, **options)["pixel_values"].to(DEVICE),
        "torchvision_floats": lambda: torchvision(images, do_rescale=False, **options),
        "pil_bytes": lambda: pil(list(pixels), **options)["pixel_values"].to(DEVICE),
        "torchvision_bytes": lambda: torchvision(list(pixels), **options)["pixel_values"].to(DEVICE),
    }
    figures = {"preparation_of_32_images": compare(repeats, preparations)}
    for experiment in (one for one in EXPERIMENTS if one.model == "point_clip"):
        clicked = partial(click, build_model(experiment).eval(), images[:1])
        figures[experiment.name] = compare(repeats, {f"clicks_{count}": partial(clicked, count) for count in (1, 10)})
    figures["MiB_for_backward"] = {name: kept_for_backward(one, images[:BATCH]) for name, one in encoders.items()}
    return figures | {"step": compare(repeats, {name: Training(ClipSegmenter(e), 1) for name, e in encoders.items()})}


@torch.inference_mode()
def click(model: torch.nn.Module, image: torch.Tensor, count: int) -> None:
    model.decode(model.encode(image), 255 * torch.rand(count, 2, device=DEVICE), (256, 256))


def kept_for_backward(encoder: ClipEncoder, images: torch.Tensor) -> float:
    """MiB of tensors that the encoder keeps for its backward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, torch.Tensor] = {}  # by address; they stay allocated, so that no address is used twice
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        encoder(images)
    sizes = [tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights]
    return round(sum(sizes) / 2**20, 1)
