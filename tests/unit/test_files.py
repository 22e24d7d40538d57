"""utils/files.py: atomic writes, locks, JSON and CSV."""

import errno
import subprocess

import pytest
from filelock import FileLock, SoftFileLock

from tests.helpers import ROOT, command
from utils.files import (
    InputError,
    acquire_lock,
    atomic_path,
    format_csv,
    read_csv,
    read_json,
    remove_leftovers,
    write_bytes,
    write_json,
)


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"value": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert read_json(path) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path], "the temporary file is removed"


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    (tmp_path / ".last.pt.123.tmp").touch()
    (tmp_path / "last.pt").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_csv_round_trip(tmp_path):
    write_bytes(tmp_path / "rows.csv", format_csv(["name", "text"], [["a", "é, \n"], ["b", None]]))
    assert read_csv(tmp_path / "rows.csv") == [{"name": "a", "text": "é, \n"}, {"name": "b", "text": ""}]


def break_locks(monkeypatch, number):
    def acquire(lock, **_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(FileLock, "acquire", acquire)


@pytest.mark.parametrize("number", [None, errno.ENOLCK, errno.EOPNOTSUPP])
def test_lock_has_one_holder(tmp_path, monkeypatch, number):
    """Also where the file system has no locks."""
    if number is not None:
        if FileLock is SoftFileLock:
            pytest.skip("no file system here has locks")
        break_locks(monkeypatch, number)
    path = tmp_path / "folder/.lock"
    with acquire_lock(path), pytest.raises(InputError, match="somebody works here"):
        acquire_lock(path, timeout=0, busy="somebody works here")
    acquire_lock(path, timeout=0).close()


def test_other_errors_of_a_lock_are_not_hidden(tmp_path, monkeypatch):
    break_locks(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="no locks here"):
        acquire_lock(tmp_path / ".lock")


HOLD = """
import sys, threading
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from utils.files import acquire_lock

with acquire_lock(Path(sys.argv[2])):
    print("held", flush=True)
    threading.Event().wait()
"""


def test_lock_is_free_after_its_holder_was_killed(tmp_path):
    (tmp_path / "hold.py").write_text(HOLD)
    line = command(tmp_path / "hold.py", ROOT, tmp_path / ".lock")
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(InputError, match="busy"):
                acquire_lock(tmp_path / ".lock", timeout=0, busy="busy")
        finally:
            holder.kill()
    acquire_lock(tmp_path / ".lock", timeout=10).close()
