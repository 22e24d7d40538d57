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
import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.originals import (
    BREEDS,
    REPORT,
    SPLITS,
    Originals,
    Pair,
    breed_of,
    download,
    file_state,
    find_originals,
    no_layout,
    read_report,
    relative,
    visible_files,
)
from dataset.synthetic import draw_dataset
from utils.config import flag, parse, run_script
from utils.dataset import PETS, ClassTable, decode_trimap
from utils.dataset_prep import sample_points
from utils.files import (
    InputError,
    acquire_lock,
    atomic_path,
    format_csv,
    remove_leftovers,
    write_bytes,
    write_json,
)
from utils.image import load_picture, to_rgb, turn_upright
from utils.machine import usable_cores

VERSION = 3  # increase when the prepared files change, so that every folder is prepared again


@dataclass
class Outcome:
    """The result for a pair: left out if `reason` is set, else written under `folder`."""

    pair: Pair
    reason: str = ""
    file: Path | None = None  # that the reason is about (default: the photograph)
    failed: bool = False  # the machine could not read it, so that it is tried again next time
    exif: str = ""  # "stored" or "upright": how it was used, if its EXIF block turns it and its label fits both ways
    folder: str = ""
    converted: str = ""
    pixels: bytes = b""  # hash of the decoded photograph
    points: list[tuple[str, int, int]] = field(default_factory=list)


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
        _write_if_changed(base / split / "points.csv", format_csv(["name", "class", "x", "y"], rows))

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


def process_pair(pair: Pair, **options: Any) -> Outcome:
    """`_process_pair`; a pair that does not fit in memory has failed."""
    try:
        return _process_pair(pair, **options)
    except MemoryError:
        return Outcome(pair, "does not fit in memory; scale it down", pair.image, failed=True)


def _process_pair(
    pair: Pair,
    *,
    base: Path,
    seed: int,
    exif: str | None = None,
    oxford: bool = False,
    class_table: ClassTable = PETS,
) -> Outcome:
    """Check one pair and write its prepared image and label. OSError when a file cannot be written.

    `exif` is `--exif`; `oxford`: it is in Oxford's layout, whose labels were drawn on the stored pixels.
    """
    read = _read_pair(pair, class_table)
    if isinstance(read, Outcome):
        return read
    image, classes = read
    turned, label_size = turn_upright(image), classes.shape[::-1]
    fits = {"stored": image.size == label_size, "upright": turned.size == label_size}
    default = "stored" if oxford or breed_of(pair.name) in BREEDS else "upright"
    way = exif or (default if fits[default] else next((way for way in fits if fits[way]), default))
    chosen = turned if way == "upright" else image
    if not fits[way]:
        return Outcome(pair, "image is {}x{}, its label {}x{}".format(*chosen.size, *label_size))
    found = [folder for folder, value in class_table.species.items() if (classes == value).any()]
    if len(found) != 1:
        return Outcome(pair, f"{' and '.join(found)} in one label" if found else "no pet in its label", pair.label)

    (folder,) = found
    prepared = base / pair.split / "color" / folder / f"{pair.name}.jpg"
    rgb = to_rgb(chosen)
    changes = [] if image.format == "JPEG" else [f"is a {image.format} picture ({image.mode})"]
    changes += [] if chosen is image else ["its EXIF block turns it"]
    if not changes:
        _link(pair.image, prepared)
    else:
        try:
            content = _encode(rgb, "JPEG", quality=95, subsampling=0)
        except OSError as error:  # not a disk error: the picture has more than 65500 pixels on an edge
            return Outcome(pair, f"cannot be saved as JPEG ({error}); scale it down")
        _write_if_changed(prepared, content)
    # Compression level 1 takes less than half of the default's time; labels remain a few kB.
    content = _encode(class_table.encode_label(classes), "PNG", compress_level=1)
    _write_if_changed(base / pair.split / "label" / folder / f"{pair.name}.png", content)
    rng = np.random.default_rng([seed, zlib.crc32(pair.name.encode())])  # the points do not depend on other files
    return Outcome(
        pair,
        folder=folder,
        converted=f"{', '.join(changes)}; converted to JPEG" if changes else "",
        exif=way if turned is not image and all(fits.values()) and exif is None else "",
        pixels=hashlib.blake2b(rgb.tobytes(), digest_size=16, salt=str(rgb.size).encode()).digest(),
        points=sample_points(classes, class_table, rng),
    )


def _read_pair(pair: Pair, class_table: ClassTable) -> tuple[Image.Image, np.ndarray] | Outcome:
    """The photograph, and the classes (H, W) of its label; the outcome if one of them cannot be used."""
    file = pair.image
    try:
        image = load_picture(pair.image)
        if image.mode != "RGB":
            to_rgb(image)  # raises if its values are no brightness
        file = pair.label
        label = load_picture(pair.label)
        if turn_upright(label) is not label:
            raise InputError("its EXIF block turns it, which is ambiguous for a label; save it without")
        classes = class_table.decode_label(label) if pair.species is None else decode_trimap(label, pair.species)
    except InputError as error:
        return Outcome(pair, str(error).removeprefix(f"{file}: "), file)
    except OSError as error:  # no permission, a failing disk: not a damaged file
        return Outcome(pair, f"cannot be read ({error.strerror}); run again when it can", file, failed=True)
    return image, classes


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


def _link(original: Path, prepared: Path) -> None:
    if prepared.exists() and prepared.samefile(original):
        return
    with atomic_path(prepared) as temporary:
        try:
            os.link(original.resolve(), temporary)
        except OSError:  # on another file system, or on one without hard links
            shutil.copyfile(original, temporary)


def _encode(picture: Image.Image, picture_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, picture_format, **options)
    return buffer.getvalue()


def _write_if_changed(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        write_bytes(path, content)


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
