"""What every test.py shares: scores and pictures of a split, and masks for photographs without labels."""

from __future__ import annotations

import csv
import io
import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.config import TestConfig, to_json
from utils.dataset import CLASSES, encode_label, overlay, rescale_point, resize_image, to_rgb
from utils.distributed import gather, gather_samples, rank, world
from utils.files import PICTURE_SUFFIXES, InputError, atomic_path, load_picture, write_bytes, write_json
from utils.helper import describe_environment, to_device
from utils.metric import ConfusionMatrix, count_confusion, nan_mean, predict
from utils.plot import plot_confusion, plot_predictions
from utils.robustness import Damage, study_robustness

SYNTHETIC_NOTE = "synthetic drawings: the scores compare with nothing"


@dataclass
class Evaluation:
    """Confusion counts of each image (N, C, C), row = truth, in the order of the data set."""

    counts: Tensor
    class_names: Sequence[str]
    seconds: float
    names: Sequence[str]
    labels: Sequence[int]  # checksums: scores on different labels are not to be compared

    @property
    def total(self) -> ConfusionMatrix:
        return ConfusionMatrix(self.class_names, self.counts.sum(dim=0))

    @cached_property
    def image_iou(self) -> list[float]:
        """Mean IoU of each image, over the classes that its truth or prediction has."""
        return [nan_mean(ConfusionMatrix(self.class_names, counts).iou()) for counts in self.counts]

    def metrics(self) -> dict[str, Any]:
        """The scores over all images together, per image, and of predicting background everywhere."""
        per_image = sorted(
            iou for iou in self.image_iou if not math.isnan(iou)
        )  # NaN: an image of ignored pixels alone
        worst = per_image[: max(1, round(0.05 * len(per_image)))]
        return {
            "images": len(self.counts),
            "pixels": int(self.counts.sum()),
            **self.total.scores(),
            "per_image_iou": {"mean": nan_mean(per_image), "worst_5_percent": nan_mean(worst)},
            "baseline": {"name": f"all {self.class_names[0]}", **self.total.baseline().scores()},
        }

    def write_images(self, path: Path) -> None:
        """A CSV row per image: its mean IoU, the checksum of its label, and its pixels by truth/prediction."""
        pairs = [f"{truth}/{prediction}" for truth in self.class_names for prediction in self.class_names]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", "label", "iou", *pairs])
        for name, label, iou, counts in zip(self.names, self.labels, self.image_iou, self.counts):
            writer.writerow([name, f"{label:08x}", f"{iou:.4f}", *counts.flatten().tolist()])
        write_bytes(path, text.getvalue().encode())


# Predictions and targets (..., H, W) of each image of a batch on the device, at the size of the batch's labels.
Answer = Callable[[dict[str, Any]], Iterator[tuple[Tensor, Tensor]]]


def answer_classes(model: nn.Module) -> Answer:
    """The classes that a segmenter finds, and the labels: the logits are resized, not the labels."""

    def answer(batch: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        logits = model(batch["image"])
        for image_logits, label in zip(logits, batch["label"]):
            yield predict(resize_logits(image_logits[None], label.shape))[0], torch.as_tensor(label).to(logits.device)

    return answer


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    class_names: Sequence[str] = CLASSES,
    *,
    masks: Path | None = None,
) -> Evaluation:
    """Compare predictions with each batch's `label`; with `masks` they are also written there, as NAME.png.

    Every one of several processes returns the counts of all images.
    """
    model.eval()
    answer = answer_classes(model)
    began = time.perf_counter()
    rows: list[tuple[list[list[int]], int]] = []
    options = {"unit": "image", "leave": False, "disable": rank() != 0}
    with tqdm(total=len(loader.dataset), desc="test", **options) as bar, ThreadPoolExecutor() as pool:
        for batch in loader:
            answers = list(answer(to_device(batch, device)))
            counts = torch.stack([count_confusion(*pair, len(class_names)) for pair in answers])
            # Plain numbers: small tensors that stay would lie between the large ones, and memory would grow and grow.
            rows += zip(counts.tolist(), map(zlib.crc32, batch["label"]))
            if masks:
                found = [prediction.to(torch.uint8).cpu().numpy() for prediction, _ in answers]
                list(pool.map(save_mask, [masks / f"{name}.png" for name in batch["name"]], found))
            bar.update(len(answers) * world())
    names = [record.name for record in loader.dataset.records]
    counts, labels = zip(*gather_samples(loader, rows))
    return Evaluation(torch.tensor(counts), class_names, time.perf_counter() - began, names, labels)


def save_mask(path: Path, classes: np.ndarray) -> None:
    """Write classes (H, W) uint8 as an indexed picture, atomically."""
    with atomic_path(path) as temporary:
        encode_label(classes).save(temporary, "PNG", compress_level=1)


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, C, h, w) at `size` (H, W), bilinear."""
    return F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False)


@torch.inference_mode()
def segment(
    model: nn.Module,
    picture: Image.Image,
    image_size: int,
    device: torch.device,
    *,
    point: tuple[float, float] | None = None,
) -> np.ndarray:
    """Classes (H, W) uint8 of a picture at its own size; the model sees it at `image_size` x `image_size`.

    A model that is prompted gets `point`, x and y in pixels of the picture.
    """
    image = torch.from_numpy(resize_image(picture, image_size)).permute(2, 0, 1)[None]  # (1, 3, size, size)
    prompt = (
        []
        if point is None
        else [torch.tensor([rescale_point(*point, picture.size, (image_size, image_size))], device=device)]
    )
    logits = model(to_device({"image": image}, device)["image"], *prompt)
    return predict(resize_logits(logits, (picture.height, picture.width)))[0].to(torch.uint8).cpu().numpy()


def score(
    model: nn.Module,
    checkpoint: dict[str, Any],
    loader: DataLoader,
    config: TestConfig,
    device: torch.device,
    *,
    synthetic: bool,
    damage: Damage | None = None,
) -> dict[str, Any]:
    """Score a split, clean and then under `damage`, print the scores and return them.

    Writes metrics.json, images.csv, masks/, confusion.png, predictions.png, and what `utils.robustness` does.
    """
    out = results_folder(config)
    evaluation = evaluate(model, loader, device, masks=out / "masks")
    source = provenance(model, checkpoint, config, device, synthetic=synthetic)
    metrics = evaluation.metrics() | source | {"images_per_second": len(evaluation.counts) / evaluation.seconds}
    note = SYNTHETIC_NOTE if synthetic else ""
    if rank() == 0:
        evaluation.write_images(out / "images.csv")
        write_json(out / "metrics.json", metrics)
        plot_confusion(out / "confusion.png", evaluation.total.counts.numpy(), CLASSES, note)
        plot_examples(model, loader, evaluation.image_iou, out / "predictions.png", metrics["image_size"], device, note)
        title = f"{config.checkpoint} on {metrics['images']} images of {config.data / config.split}"
        print(format_scores(metrics, f"{title} ({note})" if note else title))
        print(f"{out / 'metrics.json'}\n{out / 'confusion.png'}\n{out / 'predictions.png'}")
    if damage:
        study_robustness(answer_classes(model), damage, device, CLASSES, out, source, note)
    return metrics


def plot_examples(
    model: nn.Module,
    loader: DataLoader,
    image_iou: Sequence[float],
    path: Path,
    size: int,
    device: torch.device,
    note: str,
) -> None:
    """The best, median and worst images: photograph, truth and prediction."""
    rows = []
    for place, index in pick_examples(image_iou):
        record = loader.dataset.records[index]
        photo = to_rgb(load_picture(record.image))
        caption = f"{place}: {record.name}\nmean IoU {image_iou[index]:.2f}"
        rows.append((caption, np.asarray(photo), record.load_label(), segment(model, photo, size, device)))
    plot_predictions(path, rows, note)


def provenance(
    model: nn.Module, checkpoint: dict[str, Any], config: TestConfig, device: torch.device, *, synthetic: bool
) -> dict[str, Any]:
    """What scores were made with, for metrics.json."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return {
        "score_size": config.score_size,
        "model": checkpoint["model_name"],
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "epoch": checkpoint["epoch"],
        "seed": checkpoint["config"]["seed"],
        "image_size": checkpoint["config"]["image_size"],
        "synthetic": synthetic,
        "config": to_json(config),
        "environment": describe_environment(device),
    }


def results_folder(config: TestConfig) -> Path:
    """The folder for the results of scoring a split, made where it is not there yet; older scores in it go."""
    out = config.out or config.checkpoint.parent / ("test" if config.split == "Test" else f"test_{config.split}")
    out.mkdir(parents=True, exist_ok=True)  # what is wrong with it should show before the work, not after
    for name in ("metrics.json", "robustness.json", "robustness.csv", "robustness.png"):
        (out / name).unlink(missing_ok=True)  # or a sweep of other images would stand beside the new scores
    return out


def pick_examples(scores: Sequence[float], each: int = 2) -> list[tuple[str, int]]:
    """(place, index) of the images whose score is best, median and worst, `each` of a kind, none twice, no NaN."""
    order = sorted((i for i, score in enumerate(scores) if not math.isnan(score)), key=lambda i: -scores[i])
    middle = max(0, (len(order) - each) // 2)
    picked: dict[int, str] = {}
    for place, indices in (("best", order[:each]), ("worst", order[-each:]), ("median", order[middle : middle + each])):
        for index in indices:
            picked.setdefault(index, place)
    return [(picked[index], index) for index in order if index in picked]


def format_scores(metrics: dict[str, Any], title: str) -> str:
    """The scores as a table in percent, with the trivial baseline below."""

    def line(name: str, scores: dict[str, Any], label: str) -> str:
        return f"  {name:22}" + "".join(f"{_percent(scores[kind][label]):>10}" for kind in ("iou", "dice", "accuracy"))

    lines = [title, f"  {'':22}{'IoU':>10}{'Dice':>10}{'accuracy':>10}"]
    lines += [line(name, metrics, name) for name in metrics["iou"]]
    lines.append(line(f"baseline, {metrics['baseline']['name']}", metrics["baseline"], "mean"))
    per_image = metrics["per_image_iou"]
    lines.append(
        f"  pixel accuracy {_percent(metrics['pixel_accuracy'])}, mean IoU per image {_percent(per_image['mean'])}, "
        f"of the worst 5 % {_percent(per_image['worst_5_percent'])}; scored at {metrics['score_size']} size"
    )
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def segment_pictures(
    model: nn.Module,
    checkpoint: dict[str, Any],
    config: TestConfig,
    device: torch.device,
    *,
    point: tuple[float, float] | None = None,
) -> None:
    """Write NAME_mask.png (indexed) and NAME_overlay.jpg for each of `config.images`, at the picture's own size.

    They go to `config.out`, or to test/images/ beside the checkpoint. Pictures are turned upright as their EXIF
    orientation says. Those that cannot be read are named in an InputError after all others are done. A model that is
    prompted gets the same `point` of each picture; its mask is 1 where the picture belongs to what lies under it.
    """
    out = config.out or config.checkpoint.parent / "test" / "images"
    paths = [path for path in find_pictures(config.images) if out.resolve() not in path.resolve().parents]
    if not paths:
        raise InputError(f"--images: the pictures lie in {out}, where the masks would go; choose another --out")
    problems: list[str] = []
    share = list(zip(paths, distinct_stems(paths)))[rank() :: world()]
    for path, stem in tqdm(share, desc="segment", unit="image", leave=False, disable=rank() != 0):
        try:
            picture = to_rgb(load_picture(path, upright=True))
            if point is not None and not (0 <= point[0] <= picture.width - 1 and 0 <= point[1] <= picture.height - 1):
                raise InputError(
                    f"{path}: the point {point} is not in it, it has {picture.width}x{picture.height} pixels"
                )
        except InputError as error:
            problems.append(str(error))
            continue
        classes = segment(model, picture, checkpoint["config"]["image_size"], device, point=point)
        save_mask(out / f"{stem}_mask.png", classes)
        with atomic_path(out / f"{stem}_overlay.jpg") as temporary:
            Image.fromarray(overlay(np.asarray(picture), classes)).save(temporary, "JPEG", quality=92)
    problems = gather(problems)
    if rank() == 0:
        print(f"{len(paths) - len(problems)} pictures segmented: {out}")
    if problems:
        raise InputError("could not be segmented:\n  " + "\n  ".join(problems))


def distinct_stems(paths: Sequence[Path]) -> list[str]:
    """The stem of each path, numbered where another has it: of cat.jpg and cat.png, or of two folders."""
    taken: set[str] = set()
    stems = []
    for path in paths:
        stem, copy = path.stem, 1
        while stem in taken:
            copy += 1
            stem = f"{path.stem}-{copy}"
        taken.add(stem)
        stems.append(stem)
    return stems


def find_pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """The files among `paths`, and every picture below the folders among them; InputError where there is none."""
    for path in paths:
        if path.is_dir():
            below = [
                file
                for file in sorted(path.rglob("*"))
                if file.suffix.lower() in PICTURE_SUFFIXES and file.name[0] != "." and file.is_file()
            ]
            if not below:
                raise InputError(f"--images: {path} holds no picture ({', '.join(sorted(PICTURE_SUFFIXES))})")
            yield from below
        elif path.is_file():
            yield path
        else:
            raise InputError(f"--images: {path} does not exist")
