"""Label files: a value that is no class is an error with the file, the values and the known ones."""

import numpy as np
import pytest
from PIL import Image

from dataset.originals import BREEDS
from tests.helpers import left_out, to_report_layout
from utils.dataset import IGNORE, PETS, decode_trimap
from utils.files import InputError
from utils.image import load_picture

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
