"""utils/image.py: opening, converting and resizing pictures, and points that move with them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from utils.dataset import IGNORE
from utils.files import InputError
from utils.image import (
    PICTURE_SUFFIXES,
    find_pictures,
    load_picture,
    picture_size,
    rescale_point,
    resize_image,
    resize_mask,
    to_rgb,
)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def test_format_is_read_from_the_content(tmp_path, pixels):
    path = tmp_path / "png_inside.jpg"
    Image.fromarray(pixels).save(path, "PNG")
    np.testing.assert_array_equal(np.asarray(load_picture(path)), pixels)
    assert picture_size(path) == (30, 20)


def test_exif_orientation_is_applied_on_request(tmp_path, pixels):
    path, exif = tmp_path / "rotated.png", Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise to show it upright
    Image.fromarray(pixels).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_picture(path)), pixels)
    np.testing.assert_array_equal(np.asarray(load_picture(path, upright=True)), np.rot90(pixels, -1))


def test_error_names_a_file_that_is_not_a_picture(tmp_path, pixels):
    path = tmp_path / "bad.png"
    with pytest.raises(InputError, match=r"bad\.png: no such file"):
        load_picture(path)
    Image.fromarray(pixels).save(path)
    truncated = path.read_bytes()[:-600]
    for content, message in ((b"", "an empty file"), (b"text", "not a picture"), (truncated, "damaged or truncated")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=rf"bad\.png: {message}"):
            load_picture(path)


def test_picture_above_the_limit_of_pillow_is_refused(tmp_path, pixels, monkeypatch):
    path = tmp_path / "large.png"
    Image.fromarray(pixels).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 30)
    load_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 30 - 1)
    with pytest.raises(InputError, match=r"large\.png: larger than 0 megapixels; scale it down"):
        load_picture(path)


def test_pictures_are_found_by_suffix_below_folders(tmp_path):
    (tmp_path / "folder/below.jpg").mkdir(parents=True)
    wanted = [f"folder/below.jpg/{number}{suffix.upper()}" for number, suffix in enumerate(sorted(PICTURE_SUFFIXES))]
    for name in (*wanted, "folder/.hidden.png", "folder/notes.txt", "scan"):
        (tmp_path / name).touch()
    found = find_pictures([tmp_path / "scan", tmp_path / "folder"])
    assert found.files[0] == (tmp_path / "scan", Path("scan")), "a file that is named is taken, whatever its suffix"
    below = sorted(Path(name) for name in wanted)
    assert found.files[1:] == [(tmp_path / name, name.relative_to("folder")) for name in below]
    assert found.format_passed_over() == "2 passed over: 1 x file with suffix '.txt', 1 x hidden file"
    assert not find_pictures([tmp_path]).problems
    assert find_pictures([tmp_path / "nowhere"]).problems == [f"{tmp_path / 'nowhere'}: no such file or folder"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "CMYK"])
def test_every_mode_becomes_rgb(pixels, mode):
    picture = Image.fromarray(pixels).convert(mode)
    converted = to_rgb(picture)
    assert converted.mode == "RGB" and converted.size == picture.size


def test_sixteen_bit_grey_keeps_its_contrast():
    grey = Image.fromarray(np.array([[0, 200, 25_600, 65_535]], np.uint16))
    assert np.asarray(to_rgb(grey))[0, :, 0].tolist() == [0, 1, 100, 255]


def test_resized_image_and_mask_are_aligned():
    image = np.zeros((50, 90, 3), np.uint8)
    image[10:30, 20:70] = 255
    resized = resize_image(Image.fromarray(image), 32)
    mask = resize_mask((image[..., 0] > 0).astype(np.uint8), 32)
    assert resized.shape == (32, 32, 3) and resized.dtype == mask.dtype == np.uint8
    assert ((resized[..., 0] > 127) != (mask == 1)).mean() < 0.07


def test_resized_mask_has_no_new_classes():
    classes = np.zeros((40, 60), np.uint8)
    classes[:20, 30:], classes[20:, :30] = 2, IGNORE
    small = resize_mask(classes, 16)
    assert set(np.unique(small)) == {0, 2, IGNORE}
    assert (small[:8, 8:] == 2).all() and (small[8:, :8] == IGNORE).all()


@given(*[st.integers(1, 50)] * 4, st.floats(0, 1), st.floats(0, 1))
def test_rescaled_point_keeps_its_relative_place_and_returns(width, height, new_width, new_height, u, v):
    x, y = u * width - 0.5, v * height - 0.5
    moved = rescale_point(x, y, (width, height), (new_width, new_height))
    assert moved == pytest.approx((u * new_width - 0.5, v * new_height - 0.5))
    assert rescale_point(*moved, (new_width, new_height), (width, height)) == pytest.approx((x, y))


def test_point_stays_on_the_spot_that_it_marks():
    image = np.zeros((40, 60, 3), np.uint8)
    image[24:28, 30:36] = 255  # its center is at (32.5, 25.5)
    small = resize_image(Image.fromarray(image), 20)[..., 0].astype(float)
    y, x = (float((np.indices(small.shape)[axis] * small).sum() / small.sum()) for axis in (0, 1))
    assert rescale_point(32.5, 25.5, (60, 40), (20, 20)) == pytest.approx((x, y), abs=0.05)
