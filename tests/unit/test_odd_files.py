"""Photographs, labels, names and lists as people have them: what is read, what is refused, and what is said."""

import csv
import errno
import os
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageOps, PngImagePlugin

from dataset.dataset_prep import prepare
from dataset.originals import BREEDS
from study.report import escape
from tests.helpers import left_out, to_report_layout
from unet.model import UNet
from utils import image as image_module
from utils.dataset import IGNORE, PETS, decode_trimap
from utils.figures import save_figure
from utils.files import InputError, acquire_lock
from utils.helper import load_checkpoint
from utils.image import find_pictures, load_picture, to_rgb
from utils.predictor import Predictor, predict_photographs

DEVICE_ERROR = Path("/proc/self/mem")  # reading it fails with EIO, even for root
needs_device_error = pytest.mark.skipif(not DEVICE_ERROR.exists(), reason="no /proc here")
TURNS = {tag: Image.Transpose(number) for tag, number in {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.items()}


def photograph(width=40, height=30) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def predictor() -> Predictor:
    table = PETS.as_plain_dict()
    return Predictor(UNet(base_channels=2).eval(), {"class_table": table, "config": {"image_size": 32}})


def no_memory(*_, **__):
    raise MemoryError


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


def raise_error(error):
    def fail(*_, **__):
        raise error

    return fail


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


# --- What a person sees counts, not the bytes


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


# --- Label values that nobody meant


CLASSES = np.array([[0, 1, 1, IGNORE], [0, 0, 1, IGNORE]], np.uint8)


def indexed(palette, classes=CLASSES, **info):
    label = Image.fromarray(classes)
    label.putpalette(palette)
    label.info.update(info)
    return label


def rgba(alpha):
    label = PETS.encode_label(CLASSES).convert("RGBA")
    label.putalpha(Image.fromarray(np.array(alpha, np.uint8)))
    return label


def reopened(label, tmp_path, suffix=".png"):
    label.save(tmp_path / f"label{suffix}")
    return load_picture(tmp_path / f"label{suffix}")


SHORT = [0, 0, 0, 128, 0, 0, 0, 128, 0]
BAD_LABELS = {
    # Pillow saves an index beyond the palette with the bits that the palette needs: 255 becomes 3.
    "index beyond a short palette": (indexed(SHORT), r"3 \(2 pixels\); known are background 0, cat 1, dog 2$"),
    "index in the black end of a palette": (indexed(SHORT + [0] * 759), r"255 \(2 pixels\)"),
    "index with the color of another class": (indexed([0, 0, 0, 0, 128, 0, 9, 9, 9] + [9] * 759), r"1 \(3 pixels\)"),
    "trimap": (Image.fromarray(np.array([[1, 2, 3, 3]], np.uint8)), r"3 \(2 pixels\)"),
    "colors of another tool": (indexed(SHORT).convert("RGB").point(lambda v: v // 2), r"\(64, 0, 0\) \(3 pixels\)"),
    "edge of a soft brush": (rgba([[255, 128, 255, 255]] * 2), r"\(128, 0, 0, 128\) \(1 pixels\)"),
    "grey values of two kinds": (Image.fromarray(np.array([[0, 1, 38, 38]], np.uint8)), r"1 \(1 pixels\)|38 \("),
    "bilevel": (Image.new("1", (4, 4)), "got mode 1"),
}  # fmt: skip


@pytest.mark.parametrize(("label", "message"), BAD_LABELS.values(), ids=BAD_LABELS)
def test_label_values_that_nobody_meant_are_an_error(label, message, tmp_path):
    with pytest.raises(InputError, match=message):
        PETS.decode_label(reopened(label, tmp_path))


GOOD_LABELS = {
    "nothing painted is transparent": (rgba([[0, 255, 255, 255]] * 2), [[0, 1, 1, IGNORE], [0, 0, 1, IGNORE]]),
    "everything transparent": (rgba([[0] * 4] * 2), [[0] * 4] * 2),
    "grey with alpha": (Image.merge("LA", (Image.fromarray(CLASSES), Image.new("L", (4, 2), 255))), CLASSES),
    "index of a transparent color": (indexed([5, 5, 5] * 256, transparency=1), [[0, 0, 0, IGNORE]] * 2),
    "own palette": (indexed([0, 0, 0, 250, 50, 83, 51, 221, 255] + [7, 7, 7] * 253), CLASSES),
    "full palette": (PETS.encode_label(CLASSES), CLASSES),
    "grey label with a palette": (indexed([0, 0, 0, 2, 2, 2], CLASSES[:, :3]), [[0, 2, 2], [0, 0, 2]]),
    "palette of greys to look at": (indexed([0, 0, 0, 90, 90, 90, 180, 180, 180], CLASSES[:, :3]), CLASSES[:, :3]),
    "grey label with a turned palette": (indexed([2, 2, 2, 0, 0, 0], CLASSES[:, :3]), [[2, 0, 0], [2, 2, 0]]),
}


@pytest.mark.parametrize(("label", "expected"), GOOD_LABELS.values(), ids=GOOD_LABELS)
def test_transparent_pixels_of_a_label_are_background(label, expected, tmp_path):
    assert PETS.decode_label(reopened(label, tmp_path)).tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize(
    ("suffix", "options"), [(".jpg", {}), (".jp2", {}), (".avif", {}), (".tif", {"compression": "jpeg"})]
)
def test_labels_in_lossy_formats_are_refused(tmp_path, suffix, options):
    Image.new("L", (16, 16), 1).save(tmp_path / f"label{suffix}", **options)
    label = load_picture(tmp_path / f"label{suffix}")
    for decode in (PETS.decode_label, lambda label: decode_trimap(label, 1)):
        with pytest.raises(InputError, match="which changes the values of a label; save the label as PNG"):
            decode(label)


def test_a_trimap_with_a_palette_of_its_values_is_read_by_them():
    trimap = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    trimap.putpalette([2, 2, 2, 1, 1, 1, 3, 3, 3])
    assert decode_trimap(trimap, 1).tolist() == [[0, 1, IGNORE]]
    shown = Image.fromarray(np.array([[1, 2, 3]], np.uint8))
    shown.putpalette([0, 0, 0, 255, 255, 255, 0, 0, 0, 128, 128, 128])  # to look at: the indices count
    assert decode_trimap(shown, 1).tolist() == [[1, 0, IGNORE]]


def test_the_report_names_the_label_file_its_values_and_the_known_ones(prepared, tmp_path):
    base = to_report_layout(prepared, tmp_path / "base")
    Image.fromarray(np.full((48, 64), 7, np.uint8)).save(base / "Test/label/synthetic_dog_2.png")
    (reason,) = (text for file, text in left_out(base).items() if file == "Test/label/synthetic_dog_2.png")
    assert reason.startswith("3072 pixels belong to no class: 7 (3072 pixels); known are background 0")


@pytest.mark.parametrize(
    ("name", "listed", "own", "outcome"),
    [
        ("Rex_1", "", "", "no list gives its species"),
        ("Beagle_1", "", "", "no list gives its species"),  # Oxford's is written in small letters
        ("beagle_1", "", "", "dogs"),
        ("Maine_Coon_1", "", "", "cats"),
        ("Rex_1", "1 2 1", "", "dogs"),
        ("Rex_1", "", "1 1 1", "cats"),
        ("Rex_1", "1 1 1", "1 2 1", "cat and dog in the lists (list.txt, trainval.txt)"),
    ],
)
def test_a_species_is_never_guessed_from_a_capital_letter(base, name, listed, own, outcome):
    (base / "images/synthetic_dog_1.jpg").rename(base / f"images/{name}.jpg")
    (base / "annotations/trimaps/synthetic_dog_1.png").rename(base / f"annotations/trimaps/{name}.png")
    for file, rest in (("list.txt", listed), ("trainval.txt", own)):
        path = base / "annotations" / file
        lines = [line for line in path.read_text().splitlines() if not line.startswith("synthetic_dog_1 ")]
        wanted = [f"{name} {rest}".strip()] if rest or file != "list.txt" else []
        path.write_text("\n".join([*lines, *wanted]) + "\n")
    reasons = left_out(base)
    if outcome in ("cats", "dogs"):
        assert not reasons and (base / f"TrainVal/color/{outcome}/{name}.jpg").exists()
    else:
        assert outcome in reasons[f"images/{name}.jpg"]


def test_there_are_37_breeds():
    assert len(BREEDS) == 37 and list(BREEDS.values()).count(1) == 12


# --- Nothing is passed over in silence


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("IMG_1.HEIC", "HEIC photograph (convert to JPEG, or: pip install pillow-heif)"),
        ("notes.txt", "file with suffix '.txt'"),
        (".hidden.jpg", "hidden file"),
        (".thumbnails/a.jpg", "hidden folder"),
        ("@eaDir/a.jpg/SYNOPHOTO_THUMB_SM.jpg", "folder @eaDir"),
        ("cat_mask.png", "mask or overlay by its name"),
        ("cat_overlay.jpg", "mask or overlay by its name"),
    ],
)
def test_what_is_passed_over_in_a_folder_is_counted(tmp_path, monkeypatch, name, reason):
    monkeypatch.setattr(image_module, "PICTURE_SUFFIXES", image_module.PICTURE_SUFFIXES - {".heic"})
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    (tmp_path / "photo.jfif").touch()
    (tmp_path / "photo.avif").touch()
    found = find_pictures([tmp_path])
    assert [path.name for path, _ in found.files] == ["photo.avif", "photo.jfif"]
    assert found.format_passed_over() == f"1 passed over: 1 x {reason}"


def test_linked_and_forbidden_folders_are_told(tmp_path, monkeypatch):
    (tmp_path / "in/forbidden").mkdir(parents=True)
    (tmp_path / "album").mkdir()
    (tmp_path / "in/linked").symlink_to(tmp_path / "album")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("forbidden"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_pictures([tmp_path / "in"])
    assert found.problems == [f"{tmp_path / 'in/forbidden'}: Permission denied"]
    assert found.format_passed_over() == "1 passed over: 1 x link to a folder (give the folder itself)"


def test_a_folder_without_pictures_is_an_error_that_tells_what_is_there(predictor, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/IMG_1.txt").touch()
    with pytest.raises(InputError, match=r"(?s)no picture in .*in\n1 passed over: 1 x file with suffix '\.txt'"):
        predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- Names are no keys


def masks(out: Path) -> dict[str, str]:
    with (out / "index.csv").open(encoding="utf-8", newline="") as file:
        return {row["mask"]: Path(row["photograph"]).name for row in csv.DictReader(file)}


def make(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph().save(path)


def test_the_tree_below_a_folder_is_kept(predictor, tmp_path):
    make(tmp_path / "in/day1/IMG_1.png", tmp_path / "in/day2/IMG_1.png", tmp_path / "in/IMG_1.png")
    predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
    assert set(masks(tmp_path / "out")) == {"IMG_1_mask.png", "day1/IMG_1_mask.png", "day2/IMG_1_mask.png"}
    assert (tmp_path / "out/day2/IMG_1_overlay.jpg").exists()


@pytest.mark.parametrize("reverse", [False, True])
def test_photographs_that_differ_in_the_suffix_have_masks_of_their_own_in_any_order(predictor, tmp_path, reverse):
    photographs = [tmp_path / "in/a.jpg", tmp_path / "in/a.png"]
    make(*photographs)
    predict_photographs(predictor, photographs[:: -1 if reverse else 1], tmp_path / "out")
    assert masks(tmp_path / "out") == {"a.jpg_mask.png": "a.jpg", "a.png_mask.png": "a.png"}


def test_the_mask_of_another_photograph_is_never_replaced(predictor, tmp_path):
    first, second, out = tmp_path / "day1/IMG_1.png", tmp_path / "day2/IMG_1.png", tmp_path / "out"
    make(first, second, tmp_path / "day2/IMG_2.png")
    predict_photographs(predictor, [first], out)
    before = (out / "IMG_1_mask.png").stat().st_mtime_ns
    with pytest.raises(InputError, match=r"(?s)1 pictures .*IMG_1_mask\.png is of .*day1.*--overwrite"):
        predict_photographs(predictor, [tmp_path / "day2"], out)
    assert (out / "IMG_1_mask.png").stat().st_mtime_ns == before and (out / "IMG_2_mask.png").exists()
    predict_photographs(predictor, [first], out)  # the same photograph again
    predict_photographs(predictor, [second], out, overwrite=True)
    rows = dict(csv.reader((out / "index.csv").read_text("utf-8").splitlines()))
    assert rows["IMG_1_mask.png"] == str(second.absolute())
    with pytest.raises(InputError, match="would both be"):
        predict_photographs(predictor, [first, second], tmp_path / "other")
    (tmp_path / "third").mkdir()
    for name in ("IMG_1_mask.png", "IMG_1_overlay.jpg", "IMG_1_overlay.png"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_bytes(b"someone's own file")
        with pytest.raises(InputError, match=rf"{name} is there already"):
            predict_photographs(predictor, [first], out)
        assert (out / name).read_bytes() == b"someone's own file"


def test_an_interrupted_call_can_be_repeated(predictor, tmp_path, monkeypatch):
    make(tmp_path / "in/a.png", tmp_path / "in/b.png")
    real, calls = predictor.set_image, iter([None, KeyboardInterrupt()])
    monkeypatch.setattr(predictor, "set_image", lambda path: raise_error(e)() if (e := next(calls)) else real(path))
    with pytest.raises(KeyboardInterrupt):
        predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
    monkeypatch.undo()
    assert "2 pictures segmented" in predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")


def test_leftovers_of_a_killed_call_are_removed_under_the_lock(predictor, tmp_path):
    make(tmp_path / "in/a.png", tmp_path / "in/b/c.png")
    (tmp_path / "out/b").mkdir(parents=True)
    leftovers = [tmp_path / "out/.a_mask.png.12.tmp", tmp_path / "out/b/.c_mask.png.12.tmp"]
    for path in leftovers:
        path.touch()
    with acquire_lock(tmp_path / "out/.lock"), pytest.raises(InputError, match="another process is writing masks"):
        predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
    assert all(path.exists() for path in leftovers)
    predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
    assert not any(path.exists() for path in leftovers)


def change_lists(base: Path, change, encoding="utf-8") -> None:
    for path in (base / "annotations").glob("*.txt"):
        path.write_bytes(change(path.read_text("utf-8")).encode(encoding))


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (str.lower, "utf-8"),
        (str.upper, "utf-8"),
        (lambda text: text.replace(" ", ".jpg ", 1).replace("\nsynthetic_dog_2 ", "\nsynthetic_dog_2.jpg "), "utf-8"),
        (lambda text: text.replace("\n", "\r\n"), "utf-16"),
        (lambda text: text, "utf-8-sig"),
        (lambda text: "\n".join(f"  {line}  " for line in text.splitlines()), "utf-8"),
    ],
    ids=["lower case", "upper case", "suffix", "UTF-16", "UTF-8 with BOM", "spaces around"],
)
def test_lists_match_where_that_is_unambiguous(base, change, encoding):
    change_lists(base, change, encoding)
    assert left_out(base) == {}


def test_utf_16_without_its_mark(base):
    change_lists(base, lambda text: text, "utf-16-le")
    assert left_out(base) == {}


def test_a_folder_among_the_photographs_is_named(base):
    (base / "images/more").mkdir()
    assert left_out(base) == {"images/more": "a folder, which is not searched; move its pictures up"}


def test_names_that_are_no_utf_8_are_segmented(predictor, tmp_path):
    name = os.fsdecode(b"ch\xe4t.png")
    make(tmp_path / "in" / name, tmp_path / "in/z.png")
    for _ in range(2):
        assert "2 pictures" in predict_photographs(predictor, [tmp_path / "in"], tmp_path / "out")
    assert (tmp_path / "out" / os.fsdecode(b"ch\xe4t_mask.png")).exists()


def test_a_path_that_cannot_be_reached_is_named(predictor, tmp_path):
    make(tmp_path / "z.png")
    with pytest.raises(InputError, match=r"(?s)1 pictures segmented.*x: no such file or folder"):
        predict_photographs(predictor, [Path("x" * 300), tmp_path / "z.png"], tmp_path / "out")


@pytest.mark.parametrize("name", ["my cat", "Kätzchen", unicodedata.normalize("NFD", "Kätzchen"), "cat 1 2", "$5|6"])
def test_names_with_spaces_accents_and_signs(base, name):
    (base / "images/synthetic_dog_1.jpg").rename(base / f"images/{unicodedata.normalize('NFC', name)}.jpg")
    trimap = base / f"annotations/trimaps/{unicodedata.normalize('NFD', name)}.png"
    (base / "annotations/trimaps/synthetic_dog_1.png").rename(trimap)
    change_lists(base, lambda text: text.replace("synthetic_dog_1 ", f"{name} "))
    assert left_out(base) == {}


def test_an_ambiguous_name_is_an_error_that_shows_both(base):
    for old, new in (("synthetic_dog_1", "Rex"), ("synthetic_dog_3", "REX")):
        (base / f"images/{old}.jpg").rename(base / f"images/{new}.jpg")
        (base / f"annotations/trimaps/{old}.png").rename(base / f"annotations/trimaps/{new}.png")
    change_lists(base, lambda text: text.replace("synthetic_dog_1 ", "rex "))
    reason = left_out(base)["annotations/trainval.txt: rex"]
    assert reason in ("could be Rex or REX; rename one", "could be REX or Rex; rename one")


def test_signs_of_formulas_and_tables_are_text(tmp_path):
    figure = Figure()
    figure.suptitle("$cost_{ and $5 of 猫")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # as utils/figures.py does
        save_figure(figure, tmp_path / "a.png")
    assert escape("a|b $x$\nc") == r"a\|b \$x\$ c"
