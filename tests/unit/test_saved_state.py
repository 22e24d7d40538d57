"""Files that a run or a preparation saved: checked before they are used; locks for those that are in use."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from dataset.cache import Cache
from dataset.dataset_prep import prepare
from dataset.pet import find_records
from dataset.pet_heatmap import read_points
from tests.helpers import train
from utils.config import TrainConfig, as_plain_dict, parse
from utils.evaluation import clear_results, lock_results
from utils.files import InputError, acquire_lock, read_json, write_json
from utils.helper import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")

# --- The prepared folder


def turn(path):
    turned = Image.open(path).transpose(Image.Transpose.ROTATE_180)
    with path.open("wb") as file:  # in place, as scripts do: a hard link shares the file
        turned.save(file, "JPEG", quality=90)


CHANGES = {
    "a photograph turned in place": lambda base: turn(base / "images/synthetic_dog_2.jpg"),
    "a prepared photograph replaced": lambda base: turn(base / "Test/color/dogs/synthetic_dog_2.jpg"),
    "a label painted over": lambda base: Image.new("L", (64, 48)).save(base / "Test/label/dogs/synthetic_dog_2.png"),
    "a byte changed": lambda base: flip_last_byte(base / "Test/label/dogs/synthetic_dog_2.png"),
    "an original replaced": lambda base: replace_by_a_copy(base / "annotations/trimaps/synthetic_dog_2.png"),
    "a file cut short": lambda base: os.truncate(base / "images/synthetic_dog_2.jpg", 1000),
}


def replace_by_a_copy(path):
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content + b"more")


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_files_that_changed_after_the_preparation_are_refused(base, change):
    prepare(base)
    find_records(base, "Test")
    change(base)
    with pytest.raises(InputError, match=r"synthetic_dog_2\.\w+ has changed since it was prepared\. Run: python"):
        find_records(base, "Test")


def test_other_times_alone_do_not_matter(base):
    """After copying a folder the files have other times."""
    prepare(base)
    for path in base.rglob("*.*"):
        os.utime(path, (1, 1))
    assert len(find_records(base, "Test")) == 12


EDITS = [{"warnings": None}, {"layout": 3}, {"left_out": ["a"]}, {"failed": ["x"]}, {"files": {"a": "abc"}}]


@pytest.mark.parametrize("change", EDITS, ids=str)
def test_an_edited_report_is_named(base, change):
    prepare(base)
    path = base / "prep_report.json"
    write_json(path, {key: value for key, value in (read_json(path) | change).items() if value is not None})
    with pytest.raises(InputError, match=r"prep_report\.json has no .*Move it away, then run"):
        prepare(base)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"counts": {"Test": {}}}', '{"fingerprint": 3}', "\xff", ""])
@pytest.mark.parametrize("call", [prepare, lambda base: find_records(base, "Test")], ids=["prepare", "find_records"])
def test_a_foreign_report_is_named(base, content, call):
    prepare(base)
    (base / "prep_report.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"prep_report\.json .*Move it away, then run: python dataset/dataset_prep"):
        call(base)


@pytest.mark.parametrize("content", [b"", b"{}", b"a,b\n1,2\n", b"name,class,x,y\ncaf\xe9,cat,1,1\n", b"a\0b"])
def test_a_foreign_points_file_is_named(prepared, tmp_path, content):
    data = shutil.copytree(prepared, tmp_path / "data")
    (data / "Test/points.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"points\.csv"):
        read_points(find_records(data, "Test"))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["deleted", "empty"])
def test_a_deleted_best_checkpoint_is_not_announced(prepared, tmp_path, caplog, damage):
    caplog.set_level("INFO")
    train(prepared, tmp_path, epochs=1)
    damage(tmp_path / "best.pt")
    train(prepared, tmp_path, epochs=1, resume=True)
    assert "best.pt is missing" in caplog.text and "There is no" in caplog.messages[-1]
    train(prepared, tmp_path, epochs=2, resume=True)
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 2 and "Best epoch 2" in caplog.messages[-1]


# --- Locks and leftovers


def test_a_second_preparation_waits_outside(base):
    leftover = base / "Test/label/cats/.a.png.1.tmp"
    prepare(base)
    leftover.touch()
    (base / "prep_report.json").unlink()
    with acquire_lock(base / ".prepare.lock"), pytest.raises(InputError, match=r"another dataset_prep\.py is"):
        prepare(base)
    assert leftover.exists(), "the other process may be writing it"
    prepare(base)
    assert not leftover.exists()


def test_a_second_test_in_a_folder_is_refused(tmp_path):
    with lock_results(tmp_path), pytest.raises(InputError, match="another test is writing there"):
        lock_results(tmp_path)
    lock_results(tmp_path).close()


def test_masks_of_an_earlier_larger_test_and_leftovers_are_removed(tmp_path):
    (tmp_path / "masks").mkdir()
    clear_results(tmp_path, ["a", "b"])
    for name in ("a.png", "b.png", "b_background.png", "own.png", ".a.png.12.tmp"):
        (tmp_path / "masks" / name).touch()
    (tmp_path / "metrics.json").touch()
    clear_results(tmp_path, ["a"])
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {"own.png"}, "a file of the user stays"
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize("content", ["{}", '{"images": ["../../precious"]}', '{"images": [3]}', "[]", ""])
def test_an_edited_list_of_masks_deletes_nothing_else(tmp_path, content):
    results = tmp_path / "run/test"
    results.mkdir(parents=True)
    clear_results(results, ["a"])
    (tmp_path / "precious.png").touch()
    (results / "metrics.json").touch()
    (results / ".masks.json").write_text(content)
    with pytest.raises(InputError, match=r"\.masks\.json"):
        clear_results(results, ["a"])
    assert (tmp_path / "precious.png").exists() and (results / "metrics.json").exists()


@pytest.mark.parametrize("name", ["masks/a.png", "images.csv", "predictions.png", "metrics.json"])
def test_files_that_no_test_wrote_are_never_replaced(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="is there already, and of no test"):
        clear_results(tmp_path, ["a"])
    assert (tmp_path / name).exists()
    write_json(tmp_path / "metrics.json", {"iou": {}, "config": {}})  # of a test of an earlier version
    clear_results(tmp_path, ["a"])


def test_leftovers_of_a_killed_cache_are_removed(base):
    prepare(base)
    (base / "cache").mkdir()
    (base / "cache/.Test-12x32-abc.u8.99.tmp").touch()
    Cache(find_records(base, "Test"), 32)
    assert not list((base / "cache").glob(".*.tmp"))


# --- config.json and last.pt


BAD_VALUES = [
    ("lr", "abc"), ("lr", math.nan), ("lr", -1), ("lr", [1]), ("image_size", 0), ("image_size", 64.5),
    ("loss", "nonsense"), ("loss", 3), ("batch_size", -3), ("batch_size", True), ("batch_size", None),
    ("precision", "bf8"), ("epochs", "many"), ("seed", -1), ("compile", "yes"), ("micro_batch_size", 0),
    ("boundary", ""), ("val_fraction", 2), ("data", ""), ("limit", 1), ("schedule", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_values_of_an_edited_config_are_checked(tmp_path, name, value):
    content = as_plain_dict(TrainConfig(out=tmp_path)) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"config\.json: .*{name}"):
        parse(TrainConfig, "doc", ["--out", str(tmp_path), "--resume"])


@pytest.fixture(scope="module")
def one_epoch(prepared, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    train(prepared, out, epochs=1)
    return out


def broken(last, place, value):
    """A copy of `last` with another value at a place such as "optimizer.state.0.exp_avg"; None: the key is removed."""
    *parents, key = [int(part) if part.isdigit() else part for part in place.split(".")]
    copy = json_like_copy(last)
    part = copy
    for parent in parents:
        part = part[parent]
    if value is None:
        del part[key]
    else:
        part[key] = value
    return copy


def json_like_copy(value):
    if isinstance(value, dict):
        return {key: json_like_copy(part) for key, part in value.items()}
    return [json_like_copy(part) for part in value] if isinstance(value, list) else value


BAD_PARTS = {
    "epoch": ("1", None, 1.5, -1),
    "model": ([], {}),
    "model.output.weight": ("x", torch.zeros(1), None),
    "optimizer": ([], {}),
    "optimizer.state": ({}, 3),
    "optimizer.state.0": ([], {}),
    "optimizer.state.0.exp_avg": (torch.zeros(2), torch.zeros(4, dtype=torch.int64), 1.0, None),
    "optimizer.state.0.exp_avg_sq": (torch.zeros(2),),
    "optimizer.state.0.step": ("x", torch.zeros(3)),
    "stopping": ([], {}),
    "stopping.best": ("low", math.nan),
    "stopping.bad_epochs": (None, "2"),
    "random_state": ([], {}),
    "random_state.cpu": (torch.zeros(3), "x", torch.zeros(5056, dtype=torch.uint8)),
    "random_state.cuda": (3,),
    "best_value": ("x", math.nan, None),
    "log": ({}, [], [3], None),
    "log.0.val_loss": ("x", None),
    "log.0.val_iou_cat": ("x",),
    "config": ([], None),
    "config.image_size": ("big", 0),
    "class_table": (3, {}),
    "class_table.rows.0.tint": ([1, 2], "red"),
    "class_table.rows.0.name": (5,),
    "model_args": ({}, 3),
}
BAD_STATES = [(place, value) for place, values in BAD_PARTS.items() for value in values]


@pytest.mark.parametrize(("place", "value"), BAD_STATES)
def test_a_changed_field_of_the_last_checkpoint_is_named(prepared, one_epoch, tmp_path, place, value):
    out = shutil.copytree(one_epoch, tmp_path / "run")
    last = load_checkpoint(out / "last.pt")
    if place == "model.output.weight":
        place = f"model.{next(name for name in last['model'] if name.endswith('weight'))}"
        copy = json_like_copy(last)
        key = place.removeprefix("model.")
        copy["model"] = {name: part for name, part in last["model"].items() if name != key}
        copy["model"] |= {} if value is None else {key: value}
    else:
        copy = broken(last, place, value)
    save_checkpoint(out / "last.pt", copy)
    before = (out / "best.pt").read_bytes()
    with pytest.raises(InputError, match=r"last\.pt"):
        train(prepared, out, epochs=2, resume=True)
    assert (out / "best.pt").read_bytes() == before


def test_a_checkpoint_of_another_run_is_refused(prepared, one_epoch, tmp_path):
    train(prepared, tmp_path / "other", epochs=1, seed=1, lr=0.01)
    out = shutil.copytree(one_epoch, tmp_path / "run")
    shutil.copy(tmp_path / "other/last.pt", out)
    with pytest.raises(InputError, match=r"last\.pt is of a run with other settings: it has --lr 0\.01"):
        train(prepared, out, epochs=2, resume=True)


@pytest.mark.parametrize("files", [["last.pt"], ["last.pt", "log.csv"], ["last.pt", "best.pt"]])
def test_a_run_without_its_last_checkpoint_is_not_started_over(prepared, one_epoch, tmp_path, files):
    out = shutil.copytree(one_epoch, tmp_path / "run")
    for name in files:
        (out / name).unlink()
    kept = {path.name: path.read_bytes() for path in out.glob("*.*t*")}
    with pytest.raises(InputError, match=r"last\.pt is missing beside .*put it back, or start a new run"):
        train(prepared, out, epochs=2, resume=True)
    assert {path.name: path.read_bytes() for path in out.glob("*.*t*")} == kept


def test_an_empty_config_leads_out_of_the_circle(one_epoch, tmp_path):
    """After a power failure: with nothing else the run starts; beside a checkpoint the message names both."""
    (tmp_path / "config.json").touch()
    assert parse(TrainConfig, "doc", ["--out", str(tmp_path), "--resume"]).resume
    shutil.copy(one_epoch / "last.pt", tmp_path)
    with pytest.raises(InputError, match=r"config\.json is missing or empty beside last\.pt: restore it"):
        parse(TrainConfig, "doc", ["--out", str(tmp_path), "--resume"])


def test_resume_starts_a_run_of_which_nothing_was_saved(prepared, tmp_path):
    assert train(prepared, tmp_path / "run", epochs=1, resume=True)["epoch"] == 1
