"""The one loop over a test set, and the scores and pictures that a test writes."""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from utils.config import TestConfig, as_plain_dict
from utils.dataset import PETS, ClassTable
from utils.distributed import (
    all_gather_objects,
    all_reduce_sum,
    autocast,
    init_distributed,
    pick_precision,
    print_once,
    rank,
    world_size,
)
from utils.figures import plot_pictures, save_figure
from utils.files import (
    InputError,
    acquire_lock,
    fit_name,
    format_csv,
    read_json,
    remove_leftovers,
    write_bytes,
    write_json,
)
from utils.helper import class_table_of, describe_environment, restore_model
from utils.image import load_picture, resize_image, resize_mask, to_rgb
from utils.loader import EpochBatchSampler, make_loader, prepare_batch
from utils.metric import ConfusionMatrix, count_boundary, count_confusion, logits_to_classes, nan_mean, with_mean
from utils.predictor import Predictor, predict_photographs, resize_logits, save_mask, with_tta
from utils.robustness import Variant, list_variants, summarize_robustness, write_robustness

SYNTHETIC_NOTE = "synthetic drawings: scores are not comparable to any benchmark"


SCORE_FILES = (
    "metrics.json", "images.csv", "confusion.png", "predictions.png", "robustness.json", "robustness.csv",
    "robustness.png",
)  # fmt: skip
MASK_SUFFIXES = ("", "_background")  # of saved masks: of the image or its pet, and of a click on the background


class ImagePrediction(NamedTuple):
    """Predicted and true classes of one image at its label's size; K = 1, or the number of clicks."""

    masks: Tensor  # (K, H, W)
    targets: Tensor  # (K, H, W), 255 = ignored
    suffixes: Sequence[str] = ("",)  # each mask is saved as NAME + suffix + ".png"; all are in MASK_SUFFIXES


# Yields the predictions of each image of a batch, in order. The batch is on the device: `image` (B, 3, H, W) in [0, 1];
# `label` and `name`, lists of B labels (H, W) and names; `perturbation`, its name or None for clean images.
PredictBatch = Callable[[dict[str, Any]], Iterator[ImagePrediction]]


def predict_classes(model: nn.Module, num_classes: int | None = None) -> PredictBatch:
    """Predictions of a segmenter. The logits are resized to the label's size; the label is not resized.

    Logits after the first `num_classes` are dropped: those of a boundary that was learned as a class of its own.
    """

    def predict(batch: dict[str, Any]) -> Iterator[ImagePrediction]:
        for logits, label in zip(model(batch["image"]), batch["label"]):
            logits = resize_logits(logits[None, :num_classes], label.shape)
            yield ImagePrediction(logits_to_classes(logits), label[None])

    return predict


@dataclass
class Evaluation:
    """Confusion counts of N images in V variants, row = truth, column = prediction; variant 0 is the clean image."""

    counts: Tensor  # (N, V, C, C) int64
    bands: Tensor  # (N, C, 2) int64: intersection and union of each class's bands (boundary IoU), clean images
    variants: Sequence[Variant]
    class_table: ClassTable
    seconds: float  # of the whole evaluation, loading included
    names: Sequence[str]
    labels: Sequence[int]  # checksums: scores on different labels must not be compared

    @property
    def total(self) -> ConfusionMatrix:
        """The counts of the clean images."""
        return ConfusionMatrix(self.class_table.names, self.counts[:, 0].sum(dim=0))

    @cached_property
    def image_iou(self) -> list[float]:
        """Mean IoU of each clean image, over the classes of its truth or prediction."""
        return [nan_mean(ConfusionMatrix(self.class_table.names, counts).iou()) for counts in self.counts[:, 0]]

    def boundary_iou(self) -> dict[str, float | None]:
        """Boundary IoU per class and as mean, over all clean images together; None = no such class."""
        both, either = self.bands.sum(dim=0).double().unbind(dim=1)
        return with_mean(self.class_table.names, (both / either).tolist())  # 0 / 0 is NaN

    def metrics(self) -> dict[str, Any]:
        """The scores of all clean images together, the mean IoU per image, and the scores of the baseline."""
        per_image = sorted(iou for iou in self.image_iou if not math.isnan(iou))  # NaN: all pixels are ignored
        worst = per_image[: max(1, round(0.05 * len(per_image)))]
        return {
            "images": len(self.counts),
            "pixels": int(self.counts[:, 0].sum()),
            **self.total.scores(),
            "boundary_iou": self.boundary_iou(),
            "per_image_iou": {"mean": nan_mean(per_image), "worst_5_percent": nan_mean(worst)},
            "baseline": {"name": f"all {self.class_table.names[0]}", **self.total.baseline().scores()},
        }

    def images_csv(self) -> bytes:
        """A row per clean image: its mean IoU, the checksum of its label, and its pixels by truth/prediction."""
        pairs = [f"{truth}/{prediction}" for truth in self.class_table.names for prediction in self.class_table.names]
        images = zip(self.names, self.labels, self.image_iou, self.counts[:, 0])
        rows = [[name, f"{label:08x}", f"{iou:.4f}", *counts.flatten().tolist()] for name, label, iou, counts in images]
        return format_csv(["name", "label", "iou", *pairs], rows)


@torch.inference_mode()
def evaluate(
    predict_batch: PredictBatch,
    test_set: Dataset,
    device: torch.device,
    *,
    batch_size: int = 32,
    workers: int | None = None,
    class_table: ClassTable | None = None,
    masks: Path | None = None,
) -> Evaluation:
    """Count predictions against targets for every image of `test_set`, clean and under its perturbations.

    Each image is loaded once. The targets have the classes of `class_table` (default: the data set's). The
    predictions of the clean images are written to the folder `masks`, if given. Every rank returns the counts of all
    images. The data set has `names`, `class_table` and `perturbations`; its items have `image`, `label`, `name` and
    `noise/*`.
    """
    names, variants, began = test_set.names, list_variants(test_set.perturbations), time.perf_counter()
    if len(names) < world_size():
        raise InputError(f"{len(names)} images cannot be shared by {world_size()} processes: start fewer")
    class_table = class_table or test_set.class_table
    size = len(class_table)
    counts = torch.zeros(len(names), len(variants), size, size, dtype=torch.int64)
    bands = torch.zeros(len(names), size, 2, dtype=torch.int64)
    checksums = torch.zeros(len(names), dtype=torch.int64)
    index_of = {name: index for index, name in enumerate(names)}
    sampler = EpochBatchSampler(len(names), batch_size * world_size(), shuffle=False)
    loader = make_loader(test_set, sampler, workers, device)
    bar = tqdm(total=len(names) * len(variants), desc="test", unit="image", leave=False, disable=rank() != 0)
    with bar, ThreadPoolExecutor() as pool:
        for batch in loader:
            indices = [index_of[name] for name in batch["name"]]
            checksums[indices] = torch.tensor([zlib.crc32(label) for label in batch["label"]])
            batch["label"] = [torch.from_numpy(label).to(device) for label in batch["label"]]
            batch |= {key: batch[key].to(device) for key in batch if key == "image" or key.startswith("noise/")}
            for number, variant in enumerate(variants):
                perturbation = None if variant.perturbation is None else variant.perturbation.name
                inputs = {**batch, "image": variant.apply(batch), "perturbation": perturbation}
                predictions = list(predict_batch(prepare_batch(inputs, device)))
                tables = [count_confusion(image.masks, image.targets, size) for image in predictions]
                counts[indices, number] = torch.stack(tables).cpu()
                if variant.perturbation is None:
                    bands[indices] = torch.stack(list(pool.map(partial(count_bands, num_classes=size), predictions)))
                if masks and variant.perturbation is None:
                    files = [
                        (masks / fit_name(name, f"{suffix}.png"), mask.to(torch.uint8).cpu().numpy(), class_table)
                        for name, prediction in zip(batch["name"], predictions)
                        for suffix, mask in zip(prediction.suffixes, prediction.masks)
                    ]
                    list(pool.map(lambda file: save_mask(*file), files))  # `list` waits, and raises errors
                bar.update(len(indices) * world_size())
    counts, bands, checksums = (all_reduce_sum(part.to(device)).cpu() for part in (counts, bands, checksums))
    return Evaluation(counts, bands, variants, class_table, time.perf_counter() - began, names, checksums.tolist())


def count_bands(prediction: ImagePrediction, num_classes: int) -> Tensor:
    """The pixels (num_classes, 2) of `count_boundary`, summed over the masks of an image."""
    pairs = zip(prediction.masks.cpu().numpy(), prediction.targets.cpu().numpy())
    tables = [count_boundary(mask, target, num_classes) for mask, target in pairs]
    return torch.from_numpy(sum(tables, np.zeros((num_classes, 2), np.int64)))


class ModelTest(NamedTuple):
    """A model, its checkpoint, and the test set that `config` selects: everything that a score depends on."""

    model: nn.Module
    checkpoint: dict[str, Any]
    test_set: Dataset
    config: TestConfig
    device: torch.device
    precision: str = "fp32"

    @property
    def averaged(self) -> nn.Module:
        """The model, with `--tta flip` averaged over the image and its mirror image."""
        return with_tta(self.model, self.config.tta)

    @property
    def note(self) -> str:
        """A warning for titles if the images are drawings, else ""."""
        return SYNTHETIC_NOTE if self.test_set.synthetic else ""

    def evaluate(self, predict_batch: PredictBatch, class_table: ClassTable) -> Evaluation:
        """Delete earlier scores, then `evaluate` with masks. InputError if the checkpoint has other classes."""
        trained, config = class_table_of(self.checkpoint).names, self.config
        if trained != class_table.names:
            found = f"{config.data} has {', '.join(class_table.names)}"
            raise InputError(f"{config.checkpoint} was trained on the classes {', '.join(trained)}, {found}")
        options = {"batch_size": config.batch_size, "workers": config.workers, "masks": config.results / "masks"}
        if rank() == 0:
            clear_results(config.results, self.test_set.names)
        all_gather_objects([])  # no rank writes masks before rank 0 has deleted the earlier ones
        return evaluate(predict_batch, self.test_set, self.device, class_table=class_table, **options)

    def write(self, evaluation: Evaluation, metrics: dict[str, Any], title: str, details: Sequence[str] = ()) -> str:
        """Write metrics.json, images.csv and, if perturbed, robustness files; returns scores and `details` as text."""
        config, checkpoint, out = self.config, self.checkpoint, self.config.results
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.model.parameters()]
        about = {
            "score_size": config.score_size,
            "model": checkpoint["model_name"],
            "parameters": sum(size for size, _ in sizes),
            "trained_parameters": sum(size for size, trained in sizes if trained),
            "epoch": checkpoint["epoch"],
            "seed": checkpoint["config"]["seed"],
            "image_size": checkpoint["config"]["image_size"],
            "synthetic": self.test_set.synthetic,
            "images_per_second": len(evaluation.names) * len(evaluation.variants) / evaluation.seconds,
        }
        origin = {"config": as_plain_dict(config), "environment": describe_environment(self.device, self.precision)}
        write_bytes(out / "images.csv", evaluation.images_csv())
        write_json(out / "metrics.json", {**metrics, **about, **origin})
        title = f"{title} of {config.data / config.split}" + (f" ({self.note})" if self.note else "")
        text = [format_scores({**metrics, **about}, title), *details, str(out / "metrics.json")]
        if len(evaluation.variants) > 1:
            summary = summarize_robustness(evaluation.counts.sum(dim=0), evaluation.variants, evaluation.class_table)
            summary = {"images": metrics["images"], **about, "seconds": evaluation.seconds, **summary}
            text.append(write_robustness(out, summary, evaluation.class_table, self.note))
        return "\n".join(text)


def lock_results(folder: Path) -> ExitStack:
    """The lock of a folder of results; InputError when it cannot be written, or another test writes to it."""
    busy = f"{folder}: another test is writing there; wait for it, or choose another --out"
    try:
        (folder / "masks").mkdir(parents=True, exist_ok=True)
        return acquire_lock(folder / ".lock", timeout=0, busy=busy)
    except OSError as error:
        raise InputError(f"cannot write the results in {folder}: {error}. Choose another --out") from error


def clear_results(folder: Path, names: Sequence[str]) -> None:
    """Delete the scores and masks that an earlier test wrote to `folder`, and what a killed one left there.

    `.masks.json` lists the images whose masks a test writes, so that no other files are deleted. InputError, before
    anything is deleted, when a file is there that no test wrote.
    """
    masks, listed, metrics = folder / "masks", folder / ".masks.json", folder / "metrics.json"
    earlier = read_json(listed).get("images") if listed.exists() else []
    if not isinstance(earlier, list) or any(name != Path(str(name)).name for name in earlier):
        raise InputError(f"{listed} is not what a test wrote: choose another --out")
    tested = listed.exists() or (metrics.exists() and {"iou", "config"} <= read_json(metrics).keys())
    own = {fit_name(name, f"{suffix}.png") for name in earlier for suffix in MASK_SUFFIXES}
    written = [masks / fit_name(name, ".png") for name in names]
    written = [path for path in written if path.name not in own] if listed.exists() else written
    foreign = [] if tested else [folder / name for name in SCORE_FILES]
    foreign += [] if tested and not listed.exists() else written  # masks of earlier versions are in no list
    if found := [path for path in foreign if path.exists()]:
        raise InputError(f"{found[0]} is there already, and of no test: choose another --out")
    for part in (folder, masks):
        remove_leftovers(part)
    for path in [*(folder / name for name in SCORE_FILES), *(masks / name for name in own)]:
        path.unlink(missing_ok=True)
    write_json(listed, {"images": list(names)})


def score(test: ModelTest) -> str:
    """Score a segmenter, with masks/, confusion.png and predictions.png; returns the text of `ModelTest.write`."""
    class_table, records, out = test.test_set.class_table, test.test_set.records, test.config.results
    evaluation = test.evaluate(predict_classes(test.averaged, len(class_table)), class_table)
    if rank() != 0:
        return ""
    save_figure(plot_confusion(evaluation.total.counts.numpy(), class_table.names, test.note), out / "confusion.png")
    rows = []
    for place, index in pick_examples(evaluation.image_iou):
        mask = out / "masks" / fit_name(records[index].name, ".png")
        photo, label, prediction = example_arrays(records[index], mask, test.config.score_size)
        caption = f"{place}: {records[index].name}\nmean IoU {evaluation.image_iou[index]:.2f}"
        rows.append((caption, [photo, class_table.overlay(photo, label), class_table.overlay(photo, prediction)]))
    figure = plot_pictures(rows, ("photograph", "truth", "prediction"), test.note, class_table)
    save_figure(figure, out / "predictions.png")
    files = [str(out / name) for name in ("confusion.png", "predictions.png")]
    return test.write(evaluation, evaluation.metrics(), f"{test.config.checkpoint} on {len(records)} images", files)


def run_test(
    config: TestConfig,
    build: Callable[..., nn.Module],
    model_name: str,
    make_test_set: Callable[[TestConfig, int], Dataset],
    *,
    scoring: Callable[[ModelTest], str] = score,
    default_classes: ClassTable = PETS,
) -> None:
    """The body of every test.py: rebuild the model, score the split or segment `--images`, and print the result.

    `build(**model_args)` makes the network, `make_test_set(config, image_size)` the data, `scoring(test)` the text.
    """
    device = init_distributed(config.device, config.threads)
    precision = pick_precision(config.precision, device)
    model, checkpoint = restore_model(config.checkpoint, build, model_name, device, default_classes=default_classes)
    with autocast(device, precision):
        if config.images:
            point = getattr(config, "point", None)  # of a prompted model
            options = {"point": point, "overwrite": config.overwrite}
            model = with_tta(model, config.tta)
            text = predict_photographs(Predictor(model, checkpoint), config.images, config.results, **options)
        else:
            test_set = make_test_set(config, checkpoint["config"]["image_size"])
            with lock_results(config.results) if rank() == 0 else nullcontext():
                text = scoring(ModelTest(model, checkpoint, test_set, config, device, precision))
    print_once(text)


def example_arrays(record: Any, mask: Path, score_size: str | int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photograph (H, W, 3), label and predicted mask (H, W) of an example at the size of the scores."""
    photo, label = to_rgb(load_picture(record.image)), record.load_label()
    prediction = np.asarray(load_picture(mask))
    if score_size == "native":
        return np.asarray(photo), label, prediction
    return resize_image(photo, score_size), resize_mask(label, score_size), prediction


def pick_examples(scores: Sequence[float], each: int = 2) -> list[tuple[str, int]]:
    """(place, index) of `each` images with the best, median and worst scores, best first; none twice, none with NaN."""
    order = sorted((i for i, score in enumerate(scores) if not math.isnan(score)), key=lambda i: -scores[i])
    middle = max(0, (len(order) - each) // 2)
    picked = dict.fromkeys(order[middle : middle + each], "median")
    picked |= dict.fromkeys(order[-each:], "worst") | dict.fromkeys(order[:each], "best")
    return [(picked[index], index) for index in order if index in picked]


def format_scores(metrics: dict[str, Any], title: str) -> str:
    """The scores as a table in percent, with the baseline below."""

    def line(name: str, scores: dict[str, Any], label: str) -> str:
        kinds = ("iou", "dice", "accuracy", "boundary_iou")
        return f"  {name:22}" + "".join(f"{_percent(scores.get(kind, {}).get(label)):>14}" for kind in kinds)

    lines = [title, f"  {'':22}" + "".join(f"{head:>14}" for head in ("IoU", "Dice", "accuracy", "boundary IoU"))]
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


def plot_confusion(counts: np.ndarray, class_names: Sequence[str], title: str = "") -> Figure:
    """The confusion matrix (C, C), row = truth: share of each true class, and millions of pixels."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size, ticks = len(class_names), range(len(class_names))
    figure = Figure(figsize=(1.6 + 1.1 * size, 1.2 + 1.0 * size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(size, size):
        color = "white" if share[row, column] > 0.5 else "black"
        text = f"{share[row, column]:.1%}\n{counts[row, column] / 1e6:.2f} M px"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    axis.set(xticks=ticks, xticklabels=class_names, yticks=ticks, yticklabels=class_names)
    axis.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle(title, fontsize=8)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    return figure
