"""python dataset/dataset_prep.py BASE_DIR [--download | --synthetic N]

Check a folder of pet photographs and labels, sort it by species, sample the prompt points. Run once; safe to run again.

BASE_DIR holds the Oxford-IIIT layout (images/, annotations/) or the report's (TrainVal/ and Test/ with color/ and
label/). The originals stay as they are; the prepared files lie beside them:

  BASE_DIR/{TrainVal,Test}/color/{cats,dogs}/NAME.jpg   linked to the original where the file system can
  BASE_DIR/{TrainVal,Test}/label/{cats,dogs}/NAME.png   indexed: 0 background, 1 cat, 2 dog, 255 boundary
  BASE_DIR/{TrainVal,Test}/points.csv                   name, class, x, y: one click on the pet, one on the background
  BASE_DIR/{TrainVal,Test}/prompt/                      with --save-heatmaps: heatmap and mask of every point
  BASE_DIR/prep_report.json                             counts, the state of every prepared file, and every file that
                                                        was left out with the reason
  BASE_DIR/stale/                                       prepared files that no longer match the originals, if any

Exit code 0: prepared. 1: nothing usable, a file could not be read and is tried again next time, or --strict and a file
was left out. 2: wrong arguments.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from dataset.originals import (
    REPORT,
    SPLITS,
    Originals,
    Pair,
    download,
    file_state,
    find_originals,
    no_layout,
    read_report,
    relative,
    visible_files,
)
from dataset.pairs import Outcome, process_pair, write_if_changed
from dataset.synthetic import draw_dataset
from utils.config import flag, parse
from utils.dataset import PETS, ClassTable
from utils.files import (
    InputError,
    acquire_lock,
    format_csv,
    remove_leftovers,
    write_json,
)
from utils.machine import usable_cores
from utils.script import run_script

VERSION = 3  # increase when the prepared files change, so that every folder is prepared again


@dataclass
class Config:
    """The flags."""

    base_dir: Path = flag(None, "folder of the photographs", positional=True)
    download: bool = flag(False, "fetch the Oxford-IIIT Pet data into BASE_DIR first")
    synthetic: int | None = flag(None, "draw this many synthetic pets into BASE_DIR first", low=8)
    processes: int | None = flag(None, "processes (default: one per core)", low=1)
    strict: bool = flag(False, "exit with code 1 if a file was left out (in the original data some are)")
    seed: int = flag(0, "seed of the points and the synthetic pets", low=0)
    exif: Literal["upright", "stored"] | None = flag(
        None,
        "whether labels fit the photographs as their EXIF blocks turn them, or as they are stored (default: as the "
        "sizes tell; if both fit, stored for Oxford's photographs and upright for others)",
    )
    save_heatmaps: bool = flag(False, "also write each point's heatmap and mask as pictures")

    def __post_init__(self) -> None:
        if self.download and self.synthetic:
            raise InputError("--download and --synthetic fill the same folder: give one of them")
        if not self.base_dir.exists() and not self.download and not self.synthetic:
            raise InputError(f"{self.base_dir} does not exist. Name the folder of the photographs, or add --download.")
        if self.base_dir.exists() and not self.base_dir.is_dir():
            raise InputError(f"{self.base_dir} is not a directory")


def main(argv: list[str] | None = None) -> int:
    config = parse(Config, __doc__, argv)
    base = config.base_dir
    try:
        base.mkdir(parents=True, exist_ok=True)
        options = {"seed": config.seed, "exif": config.exif}
        with _lock(base) if config.download or config.synthetic else nullcontext():
            if config.download:
                download(base)
            elif config.synthetic is not None:
                draw_dataset(base, config.synthetic, seed=config.seed)
        report, fresh = prepare(base, processes=config.processes or usable_cores(), **options)
        print(summary(base, report, fresh))
        if config.save_heatmaps:
            from dataset.pet_heatmap import save_heatmaps  # imports torch, which the preparation does not need

            for split in SPLITS:
                if any(report["counts"][split].values()):
                    print(f"  {save_heatmaps(base, split)} heatmaps and masks: {base / split / 'prompt'}")
    except BrokenPipeError:
        raise
    except OSError as error:
        hint = "Free space or change the permissions, then run again: the originals are untouched."
        raise InputError(f"cannot read or write in {base}: {error}. {hint}") from error
    empty = not any(any(counts.values()) for counts in report["counts"].values())
    return 1 if empty or report["failed"] or (config.strict and report["left_out"]) else 0


def _lock(base: Path) -> ExitStack:
    """The lock of BASE_DIR; InputError when another preparation holds it."""
    busy = f"{base}: another dataset_prep.py is preparing this folder; wait until it is done, then run again"
    return acquire_lock(base / ".prepare.lock", timeout=0, busy=busy)


def prepare(
    base: Path, *, processes: int = 1, seed: int = 0, exif: str | None = None, class_table: ClassTable = PETS
) -> tuple[dict, bool]:
    """Prepare `base`; returns the report and whether there was anything to do.

    InputError for a folder of no layout, or while another process prepares it.
    """
    old = read_report(base) if (base / REPORT).exists() else None
    originals = find_originals(base)
    if originals is None:
        if old is None:
            raise InputError(no_layout(base))
        _check_copy(base, old, class_table)
        return old, False
    if old is not None and old["fingerprint"] == _fingerprint(originals, seed, exif, class_table):
        return old, False
    with _lock(base):
        return _prepare(originals, processes, seed, exif, class_table), True


def _prepare(
    originals: Originals, processes: int, seed: int, exif: str | None, class_table: ClassTable
) -> dict[str, Any]:
    """Write the prepared files and the report; returns it."""
    base = originals.base
    # Without its report a folder counts as not prepared, so that an interrupted run never counts as finished.
    (base / REPORT).unlink(missing_ok=True)
    for folder in (base, *(base / split for split in SPLITS), *_prepared_folders(base, class_table)):
        remove_leftovers(folder)
    work = partial(
        process_pair, base=base, seed=seed, exif=exif, oxford=originals.layout == "original", class_table=class_table
    )
    outcomes = list(tqdm(_process_all(work, originals.pairs, processes), "prepare", len(originals.pairs), unit="image"))
    _leave_out_copies(outcomes)
    kept, failed = [], originals.failed
    for outcome in outcomes:
        if outcome.failed:
            failed.append((relative(outcome.file, base), outcome.reason))
        elif outcome.reason:
            originals.leave_out(outcome.file or outcome.pair.image, outcome.reason)
        else:
            kept.append(outcome)
    moved = _move_strays(base, kept, class_table)
    for split in SPLITS:
        clicks = sorted((outcome.pair.name, outcome.points) for outcome in kept if outcome.pair.split == split)
        rows = [(name, *point) for name, points in clicks for point in points]
        write_if_changed(base / split / "points.csv", format_csv(["name", "class", "x", "y"], rows))

    folders = product(SPLITS, class_table.species)
    found = Counter((outcome.pair.split, outcome.folder) for outcome in kept)
    missing = [f"{split} holds no {folder}" for split, folder in folders if not found[split, folder]]
    report = {
        "version": VERSION,
        "layout": originals.layout,
        "classes": list(class_table.names),
        "synthetic": (base / "SYNTHETIC.txt").exists(),
        "counts": {split: {folder: found[split, folder] for folder in class_table.species} for split in SPLITS},
        "warnings": [f"{what}; training and a fair test need all species" for what in missing] + _exif_warnings(kept),
        "left_out": [{"file": file, "reason": reason} for file, reason in sorted(originals.left_out)],
        "failed": [{"file": file, "reason": reason} for file, reason in sorted(failed)],
        "converted": [
            {"file": relative(outcome.pair.image, base), "reason": outcome.converted}
            for outcome in kept
            if outcome.converted
        ],
        "set_aside": moved,
        "fingerprint": "" if failed else _fingerprint(originals, seed, exif, class_table),  # "": prepare again
        **_states(base, files=_prepared_files(base, class_table), originals=originals.files),
    }
    write_json(base / REPORT, report)
    return report


def _states(base: Path, **groups: Sequence[Path]) -> dict[str, dict[str, str]]:
    """The `file_state` of each file that can be read, by its path below `base`; hard links are read once."""
    seen: dict[tuple[int, int], str] = {}
    found: dict[str, dict[str, str]] = {group: {} for group in groups}
    for group, paths in groups.items():
        for path in paths:
            with suppress(OSError):
                status = path.stat()
                inode = (status.st_dev, status.st_ino)
                if inode not in seen:
                    seen[inode] = file_state(path)
                found[group][relative(path, base)] = seen[inode]
    return found


def _exif_warnings(kept: Sequence[Outcome]) -> list[str]:
    used = Counter(outcome.exif for outcome in kept if outcome.exif)
    return [
        f"turned by their EXIF blocks, fitting their labels both ways: {count} photographs; used {way}. "
        "Look at one; --exif upright or --exif stored decides"
        for way, count in used.items()
    ]


def _check_copy(base: Path, report: dict, class_table: ClassTable) -> None:
    """InputError unless a folder that was copied without its originals is complete and has the classes of the table."""
    classes, names = report["classes"], list(class_table.names)
    if classes != names:
        found = f"{base} was prepared with the classes {classes}, not {names}"
        raise InputError(f"{found}, and its originals are not here: prepare it where they are")
    present = Counter(path.relative_to(base).parts[0] for path in _prepared_files(base, class_table))
    expected = {split: 2 * sum(counts.values()) for split, counts in report["counts"].items()}
    if any(present[split] != expected[split] for split in SPLITS):
        raise InputError(f"{base} holds {dict(present)} prepared files, not {expected}: copy the whole folder again")


def _process_all(work: Callable[[Pair], Outcome], pairs: list[Pair], processes: int) -> Iterator[Outcome]:
    if processes == 1:
        yield from map(work, pairs)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start_worker)
    try:
        yield from pool.map(work, pairs, chunksize=8)
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():  # an interrupted pool does not always stop its workers
            worker.terminate()
        raise
    except BrokenProcessPool:
        raise InputError("a worker process was killed (out of memory?): run again with --processes 1") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the parent then stops its workers, for which SIGTERM must end them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def follow_parent() -> None:  # a worker must not outlive a parent that was killed
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _leave_out_copies(outcomes: Iterable[Outcome]) -> None:
    """Leave out TrainVal pictures that are also in Test, or twice in TrainVal, where they could be on both sides of the
    train/validation split. Test itself stays complete, so that scores are comparable with published ones."""
    seen: dict[bytes, Pair] = {}
    usable = [outcome for outcome in outcomes if not outcome.reason]
    for outcome in sorted(usable, key=lambda outcome: outcome.pair.split != "Test"):
        first = seen.setdefault(outcome.pixels, outcome.pair)
        if first is not outcome.pair and outcome.pair.split == "TrainVal":
            outcome.reason = f"same picture as {first.split} {first.name}"


def _move_strays(base: Path, kept: list[Outcome], class_table: ClassTable) -> list[str]:
    """Move prepared files that are not part of this preparation to BASE_DIR/stale/; returns their names. They are never
    deleted, because one could be the last copy of a lost original."""
    moved = []
    expected = {(outcome.pair.split, outcome.folder, outcome.pair.name) for outcome in kept}
    for path in _prepared_files(base, class_table):
        split, _, folder, file = path.relative_to(base).parts
        if (split, folder, Path(file).stem) not in expected:
            target = base / "stale" / path.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            while target.exists():
                target = target.with_name(f"{target.stem}~{target.suffix}")
            path.replace(target)
            moved.append(relative(path, base))
    return moved


def _prepared_folders(base: Path, class_table: ClassTable) -> list[Path]:
    return [base.joinpath(*parts) for parts in product(SPLITS, ("color", "label"), class_table.species)]


def _prepared_files(base: Path, class_table: ClassTable) -> list[Path]:
    return [path for folder in _prepared_folders(base, class_table) for path in visible_files(folder)]


def _fingerprint(originals: Originals, seed: int, exif: str | None, class_table: ClassTable) -> str:
    """Hash of the classes and of the state of every original and prepared file: if it is equal, nothing is to do."""
    base = originals.base
    files = [*originals.files, *_prepared_files(base, class_table), *(base / split / "points.csv" for split in SPLITS)]
    states = []
    for path in files:
        state = path.stat() if path.exists() else None
        states.append((relative(path, base), state and state.st_size, state and state.st_mtime_ns))
    return hashlib.sha256(repr((VERSION, seed, exif, class_table.as_plain_dict(), states)).encode()).hexdigest()


def summary(base: Path, report: dict, fresh: bool) -> str:
    """The report in a few lines: counts, and the files that were left out with the reasons."""
    state = "prepared" if fresh else "already prepared, nothing to do"
    synthetic = ", SYNTHETIC drawings" if report["synthetic"] else ""
    lines = [f"{base}: {state} ({report['layout']} layout{synthetic})"]
    for split, counts in report["counts"].items():
        lines.append(f"  {split:9}" + ", ".join(f"{count} {folder}" for folder, count in counts.items()))
    lines += [f"  warning: {warning}" for warning in report["warnings"]]
    lines += [f"  FAILED: {row['file']}: {row['reason']}" for row in report["failed"][:20]]
    if len(report["failed"]) > 20:
        lines.append(f"  FAILED: {len(report['failed'])} in all ({base / REPORT})")
    lines += [f"  converted: {row['file']}: {row['reason']}" for row in report["converted"][:20]]
    if moved := report["set_aside"]:
        lines.append(f"  moved to {base / 'stale'}: {len(moved)} prepared files that no longer match the originals")
    if left_out := report["left_out"]:
        lines.append(f"  left out: {len(left_out)} (all of them in {base / REPORT})")
        lines += [f"    {row['file']}: {row['reason']}" for row in left_out[:20]]
        kinds = Counter(row["reason"] for row in left_out) if len(left_out) > 20 else Counter()
        lines += [f"    in all: {count} x {reason}" for reason, count in kinds.most_common(10)]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
