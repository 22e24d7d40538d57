"""Names of files, folders and entries in lists: found, or reported; nothing is overwritten."""

import csv
import errno
import os
import unicodedata
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from study.report import escape
from tests.helpers import left_out, photograph, raise_error
from utils import image as image_module
from utils.figures import save_figure
from utils.files import InputError, acquire_lock
from utils.image import find_pictures
from utils.predictor import predict_photographs

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


# --- Names of masks, and names in lists


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
