"""ViT-B/32: preparation of images beside CLIP's own processors, clicks, training with it frozen and not."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.timing import in_turn, spread


def bench_clip(repeats: int) -> dict:
    """ViT-B/32 of full size with random weights: its preparation of images, clicks, and training with it frozen."""
    import torch
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from clip_seg.model import ClipSegmenter, make_encoder
    from point_clip.model import PointClip
    from utils.helper import to_device
    from utils.loss import cross_entropy

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    name = "openai/clip-vit-base-patch32"
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (32, 3, 256, 256), dtype=torch.uint8)
    images = to_device({"image": pictures}, device)["image"]

    def waiting(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            synchronize()

        return run

    encoder = make_encoder(name, frozen=True, random_init=True)[0].to(device).eval()
    bytewise = list(pictures)

    def process(processor: Callable, batch: object, **options: bool) -> Callable[[], None]:
        return waiting(lambda: processor(batch, return_tensors="pt", **options)["pixel_values"].to(device))

    # The report's way: inside `forward`, where a batch is of floats on the device; and from bytes on the host.
    preparation = in_turn(
        repeats,
        own=waiting(lambda: encoder.normalize(encoder.prepare(images))),
        pil_in_forward=waiting(lambda: process(CLIPImageProcessorPil(), list(images.cpu()), do_rescale=False)()),
        torchvision_in_forward=process(CLIPImageProcessor(), images, do_rescale=False),
        pil_of_bytes=process(CLIPImageProcessorPil(), bytewise),
        torchvision_of_bytes=process(CLIPImageProcessor(), bytewise),
    )

    clicks: dict[str, dict] = {}
    points = torch.rand(10, 2, device=device) * 255
    for encoding in ("disk", "heatmap"):
        model = PointClip(encoder, encoding=encoding).to(device, memory_format=torch.channels_last).eval()
        features = model.encode(images[:1])

        def click(count: int, model: PointClip = model) -> None:
            model.decode(model.encode(images[:1]), points[:count], (256, 256))

        with torch.inference_mode():
            seconds = in_turn(
                repeats,
                encode=waiting(lambda model=model: model.encode(images[:1])),
                decode=waiting(lambda model=model, features=features: model.decode(features, points[:1], (256, 256))),
                one_click=waiting(lambda click=click: click(1)),
                ten_clicks=waiting(lambda click=click: click(10)),
            )
        ratios = [ten / one for ten, one in zip(seconds["ten_clicks"], seconds["one_click"])]
        clicks[encoding] = {key: spread(values, 4) for key, values in seconds.items()} | {"ten_to_one": spread(ratios)}

    count = 32 if device.type == "cuda" else 4
    target = torch.randint(0, 3, (count, 256, 256), dtype=torch.uint8, device=device)
    steps: dict[str, Callable[[], None]] = {}
    kept: dict[str, float] = {}
    for kind in ("frozen", "unfrozen"):
        model = ClipSegmenter(make_encoder(name, frozen=kind == "frozen", random_init=True)[0])
        model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-6)

        def step(model: ClipSegmenter = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            cross_entropy(model(images[:count]), target).backward()
            optimizer.step()

        storages: dict[int, int] = {}  # what backward keeps in the encoder: activations, not the weights themselves
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor, storages: dict = storages, weights: set = weights) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            features = model.encoder(images[:count])
        del features
        kept[kind] = round(sum(storages.values()) / 2**20, 1)
        steps[kind] = waiting(step)
    training = in_turn(repeats, forward_alone=waiting(lambda: _without_gradients(encoder, images[:count])), **steps)
    return {
        "device": str(device),
        "preparation_of_32_images": {key: spread(values, 4) for key, values in preparation.items()}
        | {
            f"{key}_to_own": spread([a / b for a, b in zip(preparation[key], preparation["own"])], 2)
            for key in preparation
            if key != "own"
        },
        "clicks_on_one_image": clicks,
        "train_step": {"batch_size": count}
        | {f"{key}_seconds": spread(values, 4) for key, values in training.items()}
        | {"encoder_MiB_kept_for_backward": kept},
    }


def _without_gradients(module: Callable, images: object) -> None:
    import torch

    with torch.no_grad():
        module(images)
