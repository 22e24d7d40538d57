"""The sweep over perturbations, beside its forward passes alone and beside the report's way."""

from __future__ import annotations

from pathlib import Path

from benchmarks.timing import in_turn, spread


def bench_sweep(base: Path, repeats: int) -> dict:
    """The eight perturbations of a U-Net against its forward passes alone, and against the way of the report's code.

    That loaded the model and decoded every image again for each point of each curve; here for one point of three.
    """
    import torch

    from dataset.perturbation import PERTURBATIONS, make_damage
    from dataset.pet import make_test_loader
    from unet.model import UNet
    from utils.config import TestConfig
    from utils.dataset import resize_image, to_rgb
    from utils.evaluation import answer_classes, resize_logits
    from utils.files import load_picture
    from utils.helper import load_model, pick_device, save_checkpoint, to_device
    from utils.metric import count_confusion, predict
    from utils.robustness import passes, sweep

    device = pick_device("auto")
    channels, count = (64, 256) if device.type == "cuda" else (16, 4)
    config = TestConfig(data=base, limit=count, perturb=[], batch_size=min(32, count))
    model = UNet(base_channels=channels).to(device, memory_format=torch.channels_last).eval()
    path = base / "unet.pt"
    arguments = {"base_channels": channels}
    checkpoint = {"model_name": "unet", "model": model.state_dict(), "model_args": arguments, "config": {}}
    save_checkpoint(path, checkpoint)
    damage = make_damage(config, 256)
    ways, total = list(PERTURBATIONS.values()), passes(list(PERTURBATIONS.values()))
    batches = [to_device(batch, device) for batch in make_test_loader(config, 256)]
    images = sum(len(batch["image"]) for batch in batches)
    points = (ways[1], ways[2], ways[4])  # without chance, which the report's code drew once a run

    @torch.inference_mode()
    def forward_passes() -> None:
        for _ in range(total):
            for batch in batches:
                predict(model(batch["image"]))
        if device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def plain_points() -> None:
        for way in points:
            fresh, _ = load_model(path, UNet, "unet", device)
            for record in damage.loader.dataset.records:
                picture = resize_image(to_rgb(load_picture(record.image)), 256)
                damaged = way(torch.from_numpy(picture).permute(2, 0, 1)[None], 5)
                label = torch.from_numpy(record.load_label()).to(device)
                logits = fresh(to_device({"image": damaged}, device)["image"])
                count_confusion(predict(resize_logits(logits, label.shape))[0], label, 3).cpu()

    seconds = in_turn(
        repeats,
        sweep=lambda: sweep(answer_classes(model), damage, device, 3),
        forward_passes_alone=forward_passes,
        plain_points=plain_points,
    )
    pairs = list(zip(*seconds.values()))
    return {
        "device": str(device), "base_channels": channels, "image_size": 256, "images": images, "passes": total,
        **{f"{key}_seconds": spread(values, 2) for key, values in seconds.items()},
        "sweep_to_forward_passes": spread([sweep / alone for sweep, alone, _ in pairs]),
        "plain_to_sweep_per_pass": spread([plain / len(points) / (sweep / total) for sweep, _, plain in pairs], 2),
    }  # fmt: skip
