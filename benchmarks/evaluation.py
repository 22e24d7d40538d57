"""Images per second and memory of a whole evaluation, against the forward passes alone, for every experiment."""

from functools import partial
from pathlib import Path
from timeit import Timer

import torch
from torch import nn

from benchmarks.models import build_model
from benchmarks.timing import DEVICE, compare
from dataset.pet import PetDataset, make_test_set
from dataset.pet_heatmap import read_points
from point_clip.model import PointClip
from point_clip.scoring import predict_clicks
from study.experiments import EXPERIMENTS
from tests.helpers import peak_memory
from utils.config import TestConfig
from utils.dataset import CLICKS
from utils.evaluation import ModelTest, evaluate, predict_classes
from utils.loader import collate, prepare_batch
from utils.robustness import list_variants

SIZE, IMAGES, PERTURBED_IMAGES = 256, 8, 2


def measure(base: Path, repeats: int) -> dict:
    test_set = make_test_set(TestConfig(data=base, limit=IMAGES), SIZE)
    figures = {"image_size": SIZE, "images": IMAGES}
    for experiment in EXPERIMENTS:
        figures[experiment.name] = measure_evaluation(build_model(experiment), test_set, min(repeats, 3))
    perturbed = make_test_set(TestConfig(data=base, limit=PERTURBED_IMAGES, perturb=[]), SIZE)
    unet = build_model(EXPERIMENTS[0])
    return figures | {"unet_all_perturbations": measure_evaluation(unet, perturbed, min(repeats, 3))}


def measure_evaluation(model: nn.Module, test_set: PetDataset, repeats: int) -> dict:
    """Load, perturb, predict and score at each image's own size, against the forward passes alone."""
    forward, predict, classes = model.eval().forward, predict_classes(model), test_set.class_table
    if isinstance(model, PointClip):
        test = ModelTest(model, {"config": {"image_size": test_set.size}}, test_set, TestConfig(), DEVICE)
        clicks = dict(zip(test_set.names, read_points(test_set.records)))
        forward, predict, classes = model.encode, predict_clicks(test, clicks, {}), CLICKS
    images, passes = prepare_batch(collate(list(test_set)), DEVICE)["image"], len(list_variants(test_set.perturbations))
    forward_passes = partial(Timer(partial(torch.inference_mode()(forward), images)).timeit, passes)
    evaluation = partial(evaluate, predict, test_set, DEVICE, batch_size=len(images), class_table=classes)
    ways, memory = {"forward_passes": forward_passes, "evaluation": evaluation}, peak_memory(DEVICE, evaluation)
    return {"evaluation": compare(repeats, ways, passes * len(images), rate=True), "evaluation_MiB": memory}
