"""Files that are written completely or not at all, locks, and the error that a user can fix."""

import csv
import errno
import hashlib
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
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # a file name has at most 255 bytes on most systems
    temporary = path.with_name(f".{name}.{os.getpid()}{time.time_ns()}.tmp")  # unique across machines
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error  # writing names no file
    finally:
        with suppress(OSError):  # of the unfinished file; the error that left it unfinished is the one to report
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of `atomic_path` that killed processes left in `folder`. Call it under the folder's lock,
    because a living process may still write to them."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


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


def fit_name(stem: str, ending: str) -> str:
    """`stem` + `ending`; a stem that makes a file name longer than 255 bytes is cut, and gets a hash of the whole."""
    room = 255 - len(os.fsencode(ending))
    name = os.fsencode(stem)
    if len(name) > room:
        digest = hashlib.sha256(name).hexdigest()[:8]
        stem = f"{name[: room - 9].decode(errors='ignore')}~{digest}"
    return stem + ending


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: dict) -> None:
    """Write `content` atomically as indented JSON."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> dict:
    """Read a JSON file that holds an object. InputError names a file that does not."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore it from a copy, or use another folder") from None
    return content


def is_file(path: Path) -> bool:
    """Whether `path` is a file that can be reached; False where `Path.is_file` raises (permission, overlong name)."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_dir(path: Path) -> bool:
    """Whether `path` is a folder that can be reached."""
    try:
        return path.is_dir()
    except OSError:
        return False


def format_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """CSV text with a header line, UTF-8; bytes of file names that are no UTF-8 stay as they are."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode(errors="surrogateescape")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header line, as dicts of strings. InputError names a file that is not CSV."""
    try:
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return list(csv.DictReader(file))
    except csv.Error as error:
        raise InputError(f"{path} is not CSV ({error}): restore it from a copy, or make it again") from None
