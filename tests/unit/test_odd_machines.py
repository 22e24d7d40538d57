"""Small memory, read-only folders, full disks, errors in worker processes, and flags: one line with a remedy."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_seg.weights import load_vision, random_vision, read_config
from dataset import cache as cache_module
from dataset.cache import Cache
from dataset.dataset_prep import prepare
from dataset.pet import PetDataset, find_records, make_train_sets, spread
from tests.helpers import ROOT, UNET_ARGS, save_model, segmentation_step, train, train_config
from tests.unit.test_pet import fake_records
from unet.model import UNet
from unet.test import Config as UNetTestConfig
from utils import loader as loader_module
from utils.config import TrainConfig, parse
from utils.distributed import init_distributed
from utils.evaluation import lock_results
from utils.files import InputError, atomic_path, read_json, write_json
from utils.loader import EpochBatchSampler, make_loader
from utils.script import run_script

CPU = torch.device("cpu")

# --- Shared memory, read-only folders, terminals


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
    code = "from utils.script import run_script; from utils.files import InputError\ndef main():\n"
    code += "    print('K\\xe4tzchen \\u732b'); raise InputError('caf\\udce9.jpg is odd')\nrun_script(main)"
    environment = {**os.environ, **variables, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and r"K\xe4tzchen \u732b" in result.stdout
    assert result.stderr.strip() == r"error: caf\udce9.jpg is odd"


# --- Errors in worker processes, memory, full disks


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

    monkeypatch.setattr("utils.script.keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert "--micro-batch-size" in stop.value.code and "\n" not in stop.value.code


def test_other_runtime_errors_keep_their_traceback(monkeypatch):
    def main():
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("utils.script.keep_freed_memory", lambda: None)
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


# --- Limits, paths, folders of runs


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
