"""Unusual photographs: valid ones are read, others are errors that name the file and do not stop the rest."""

import csv
import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from dataset.dataset_prep import prepare
from tests.helpers import left_out, photograph, raise_error, to_report_layout
from utils.files import InputError
from utils.helper import load_checkpoint
from utils.image import load_picture, to_rgb
from utils.predictor import predict_photographs

DEVICE_ERROR = Path("/proc/self/mem")  # reading it fails with EIO, even for root
needs_device_error = pytest.mark.skipif(not DEVICE_ERROR.exists(), reason="no /proc here")
TURNS = {tag: Image.Transpose(number) for tag, number in {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.items()}


# --- Errors of the machine are not damage of the file


def text_chunk() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    return info


def damaged_exif(path):
    photograph().save(path, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff garbage")


READABLE = {
    "text of 3 MB": lambda path: photograph().save(path, "PNG", pnginfo=text_chunk()),
    "color profile of 3 MB": lambda path: photograph().save(path, "PNG", icc_profile=bytes(3_000_000)),
    "damaged EXIF block": damaged_exif,
    "AVIF": lambda path: photograph().save(path, "AVIF"),
    "JPEG 2000": lambda path: photograph().save(path, "JPEG2000"),
    "CMYK": lambda path: photograph().convert("CMYK").save(path, "JPEG"),
}


@pytest.mark.parametrize("save", READABLE.values(), ids=READABLE)
def test_pictures_that_viewers_show_are_read(tmp_path, save):
    save(tmp_path / "picture.jpg")
    assert to_rgb(load_picture(tmp_path / "picture.jpg", upright=True)).size == (40, 30)


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(2000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEIC, r"a HEIC photograph.*convert to JPEG, or: pip install pillow-heif"),
        (b"", "an empty file; replace it with a picture"),
        (b"hello", "not a picture"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0" + bytes(99), "not a picture"),  # a film
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a picture|damaged"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(20), "not a picture|damaged"),
    ],
)
def test_unreadable_pictures_are_named_with_a_remedy(tmp_path, content, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.jpg: ({message})") as error:
        load_picture(path)
    assert "delete" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (OSError(errno.ESTALE, "Stale file handle"), OSError),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), TimeoutError),
        (MemoryError(), MemoryError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("place", ["open", "load"])
def test_errors_of_the_machine_name_the_file_and_are_not_called_damage(tmp_path, monkeypatch, error, kind, place):
    photograph().save(tmp_path / "a.png")
    if place == "open":
        monkeypatch.setattr(Image, "open", raise_error(error))
    else:
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", raise_error(error))
    with pytest.raises(kind, match=r"a\.png") as raised:
        load_picture(tmp_path / "a.png")
    assert not isinstance(raised.value, InputError) and "damaged" not in str(raised.value)


@needs_device_error
def test_a_checkpoint_on_a_failing_disk_is_not_called_truncated(tmp_path):
    (tmp_path / "best.pt").symlink_to(DEVICE_ERROR)
    with pytest.raises((OSError, InputError)) as error:
        load_checkpoint(tmp_path / "best.pt")
    assert "best.pt" in str(error.value) and "train again" not in str(error.value)


# --- One bad item does not stop the rest


def link_to_itself(path):
    path.symlink_to(path.name)


BAD_ITEMS = {
    "wide.png": lambda path: Image.new("RGB", (66_000, 2)).save(path),
    "n" * 246 + ".png": lambda path: photograph().save(path),
    "猫" * 78 + ".png": lambda path: photograph().save(path),
    "loop.png": link_to_itself,
    "broken.png": lambda path: path.symlink_to("nowhere"),
    "cut.png": lambda path: path.write_bytes(b"\x89PNG"),
    "disk.png": lambda path: path.symlink_to(DEVICE_ERROR),
}
LEGAL = list(BAD_ITEMS)[:3]  # unusual, but nothing is wrong with them


@needs_device_error
@pytest.mark.parametrize("name", BAD_ITEMS, ids=lambda name: name[:12])
def test_one_bad_photograph_is_named_and_the_others_are_segmented(predictor, tmp_path, name):
    (tmp_path / "in").mkdir()
    BAD_ITEMS[name](tmp_path / "in" / name)
    photograph().save(tmp_path / "in/z_after.png")
    if name in LEGAL:
        predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
        assert len(list((tmp_path / "out").glob("*_mask.png"))) == 2
        assert len(list((tmp_path / "out").glob("*_overlay.*"))) == 2
    else:
        with pytest.raises(InputError, match=rf"(?s)1 pictures segmented.*could not be segmented:.*{name}"):
            predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "out/z_after_mask.png").exists()
    with (tmp_path / "out/index.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all((tmp_path / "out" / row["mask"]).exists() for row in rows)


def test_a_photograph_that_does_not_fit_in_memory_is_named(predictor, tmp_path, monkeypatch):
    for name in ("a", "b"):
        photograph().save(tmp_path / f"{name}.png")
    real = predictor.predict
    calls = iter([RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), None])
    monkeypatch.setattr(predictor, "predict", lambda *args: (_ for _ in ()).throw(e) if (e := next(calls)) else real())
    with pytest.raises(InputError, match=r"(?s)1 pictures segmented.*a\.png: does not fit in memory"):
        predict_photographs(predictor, [tmp_path / "a.png", tmp_path / "b.png"], tmp_path / "out")


@needs_device_error
@pytest.mark.parametrize("name", ["loop", "broken", "disk", "猫" * 78, "n" * 246])
def test_one_bad_original_is_named_and_the_others_are_prepared(base, name):
    old, new = base / "images/synthetic_dog_1.jpg", base / f"images/{name}.jpg"
    usable = name[0] in "猫n"
    old.rename(new) if usable else old.unlink()
    if not usable:
        BAD_ITEMS[f"{name}.png"](new)
    (base / "annotations/trimaps/synthetic_dog_1.png").rename(base / f"annotations/trimaps/{name}.png")
    for path in (base / "annotations").glob("*.txt"):
        path.write_text(path.read_text("utf-8").replace("synthetic_dog_1 ", f"{name} "), "utf-8")
    report, _ = prepare(base)
    assert [row["file"] for row in report["failed"]] == ([] if usable else [f"images/{name}.jpg"])
    assert sum(report["counts"]["TrainVal"].values()) == 11 + usable
    assert prepare(base)[1] != usable, "tried again as long as it cannot be read"


# --- Transparent, 16-bit and turned photographs


def visible_pairs():
    picture = photograph()
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, (5, 5, 25, 25))
    seen = Image.new("RGB", picture.size, "white")
    seen.paste(picture, mask=alpha)
    for color in ("black", "lime"):
        hidden = Image.new("RGB", picture.size, color)
        hidden.paste(picture, mask=alpha)
        hidden.putalpha(alpha)
        yield f"RGBA over {color}", hidden, seen
    grey = picture.convert("L")
    yield "LA", Image.merge("LA", (grey, alpha)), Image.composite(grey, Image.new("L", grey.size, 255), alpha)
    indexed = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
    indexed.putpalette([9, 9, 9, 200, 100, 50])
    indexed.info["transparency"] = 0
    expected = Image.fromarray(np.array([[[255] * 3, [200, 100, 50]], [[200, 100, 50], [255] * 3]], np.uint8))
    yield "P with a transparent color", indexed, expected
    values = np.asarray(grey)
    for name, pixels in {
        "16 bits": values.astype(np.uint16) * 257,
        "12 of 16 bits": (values / 255 * 4095).round().astype(np.uint16),
        "8 of 16 bits": values.astype(np.uint16),
        "32 bits": values.astype(np.int32) * 257,
        "float in 0..1": values.astype(np.float32) / 255,
        "float in 0..255": values.astype(np.float32),
    }.items():
        yield name, Image.fromarray(pixels), grey


@pytest.mark.parametrize(
    ("picture", "seen"), [pair[1:] for pair in visible_pairs()], ids=[p[0] for p in visible_pairs()]
)
def test_pictures_that_look_alike_are_the_same_rgb(picture, seen):
    difference = np.asarray(to_rgb(picture)).astype(int) - np.asarray(seen.convert("RGB"))
    assert np.abs(difference).max() <= 1


def test_floats_a_little_above_one_do_not_turn_black():
    pixels = np.full((9, 9), 0.6, np.float32)
    pixels[0] = 1.05
    assert np.asarray(to_rgb(Image.fromarray(pixels)))[:2, 0, 0].tolist() == [255, 153]


def test_one_hot_pixel_does_not_turn_the_others_black():
    pixels = np.full((50, 50), 200, np.uint16)
    pixels[0, 0] = 65535
    rgb = np.asarray(to_rgb(Image.fromarray(pixels)))
    assert (rgb[1:] == 200).all() and rgb[0, 0, 0] == 255


def test_a_transparent_value_of_16_bits_is_white():
    picture = Image.fromarray(np.array([[1000, 65535]], np.uint16))
    picture.info["transparency"] = 1000
    assert np.asarray(to_rgb(picture))[0, :, 0].tolist() == [255, 255]


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_values_that_are_no_brightness_are_refused(value):
    with pytest.raises(InputError, match="are no brightness"):
        to_rgb(Image.fromarray(np.array([[0.5, value]], np.float32)))


def save_turned(base: Path, tag: int) -> dict[str, np.ndarray]:
    """Store each photograph turned, with the EXIF tag that turns it back; returns them as people see them."""
    seen = {}
    for path in base.glob("*/color/*.*"):
        exif = Image.Exif()
        exif[0x0112] = tag
        path = path.rename(path.with_suffix(".png"))
        picture = Image.open(path).convert("RGB")
        back = {6: TURNS[8], 8: TURNS[6]}.get(tag, TURNS[tag])
        picture.transpose(back).save(path, "PNG", exif=exif)
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(path))), np.asarray(picture))
        seen[path.stem] = np.asarray(picture)
    return seen


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("exif", [None, "upright", "stored"])
def test_photographs_that_their_exif_block_turns_fit_their_labels(prepared, tmp_path, tag, exif):
    base = to_report_layout(prepared, tmp_path / "base")
    seen = save_turned(base, tag)
    report, _ = prepare(base, exif=exif)
    square = {name for name, pixels in seen.items() if pixels.shape[0] == pixels.shape[1]}
    both_fit = set(seen) if tag < 5 else square
    prepared_names = {path.stem for path in base.glob("*/color/*/*.jpg")}
    if exif == "stored":
        assert prepared_names == both_fit, "the others do not fit their labels as they are stored"
        return
    for path in base.glob("*/color/*/*.jpg"):
        stored = np.asarray(Image.open(path)).astype(int)
        assert Image.open(path).getexif().get(0x0112, 1) == 1
        assert np.abs(stored - seen[path.stem]).mean() < 5, path
    assert prepared_names == set(seen)
    warned = [text for text in report["warnings"] if "--exif" in text]
    assert len(warned) == (exif is None and bool(both_fit))
    assert all(f": {len(both_fit)} photographs" in text for text in warned)


def test_a_label_that_its_exif_block_turns_is_refused(base):
    path = base / "annotations/trimaps/synthetic_dog_1.png"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)
    (reason,) = left_out(base).values()
    assert "its EXIF block turns it, which is ambiguous for a label" in reason


def test_oxford_photographs_stay_as_they_are_stored(base):
    """Their labels were drawn on the stored pixels."""
    path = base / "images/synthetic_dog_1.jpg"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).save(path, exif=exif)
    before = path.read_bytes()
    report, _ = prepare(base)
    assert (base / "TrainVal/color/dogs/synthetic_dog_1.jpg").read_bytes() == before
    assert any(": 1 photographs; used stored" in text for text in report["warnings"])
