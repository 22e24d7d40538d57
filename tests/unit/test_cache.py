"""dataset/cache.py: built once, never read when outdated or incomplete, also by several processes at a time."""

import errno
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dataset import cache as cache_module
from dataset.cache import Cache
from dataset.pet import find_records
from utils.files import InputError, acquire_lock


@pytest.fixture
def base(prepared, tmp_path):
    """A copy of `prepared`, without caches."""
    return shutil.copytree(prepared, tmp_path / "base", ignore=shutil.ignore_patterns("cache"))


def test_a_cache_is_built_once_and_again_when_the_data_change(base):
    records = find_records(base, "Test")
    cache = Cache(records, 24)
    built = cache.path.stat().st_mtime_ns
    assert Cache(records, 24).path.stat().st_mtime_ns == built

    black = records[0].image.with_suffix(".new.jpg")
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(black)
    black.replace(records[0].image)
    other = Cache(records, 24)
    assert other.path != cache.path and other[0][0].max() == 0
    assert Cache(records, 32).path.exists() and other.path.exists(), "caches of several sizes stay side by side"
    assert {path for path in (base / "cache").iterdir() if cache.path.stem in path.name} == set(), "outdated files"


class EagerPool:
    """Replaces ThreadPoolExecutor: all results exist before the first is used, as when writing is slower."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, work, items):
        return iter([work(item) for item in items])


def test_a_cache_is_built_in_constant_memory(base, monkeypatch):
    monkeypatch.setattr(cache_module, "ThreadPoolExecutor", EagerPool)
    records, size, peaks = find_records(base, "Test"), 64, []
    for repeats in (6, 18):
        tracemalloc.start()
        cache = Cache(repeats * records, size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        np.testing.assert_array_equal(cache[-1][0], cache[len(records) - 1][0])
    assert peaks[1] < peaks[0] + 12 * len(records) * size * size * 4 / 2, "half of the bytes of the added images"


def test_two_at_once_build_one_cache(base, monkeypatch):
    records, decoded = find_records(base, "Test"), []
    load = cache_module.load_picture
    for module in ("cache", "pet"):
        monkeypatch.setattr(f"dataset.{module}.load_picture", lambda path: decoded.append(path) or load(path))
    with ThreadPoolExecutor(4) as pool:  # each with a lock of its own, as processes have
        caches = list(pool.map(lambda _: Cache(records, 24), range(4)))
    assert sorted(decoded) == sorted(path for record in records for path in (record.image, record.label))
    assert all(np.array_equal(cache[3][0], caches[0][3][0]) for cache in caches)


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_cache_is_built_where_files_cannot_be_locked(base, monkeypatch, code):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with acquire_lock(base / "a.lock"), pytest.raises(InputError, match="busy"):
        acquire_lock(base / "a.lock", timeout=0, busy="busy")
    assert Cache(find_records(base, "Test"), 24)[0][0].any()


def test_an_incomplete_cache_is_never_read_and_errors_of_writing_are_told(base, monkeypatch):
    records = find_records(base, "Test")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module, "resize_mask", fail)
    with pytest.raises(InputError, match=r"cannot write the cache.*No space left"):
        Cache(records, 24)
    assert all(path.name == ".lock" for path in (base / "cache").iterdir())
    monkeypatch.undo()
    cache = Cache(records, 24)
    assert cache[0][0].any()
    cache.path.write_bytes(cache.path.read_bytes()[:1000])  # an incomplete copy of the folder
    assert Cache(records, 24)[len(records) - 1][0].any()

    shutil.rmtree(base / "cache")
    (base / "cache").touch()  # a file where the folder must be
    with pytest.raises(InputError, match="cannot write the cache"):
        Cache(records, 24)
