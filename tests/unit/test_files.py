"""utils/files.py: whole files or none."""

from __future__ import annotations

import pytest

from utils.files import InputError, atomic_path, read_json, remove_leftovers, write_json


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.json"
    write_json(path, {"value": 1})
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert read_json(path) == {"value": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        read_json(tmp_path / "config.json")


def test_leftovers_of_killed_processes_go(tmp_path):
    (tmp_path / ".last.pt.123.tmp").touch()
    (tmp_path / "last.pt").touch()
    remove_leftovers(tmp_path, idle_seconds=600)
    assert len(list(tmp_path.iterdir())) == 2, "another process may be at work on it"
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
