"""Cores, threads and workers, the allocator, and the precision that the hardware has."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import joblib
import pytest
import torch

from tests.helpers import CPU, ROOT
from utils import distributed, machine
from utils.config import TrainConfig, parse
from utils.distributed import pick_precision, set_threads
from utils.files import InputError
from utils.machine import default_workers, keep_freed_memory, usable_cores

# Prints the page faults of a block of 64 MiB that follows others of its size.
FAULTS = """if True:
    import resource
    from utils.machine import keep_freed_memory
    keep_freed_memory()
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = b"x" * (64 << 20)
        del block
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
is_glibc = os.name == "posix" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@pytest.fixture
def cores(monkeypatch):
    """Set the cores that this process may use."""
    return lambda count: monkeypatch.setattr(joblib, "cpu_count", lambda: count)


@pytest.fixture
def threads(monkeypatch):
    """The threads that were set, instead of setting them."""
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return seen


@pytest.mark.skipif(not is_glibc, reason="other systems have another allocator")
@pytest.mark.parametrize(
    ("environment", "kept"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": "glibc.pthread.rseq=1"}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"MALLOC_MMAP_MAX_": "65536"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}, False),
    ],
)
def test_freed_memory_is_used_again_unless_the_user_configured_malloc(environment, kept):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS]
    faults = int(subprocess.check_output(command, cwd=ROOT, env=clean | environment, text=True))
    assert (faults < 1000) == kept, "64 MiB are 16,384 pages"


def test_a_system_without_glibc_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())  # musl: no gnu_get_libc_version, no mallopt
    keep_freed_memory()
    monkeypatch.setattr(machine, "os", SimpleNamespace(name="nt", environ={}))
    monkeypatch.setattr(ctypes, "CDLL", None)  # Windows: CDLL(None) would be an error
    keep_freed_memory()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux only")
def test_the_affinity_limits_the_cores():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import utils.machine as m; "
    output = subprocess.check_output([sys.executable, "-c", code + "print(m.usable_cores())"], cwd=ROOT, text=True)
    assert int(output) == 1 <= usable_cores()


@pytest.mark.parametrize(
    ("count", "processes", "device", "workers"),
    [(2, 1, "cpu", 0), (16, 1, "cpu", 2), (16, 4, "cpu", 0), (2, 1, "cuda", 2), (64, 1, "cuda", 8), (2, 4, "cuda", 1)],
)
def test_workers_by_default(cores, monkeypatch, count, processes, device, workers):
    cores(count)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(device) == workers


def test_threads_are_the_share_of_the_cores(cores, threads, monkeypatch):
    cores(6)
    set_threads(None)
    set_threads(5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    set_threads(None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    set_threads(None)
    assert threads == [6, 5, 3, 1]


def test_the_users_omp_num_threads_wins_but_not_that_of_torchrun(cores, threads, monkeypatch):
    cores(6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    set_threads(None)
    assert threads == []
    set_threads(2)  # the flag is more specific
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    set_threads(None)
    assert threads == [2, 6]


def test_more_threads_than_cores_are_refused(cores, threads, capsys):
    cores(2)
    with pytest.raises(InputError, match=r"--threads 3: this process may use 2 core\(s\)"):
        set_threads(3)
    for value in ("0", "-1", "two"):
        with pytest.raises(SystemExit, match="2"):
            parse(TrainConfig, "doc", ["--threads", value])
        assert "--threads" in capsys.readouterr().err
    assert threads == []


@pytest.mark.parametrize(
    ("features", "name", "expected"),
    [
        ({"avx512_bf16": True}, "auto", "bf16"),
        ({"amx_bf16": True}, "auto", "bf16"),
        ({"avx512_bf16": False, "avx2": True}, "auto", "fp32"),
        ({"bf16": True}, "auto", "fp32"),  # ARM: not measured
        ({"avx512_bf16": True}, "fp32", "fp32"),
        ({"avx2": True}, "bf16", "bf16"),
    ],
)
def test_precision_follows_the_processor(monkeypatch, caplog, features, name, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    with caplog.at_level("WARNING"):
        assert pick_precision(name, CPU) == expected
    emulated = name == "bf16" and not features.get("avx512_bf16")
    assert ("only emulates bfloat16" in caplog.text) == emulated


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_precision_follows_the_gpu(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert pick_precision("auto", torch.device("cuda")) == expected
    assert pick_precision("auto", torch.device("mps")) == "fp32"


def test_autocast_computes_in_the_precision():
    layer, image = torch.nn.Conv2d(3, 2, 1), torch.rand(1, 3, 4, 4)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with distributed.autocast(CPU, precision):
            assert layer(image).dtype == dtype
