"""utils/predictor.py: the masks of one photograph, by every model that models.py knows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from models import MODELS
from tests.unit.test_models import CASES, Case, build
from utils.files import InputError
from utils.predictor import Predictor

SIZE = 32  # pixels of the model's image
WIDTH, HEIGHT = 50, 37  # of the photograph
POINT, OTHER = (41.0, 9.0), (7.0, 30.0)
KNOWN = [name for name, case in CASES.items() if case.model_name in MODELS]
PROMPTED = [name for name in KNOWN if CASES[name].model_name == "point_clip"]


def make_predictor(case: Case) -> Predictor:
    model = build(case)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch sets its statistics, so that the pixels of an untrained model differ
    case.call(model.train(), torch.rand(4, 3, SIZE, SIZE))
    table = MODELS[case.model_name].classes
    return Predictor(model.eval(), {"class_table": table.as_plain_dict(), "config": {"image_size": SIZE}})


@pytest.fixture
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return make_predictor(CASES[request.param])


def each_of(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("predictor", names, indirect=True)


@pytest.fixture
def photograph() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def points_of(predictor: Predictor) -> list[tuple[float, float]] | None:
    return [POINT] if predictor.prompted else None


def to_model_pixels(point: tuple[float, float]) -> Tensor:
    x, y = point
    return torch.tensor([[(x + 0.5) * SIZE / WIDTH - 0.5, (y + 0.5) * SIZE / HEIGHT - 0.5]])


def probabilities_by_hand(model: nn.Module, photograph: Image.Image, *clicks: Tensor) -> Tensor:
    pixels = np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        logits = F.interpolate(model(image, *clicks), (HEIGHT, WIDTH), mode="bilinear")[0]
    return logits.softmax(dim=0) if len(logits) > 1 else torch.cat([(-logits).sigmoid(), logits.sigmoid()])


@each_of(KNOWN)
def test_prediction_equals_calling_the_model(predictor, photograph):
    predictor.set_image(photograph)
    mask, probabilities = predictor.predict(points_of(predictor))
    clicks = [to_model_pixels(POINT)] if predictor.prompted else []
    expected = probabilities_by_hand(predictor.model, photograph, *clicks)
    assert expected.std(dim=(1, 2)).min() > 5e-4, "with equal pixels the comparison would say nothing about their place"
    torch.testing.assert_close(torch.from_numpy(probabilities), expected, atol=1e-5, rtol=0)
    assert mask.dtype == np.uint8 and mask.shape == (HEIGHT, WIDTH) and len(np.unique(mask)) > 1
    assert probabilities.dtype == np.float32 and len(probabilities) == len(predictor.class_table)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert (mask == probabilities.argmax(axis=0)).all()


@each_of(PROMPTED)
def test_points_far_apart_and_at_the_border(predictor, photograph):
    predictor.set_image(photograph)
    for point in [OTHER, (0, 0), (WIDTH - 1, 0), (WIDTH - 1, HEIGHT - 1)]:
        expected = probabilities_by_hand(predictor.model, photograph, to_model_pixels(point))
        found = torch.from_numpy(predictor.predict([point]).probabilities)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    change = predictor.predict([POINT]).probabilities - predictor.predict([OTHER]).probabilities
    assert np.abs(change).max() > 0.01, "if clicks changed nothing, the comparison would say nothing about their place"


@each_of(["point_clip-disk"])
def test_negative_click_in_any_order(predictor, photograph):
    predictor.set_image(photograph)
    expected = probabilities_by_hand(predictor.model, photograph, to_model_pixels(POINT), to_model_pixels(OTHER))
    for points, positive in (([POINT, OTHER], [True, False]), ([OTHER, POINT], [False, True])):
        found = torch.from_numpy(predictor.predict(points, positive).probabilities)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not np.array_equal(predictor.predict([POINT]).probabilities, found.numpy())


@each_of(["unet", "point_clip-disk"])
def test_photograph_as_picture_array_path_or_text(predictor, photograph, tmp_path):
    path = tmp_path / "photo.png"
    photograph.save(path)
    predictions = []
    for source in (photograph, np.asarray(photograph), path, str(path), photograph.convert("RGBA")):
        predictor.set_image(source)
        predictions.append(predictor.predict(points_of(predictor)))
    for mask, probabilities in predictions[1:]:
        assert np.array_equal(mask, predictions[0].mask)
        assert np.array_equal(probabilities, predictions[0].probabilities)


@each_of(["unet"])
def test_file_is_rotated_upright(predictor, photograph, tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise to show it upright
    photograph.save(path, exif=exif)
    predictor.set_image(path)
    with Image.open(path) as stored:
        upright = np.rot90(np.asarray(stored), -1)
    assert np.array_equal(np.asarray(predictor.picture), upright)
    assert predictor.predict().mask.shape == upright.shape[:2] == (WIDTH, HEIGHT)


@each_of(PROMPTED)
def test_photograph_is_encoded_once_for_many_clicks(predictor, photograph, monkeypatch):
    encode, images = predictor.model.encode, []
    monkeypatch.setattr(predictor.model, "encode", lambda image: images.append(image) or encode(image))
    passes: list[int] = []
    predictor.model.encoder.normalize.register_forward_hook(lambda *_: passes.append(1))
    predictor.set_image(photograph)
    for point in (POINT, OTHER, POINT):
        predictor.predict([point])
    heatmaps = 3 if predictor.model.encoding == "heatmap" else 0  # each passes through CLIP, too
    assert len(images) == 1 and len(passes) == 1 + heatmaps


@each_of(["unet", "point_clip-disk"])
def test_next_photograph_replaces_the_first(predictor, photograph):
    predictor.set_image(photograph.transpose(Image.Transpose.ROTATE_90))
    predictor.predict(points_of(predictor) and [(3, 4)])
    predictor.set_image(photograph)
    clicks = [to_model_pixels(POINT)] if predictor.prompted else []
    expected = probabilities_by_hand(predictor.model, photograph, *clicks)
    found = torch.from_numpy(predictor.predict(points_of(predictor)).probabilities)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@each_of(["point_clip-disk"])
@pytest.mark.parametrize("point", [(-1, 5), (WIDTH, 5), (5, HEIGHT), (math.nan, 5), (5, math.inf)])
def test_point_outside_the_photograph(predictor, photograph, point):
    predictor.set_image(photograph)
    with pytest.raises(InputError, match=rf"the point \(.*\) is not in the photograph, .* {WIDTH}x{HEIGHT} pixels"):
        predictor.predict([point])


@each_of(["point_clip-disk"])
def test_clicks_that_a_prompted_model_cannot_take(predictor, photograph):
    predictor.set_image(photograph)
    for points, positive in [
        (None, None),
        ([], None),
        ([POINT, OTHER], None),
        ([POINT], [False]),
        ([POINT, OTHER], [True]),
        ([POINT, OTHER, OTHER], [True, False, False]),
    ]:
        with pytest.raises(InputError, match="needs one positive click and takes at most one negative click"):
            predictor.predict(points, positive)


@each_of(["point_clip-heatmap"])
def test_heatmap_takes_no_negative_click(predictor, photograph):
    predictor.set_image(photograph)
    with pytest.raises(InputError, match="heatmap encoding takes no negative click; train one with disk"):
        predictor.predict([POINT, OTHER], [True, False])


@each_of(["unet"])
def test_clicks_are_refused_by_a_model_without_prompt(predictor, photograph):
    predictor.set_image(photograph)
    with pytest.raises(InputError, match="not prompted by clicks: leave the points out"):
        predictor.predict([POINT])


@each_of(["unet", "point_clip-disk"])
def test_photograph_comes_first(predictor):
    with pytest.raises(InputError, match="set_image comes before predict"):
        predictor.predict(points_of(predictor))


@each_of(["unet"])
def test_file_that_is_not_a_picture(predictor, tmp_path):
    (tmp_path / "photo.jpg").write_text("no picture")
    with pytest.raises(InputError, match=r"photo\.jpg: not a picture"):
        predictor.set_image(Path(tmp_path / "photo.jpg"))
