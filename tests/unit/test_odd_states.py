"""Folders, machines and saved states as people have them: what goes on, what is refused, and what is said."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clip_seg.weights import load_vision, random_vision, read_config
from dataset import cache as cache_module
from dataset.cache import Cache
from dataset.dataset_prep import prepare
from dataset.pet import PetDataset, find_records, make_train_sets, spread
from dataset.pet_heatmap import read_points
from tests.helpers import ROOT, UNET_ARGS, save_model, segmentation_step, train, train_config
from tests.unit.test_pet import fake_records
from unet.model import UNet
from unet.test import Config as UNetTestConfig
from utils import loader as loader_module
from utils.config import TrainConfig, as_plain_dict, parse, run_script
from utils.dataset import IGNORE
from utils.distributed import init_distributed
from utils.evaluation import clear_results, lock_results
from utils.files import InputError, acquire_lock, atomic_path, read_json, write_json
from utils.helper import load_checkpoint, save_checkpoint
from utils.loader import EpochBatchSampler, make_loader
from utils.loss import LOSSES, SegmentationLoss
from utils.metric import validate
from utils.train import StepOutput, sum_losses

CPU = torch.device("cpu")

# --- Prepared state is checked


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


# --- The machine is asked


@pytest.mark.parametrize(("megabytes", "used"), [(0, 0), (0.1, 1), (1, 2), (1000, 2)])
def test_workers_fit_in_the_shared_memory(prepared, monkeypatch, tmp_path, caplog, megabytes, used):
    dataset = PetDataset(find_records(prepared, "TrainVal"), 64)  # 4 x 16 KiB a batch, three batches a worker
    free = int(megabytes * 1e6)
    monkeypatch.setattr(loader_module, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, free))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    loader = make_loader(dataset, EpochBatchSampler(12, 2, shuffle=False), 2, CPU)
    assert loader.num_workers == used
    assert ("docker run --shm-size" in caplog.text) == (used < 2)


def refuse_below(monkeypatch, folder: Path, error: OSError) -> None:
    """Make a folder one that cannot be written; root may write everywhere, so permissions would not do."""
    real = cache_module.acquire_lock

    def acquire(path, **options):
        if folder in path.parents:
            raise error
        return real(path, **options)

    monkeypatch.setattr(cache_module, "acquire_lock", acquire)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EROFS, "Read-only")]
)
def test_data_that_cannot_be_written_are_cached_elsewhere(base, tmp_path, monkeypatch, caplog, error):
    prepare(base)
    records = find_records(base, "Test")
    monkeypatch.setattr(cache_module.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    refuse_below(monkeypatch, base, error)
    elsewhere = Cache(records, 32)
    assert tmp_path / "tmp" in elsewhere.path.parents and "cannot be written" in caplog.text
    given = Cache(records, 32, tmp_path / "given")
    assert tmp_path / "given" in given.path.parents and np.array_equal(given[0][0], elsewhere[0][0])
    refuse_below(monkeypatch, tmp_path, error)
    with pytest.raises(InputError, match=r"cannot write the cache .*Give a folder as --cache"):
        Cache(records, 32, tmp_path / "other")


def test_data_sets_that_share_a_cache_folder_keep_their_files(base, prepared, tmp_path):
    prepare(base)
    caches = [Cache(find_records(data, "Test"), 32, tmp_path / "shared") for data in (base, prepared)]
    assert all(cache.path.exists() for cache in caches) and caches[0].path.parent != caches[1].path.parent


def test_an_unreadable_photograph_is_not_taken_for_an_unwritable_cache(base, monkeypatch):
    prepare(base)
    records = find_records(base, "Test")

    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(cache_module, "load_picture", fail)
    with pytest.raises(InputError, match=r"\.jpg cannot be read: Permission denied"):
        Cache(records, 32)


def test_a_results_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "test").touch()
    with pytest.raises(InputError, match=r"cannot write the results in .*Choose another --out"):
        lock_results(tmp_path / "test")


@pytest.mark.parametrize("variables", [{"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}, {}])
def test_names_that_the_terminal_cannot_show_are_printed_anyway(tmp_path, variables):
    code = "from utils.config import run_script; from utils.files import InputError\ndef main():\n"
    code += "    print('K\\xe4tzchen \\u732b'); raise InputError('caf\\udce9.jpg is odd')\nrun_script(main)"
    environment = {**os.environ, **variables, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and r"K\xe4tzchen \u732b" in result.stdout
    assert result.stderr.strip() == r"error: caf\udce9.jpg is odd"


# --- Losses are sums over the whole split and the whole step


def losses():
    boundaries = ("background", "ignore", "object", "class")
    return [(name, boundary) for name in (*LOSSES, "cross-entropy+0.5*dice") for boundary in boundaries]


def make_loss(name, boundary):
    """A loss with weights of the classes, which the balanced ones use."""
    return SegmentationLoss(name, boundary, [900, 80, 20, 50][: 3 + (boundary == "class")])


class Pixels(nn.Module):
    """A segmenter with batch norm, whose statistics must be counted once per step."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, classes, 1))

    def forward(self, image):
        return self.layers(image)


def sample_batches(images: int, size: int):
    """Batches of at most `size` of the same images, which differ in species and in ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (images, 3, 8, 8), generator=generator, dtype=torch.uint8)
    mask = torch.zeros(images, 8, 8, dtype=torch.uint8)
    for number in range(images):
        mask[number, :, number % 8 :] = 1 + number % 2
        mask[number, : number % 5] = IGNORE
    mask[3] = IGNORE
    return [{"image": image[i : i + size], "mask": mask[i : i + size]} for i in range(0, images, size)]


@pytest.mark.parametrize(("name", "boundary"), losses())
def test_the_validation_loss_does_not_depend_on_the_batches(name, boundary):
    criterion, model = make_loss(name, boundary), Pixels(3 + (boundary == "class"))

    def step(model, batch):
        return StepOutput(criterion(model(batch["image"]), batch["mask"]))

    found = [validate(model, step, sample_batches(17, size), CPU, ["a"])[0] for size in (1, 3, 7, 16, 17)]
    (whole,) = sample_batches(17, 17)
    expected = criterion(model.eval()(whole["image"].float() / 255), whole["mask"]).value.item()
    assert found == pytest.approx([expected] * 5, rel=1e-5)


@pytest.mark.parametrize(("name", "boundary"), losses())
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_the_gradient_does_not_depend_on_the_micro_batches(prepared, tmp_path, name, boundary, micro_batch_size):
    """The weights after a step of plain Adam's first update only show signs, so the gradient itself is compared."""
    criterion, gradients = make_loss(name, boundary), []

    def step(model, batch):
        return StepOutput(criterion(model(batch["image"]), batch["mask"]))

    for micro in (None, micro_batch_size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3 + (boundary == "class"), 1))
        gradients.append(first_gradient(prepared, tmp_path / str(micro), model, step, micro))
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


class Stop(Exception):
    """Ends a training at its first optimizer step."""


def first_gradient(data, out, model, step, micro):
    def stop(self, *_, **__):
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(torch.optim.Adam, "step", stop)
        train(data, out, step=step, model=model, batch_size=6, micro_batch_size=micro)
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_sums_over_a_step_leave_batch_norm_as_it_was():
    criterion, model = SegmentationLoss("dice", "ignore"), Pixels().train()

    def step(model, batch):
        return StepOutput(criterion(model(batch["image"]), batch["mask"]))

    before = [buffer.clone() for buffer in model.buffers()]
    batches = sample_batches(12, 4)
    total = sum_losses(model, step, batches, CPU)
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))
    by_hand = sum(criterion(model(batch["image"].float() / 255), batch["mask"]).sums for batch in batches)
    torch.testing.assert_close(total, by_hand)


# --- Two processes in one folder


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


# --- State from files gets the checks of the command line


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
    "best_loss": ("x", math.nan, None),
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


# --- Errors that cross a process


class Failing(torch.utils.data.Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, key):
        if key != (0, 0):
            raise self.error
        return {"image": torch.zeros(3, 8, 8, dtype=torch.uint8)}


ERRORS = [
    InputError("a.png: 3 pixels belong to no class"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "cache.u8"),
    OSError(errno.EIO, "Input/output error", "a.jpg"),
    PermissionError(errno.EACCES, "Permission denied", "a.jpg"),
    MemoryError("a.jpg does not fit in memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_the_one_line_that_it_is_without(error, workers):
    loader = make_loader(Failing(error), EpochBatchSampler(4, 1, shuffle=False), workers, CPU)
    with pytest.raises(type(error)) as raised:
        list(loader)
    assert str(raised.value) == str(error)
    if workers:
        loader._iterator._shutdown_workers()  # as part of a reference cycle it would take five seconds


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("a.jpg: does not fit in memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you ..."
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines"),
    ],
)
def test_want_of_memory_is_one_line_that_names_the_flag(error, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr("utils.config.keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert "--micro-batch-size" in stop.value.code and "\n" not in stop.value.code


def test_other_runtime_errors_keep_their_traceback(monkeypatch):
    def main():
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("utils.config.keep_freed_memory", lambda: None)
    with pytest.raises(RuntimeError):
        run_script(main)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: .*masks/a\.png"):
        with atomic_path(tmp_path / "masks/a.png"), Path("/dev/full").open("wb") as file:
            file.write(bytes(100))
            file.flush()
    assert not list((tmp_path / "masks").iterdir())


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 10)], ids=["deleted", "cut short"])
def test_a_cache_that_vanished_is_named(base, damage):
    prepare(base)
    cache = Cache(find_records(base, "Test"), 32)
    damage(cache.path)
    with pytest.raises(InputError, match=r"\.u8 has been deleted or cut short; start again"):
        cache[0]


# --- Code in a model's folder


@pytest.mark.parametrize("change", [{"patch_size": 0}, {"num_channels": 1}, {"hidden_size": "x"}, [], 3])
def test_a_damaged_clip_config_is_one_line(clip_folder, tmp_path, change):
    content = read_json(clip_folder / "config.json")
    write_json(tmp_path / "config.json", content | change if isinstance(change, dict) else change)
    for call in (read_config, random_vision):
        with pytest.raises(InputError, match="--clip-model"):
            call(str(tmp_path))


@pytest.mark.parametrize("kind", ["mystery", "clip_mystery", "resnet", 3, None])
def test_code_in_a_model_folder_is_neither_run_nor_offered(tmp_path, monkeypatch, kind):
    config = {"model_type": kind, "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    write_json(tmp_path / "config.json", config)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    for call in (load_vision, read_config):
        with pytest.raises(InputError, match=f"is a {kind} model, expected a CLIP"):
            call(str(tmp_path))
    assert not (tmp_path / "ran").exists()


# --- Small ones


@pytest.mark.parametrize("limit", [4, 5, 8, 30, 99])
@pytest.mark.parametrize(("cats", "dogs"), [(33, 67), (2, 98), (98, 2), (50, 50)])
def test_a_limit_is_spread_over_the_species(cats, dogs, limit):
    records = fake_records(cats, dogs)
    picked = spread(records, limit)
    assert len(picked) == len({record.name for record in picked}) == limit
    for species, count in ((1, cats), (2, dogs)):
        found = sum(record.species == species for record in picked)
        assert found >= 2 and abs(found - limit * count / 100) <= 2


def test_the_least_limit_trains(prepared, tmp_path):
    train_set, val_set = make_train_sets(train_config(prepared, tmp_path, limit=4))
    assert len(val_set) == 2 and len(train_set) == 2


@pytest.mark.parametrize("name", ["data", "out", "cache"])
def test_an_empty_path_is_an_error_and_a_tilde_the_home(name, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(TrainConfig, "doc", [f"--{name}", ""])
    assert stop.value.code == 2 and f"--{name}: expected a path, got nothing" in capsys.readouterr().err
    assert getattr(parse(TrainConfig, "doc", [f"--{name}", "~/r"]), name) == Path.home() / "r"
    assert getattr(parse(TrainConfig, "doc", [f"--{name}", "~nobody.jpg"]), name) == Path("~nobody.jpg")


def test_a_run_folder_names_its_checkpoint(tmp_path):
    save_model(tmp_path / "best.pt", UNet(**UNET_ARGS), "unet", UNET_ARGS)
    config = parse(UNetTestConfig, "doc", ["--checkpoint", str(tmp_path)])
    assert config.checkpoint == tmp_path / "best.pt" and config.results == tmp_path / "test"


def test_a_world_size_alone_is_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE=2 is set, but not RANK.*start the processes with torchrun"):
        init_distributed("cpu")


def test_a_run_folder_that_is_deleted_during_the_training_is_made_again(prepared, tmp_path, caplog):
    def step(model, batch):
        if model.training and (tmp_path / "run/best.pt").exists():
            shutil.rmtree(tmp_path / "run")
        return segmentation_step(model, batch)

    train(prepared, tmp_path / "run", step=step, epochs=2, patience=0)
    assert "was deleted during the training" in caplog.text
    assert read_json(tmp_path / "run/config.json")["epochs"] == 2
    assert train(prepared, tmp_path / "run", epochs=3, resume=True)["epoch"] == 3


def test_overwrite_without_photographs_and_scoring_flags_with_them_are_errors(capsys):
    cases = ["--overwrite", *(f"--images a {flag}" for flag in ("--limit 3", "--split TrainVal", "--score-size 64",
             "--perturb", "--batch-size 1", "--workers 1", "--data x"))]  # fmt: skip
    for case in cases:
        with pytest.raises(SystemExit) as stop:
            parse(UNetTestConfig, "doc", case.split())
        assert stop.value.code == 2 and "leave it out" in capsys.readouterr().err, case
