"""Files that are written completely or not at all, locks, and the error that a user can fix."""

import csv
import errno
import io
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout


class InputError(Exception):
    """An argument, file or shape that the user can correct. Scripts print the message and exit with code 1."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. It replaces `path` when the block succeeds and is removed when it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}{time.time_ns()}.tmp")  # unique across machines
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, idle_seconds: float = 0) -> None:
    """Delete temporary files of `atomic_path` that killed processes left in `folder`, if older than `idle_seconds`."""
    for path in folder.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # another process may have finished it in the meantime
            if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and time.time() - path.stat().st_mtime >= idle_seconds:
                path.unlink()


def acquire_lock(path: Path, *, timeout: float = -1, busy: str = "") -> ExitStack:
    """Acquire the lock of the file `path`; it is released by `.close()`, at the end of a `with`, or by process exit.

    Waits `timeout` seconds for another process that holds it (-1: without limit), then raises InputError with the
    message `busy`. Where the file system has no locks, filelock uses the existence of a file instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: BaseFileLock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=timeout)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):  # filelock itself handles only ENOSYS
                raise
            lock = SoftFileLock(path.with_name(f"{path.name}.soft"))
            lock.acquire(timeout=timeout)
    except Timeout:
        raise InputError(busy) from None
    held = ExitStack()  # a `with` on the lock itself would acquire it a second time
    held.callback(lock.release)
    return held


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict) -> None:
    """Write `content` atomically as indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON file. InputError names a file that is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore it from a copy, or use another folder") from None


def format_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """CSV text with a header line, UTF-8."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line, as dicts of strings."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
