"""utils/predictor.py: the masks of one photograph, by every model that models.py knows."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from models import MODELS
from tests.unit.test_models import CASES, build
from unet.model import UNet
from utils.dataset import PETS
from utils.files import InputError
from utils.predictor import FlipAverage, Predictor

SIZE = 32  # pixels of the model's image
WIDTH, HEIGHT = 50, 37  # of the photograph
POINT, OTHER = (41.0, 9.0), (7.0, 30.0)
KNOWN = [name for name, case in CASES.items() if case.model_name in MODELS]
PROMPTED = [name for name in KNOWN if CASES[name].model_name == "point_clip"]


@pytest.fixture
def predictor(request) -> Predictor:
    case = CASES[request.param]
    model = build(case)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch sets its statistics, so that the pixels of an untrained model differ
    case.call(model.train(), torch.rand(4, 3, SIZE, SIZE))
    table = MODELS[case.model_name].classes
    return Predictor(model.eval(), {"class_table": table.as_plain_dict(), "config": {"image_size": SIZE}})


def each_of(*names: str):
    return pytest.mark.parametrize("predictor", names, indirect=True)


@pytest.fixture
def photograph() -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def points_of(predictor):
    return [POINT] if predictor.prompted else None


def to_model_pixels(x: float, y: float) -> Tensor:
    return torch.tensor([[(x + 0.5) * SIZE / WIDTH - 0.5, (y + 0.5) * SIZE / HEIGHT - 0.5]])


def by_hand(predictor: Predictor, photograph: Image.Image, *points: tuple[float, float]) -> Tensor:
    """The probabilities of the model itself, called with the positive and the negative click."""
    pixels = np.asarray(photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        logits = predictor.model(image, *(to_model_pixels(*point) for point in points))
        logits = F.interpolate(logits, (HEIGHT, WIDTH), mode="bilinear")[0]
    return logits.softmax(dim=0) if len(logits) > 1 else torch.cat([(-logits).sigmoid(), logits.sigmoid()])


def assert_close(found: np.ndarray, expected: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=0)


@each_of(*KNOWN)
def test_prediction_equals_calling_the_model(predictor, photograph):
    predictor.set_image(photograph)
    mask, probabilities = predictor.predict(points_of(predictor))
    expected = by_hand(predictor, photograph, *points_of(predictor) or ())
    assert expected.std(dim=(1, 2)).min() > 5e-4, "with equal pixels the comparison would say nothing about their place"
    assert_close(probabilities, expected)
    assert mask.dtype == np.uint8 and mask.shape == (HEIGHT, WIDTH) and len(np.unique(mask)) > 1
    assert probabilities.dtype == np.float32 and len(probabilities) == len(predictor.class_table)
    np.testing.assert_allclose(probabilities.sum(axis=0), 1, atol=1e-5)
    assert (mask == probabilities.argmax(axis=0)).all()


@each_of(*PROMPTED)
def test_points_far_apart_and_at_the_border(predictor, photograph):
    predictor.set_image(photograph)
    for point in [OTHER, (0, 0), (WIDTH - 1, 0), (WIDTH - 1, HEIGHT - 1)]:
        assert_close(predictor.predict([point]).probabilities, by_hand(predictor, photograph, point))
    change = predictor.predict([POINT]).probabilities - predictor.predict([OTHER]).probabilities
    assert np.abs(change).max() > 0.01, "if clicks changed nothing, the comparison would say nothing about their place"


@each_of("point_clip-disk")
def test_negative_click_in_any_order(predictor, photograph):
    predictor.set_image(photograph)
    for points, positive in (([POINT, OTHER], [True, False]), ([OTHER, POINT], [False, True])):
        found = predictor.predict(points, positive).probabilities
        assert_close(found, by_hand(predictor, photograph, POINT, OTHER))
    assert not np.array_equal(predictor.predict([POINT]).probabilities, found)


@each_of("unet", "point_clip-disk")
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


@each_of("unet")
def test_file_is_rotated_upright_or_refused(predictor, photograph, tmp_path):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise to show it upright
    photograph.save(path, exif=exif)
    predictor.set_image(path)
    with Image.open(path) as stored:
        upright = np.rot90(np.asarray(stored), -1)
    assert np.array_equal(np.asarray(predictor.picture), upright)
    assert predictor.predict().mask.shape == upright.shape[:2] == (WIDTH, HEIGHT)
    path.write_text("no picture")
    with pytest.raises(InputError, match=r"photo\.jpg: not a picture"):
        predictor.set_image(path)


@each_of(*PROMPTED)
def test_photograph_is_encoded_once_for_many_clicks(predictor, photograph, monkeypatch):
    encode, images = predictor.model.encode, []
    monkeypatch.setattr(predictor.model, "encode", lambda image: images.append(image) or encode(image))
    passes = []
    predictor.model.encoder.normalize.register_forward_hook(lambda *_: passes.append(1))
    predictor.set_image(photograph)
    for point in (POINT, OTHER, POINT):
        predictor.predict([point])
    heatmaps = 3 if predictor.model.encoding == "heatmap" else 0  # each passes through CLIP, too
    assert len(images) == 1 and len(passes) == 1 + heatmaps


@each_of("unet", "point_clip-disk")
def test_next_photograph_replaces_the_first(predictor, photograph):
    predictor.set_image(photograph.transpose(Image.Transpose.ROTATE_90))
    predictor.predict(points_of(predictor) and [(3, 4)])
    predictor.set_image(photograph)
    expected = by_hand(predictor, photograph, *points_of(predictor) or ())
    assert_close(predictor.predict(points_of(predictor)).probabilities, expected)


@each_of("point_clip-disk")
@pytest.mark.parametrize("point", [(-1, 5), (WIDTH, 5), (5, HEIGHT), (math.nan, 5), (5, math.inf)])
def test_point_outside_the_photograph(predictor, photograph, point):
    predictor.set_image(photograph)
    with pytest.raises(InputError, match=rf"the point \(.*\) is not in the photograph, .* {WIDTH}x{HEIGHT} pixels"):
        predictor.predict([point])


NUMBER = "needs one positive click and takes at most one negative click"


@pytest.mark.parametrize(
    ("predictor", "points", "positive", "message"),
    [
        ("point_clip-disk", None, None, NUMBER),
        ("point_clip-disk", [], None, NUMBER),
        ("point_clip-disk", [POINT, OTHER], None, NUMBER),
        ("point_clip-disk", [POINT], [False], NUMBER),
        ("point_clip-disk", [POINT, OTHER], [True], NUMBER),
        ("point_clip-disk", [POINT, OTHER, OTHER], [True, False, False], NUMBER),
        ("point_clip-heatmap", [POINT, OTHER], [True, False], "heatmap encoding takes no negative click; train one w"),
        ("unet", [POINT], None, "not prompted by clicks: leave the points out"),
    ],
    indirect=["predictor"],
)
def test_clicks_that_a_model_cannot_take(predictor, photograph, points, positive, message):
    predictor.set_image(photograph)
    with pytest.raises(InputError, match=message):
        predictor.predict(points, positive)


@each_of("unet", "point_clip-disk")
def test_photograph_comes_first(predictor):
    with pytest.raises(InputError, match="set_image comes before predict"):
        predictor.predict(points_of(predictor))


@each_of(*KNOWN)
def test_flip_average_is_the_mean_of_both_probabilities(predictor, photograph):
    """Also for clicks, which are mirrored with the image; the mean of an image and its mirror image is symmetric."""
    photograph = photograph.resize((SIZE, SIZE))  # the model's size: resizing comes after the mean
    mirrored = photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    points = [(20.0, 9.0)] if predictor.prompted else None
    other = points and [(SIZE - 1 - x, y) for x, y in points]
    predictor.set_image(photograph)
    plain = predictor.predict(points).probabilities
    predictor.set_image(mirrored)
    flipped = predictor.predict(other).probabilities[..., ::-1]
    average = Predictor(
        FlipAverage(predictor.model), CHECKPOINT | {"class_table": predictor.class_table.as_plain_dict()}
    )
    average.set_image(photograph)
    found = average.predict(points).probabilities
    np.testing.assert_allclose(found, (plain + flipped) / 2, atol=1e-4)
    average.set_image(mirrored)
    np.testing.assert_allclose(average.predict(other).probabilities[..., ::-1], found, atol=1e-3)
    assert not np.allclose(plain, flipped, atol=1e-3)


CHECKPOINT = {"config": {"image_size": SIZE}}


def test_logits_of_a_boundary_class_are_dropped(photograph):
    model = UNet(num_classes=4, base_channels=2).eval()
    model.head.bias.data[3] = 100  # the boundary everywhere
    predictor = Predictor(model, CHECKPOINT | {"class_table": PETS.as_plain_dict()})
    predictor.set_image(photograph)
    mask, probabilities = predictor.predict()
    assert mask.max() < 3 and probabilities.shape[0] == 3
