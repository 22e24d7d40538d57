"""python dataset/dataset_prep.py BASE_DIR [--download | --synthetic N]

Check a folder of pet photographs and labels, sort it by species, sample the prompt points. Run once; safe to run again.

BASE_DIR holds the Oxford-IIIT layout (images/, annotations/) or the report's (TrainVal/ and Test/ with color/ and
label/). The originals stay as they are; the prepared files lie beside them:

  BASE_DIR/{TrainVal,Test}/color/{cats,dogs}/NAME.jpg   linked to the original where the file system can
  BASE_DIR/{TrainVal,Test}/label/{cats,dogs}/NAME.png   indexed: 0 background, 1 cat, 2 dog, 255 boundary
  BASE_DIR/{TrainVal,Test}/points.csv                   name, class, x, y: one click on the pet, one on the background
  BASE_DIR/{TrainVal,Test}/prompt/                      with --save-heatmaps: heatmap and mask of every point
  BASE_DIR/prep_report.json                             counts, and every file that was left out with the reason
  BASE_DIR/stale/                                       prepared files that no longer match the originals, if any

Exit code 0: prepared. 1: nothing usable, or --strict and a file was left out. 2: wrong arguments.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from dataset.originals import SPLITS, Originals, Pair, download, find_originals, no_layout, relative, visible_files
from utils.config import run_script
from utils.dataset import PETS, ClassTable, decode_trimap
from utils.dataset_prep import sample_points
from utils.files import (
    InputError,
    atomic_path,
    format_csv,
    read_json,
    remove_leftovers,
    write_bytes,
    write_json,
)
from utils.image import load_picture, to_rgb

VERSION = 2  # increase when the prepared files change, so that every folder is prepared again
REPORT = "prep_report.json"


@dataclass
class Outcome:
    """The result for a pair: left out if `reason` is set, else written under `folder`."""

    pair: Pair
    reason: str = ""
    folder: str = ""
    converted: str = ""
    pixels: bytes = b""  # hash of the decoded photograph
    points: list[tuple[str, int, int]] = field(default_factory=list)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_dir", type=Path, metavar="BASE_DIR")
    origin = parser.add_mutually_exclusive_group()
    origin.add_argument("--download", action="store_true", help="fetch the Oxford-IIIT Pet data into BASE_DIR first")
    origin.add_argument("--synthetic", type=int, metavar="N", help="draw N synthetic pets into BASE_DIR first")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument(
        "--strict", action="store_true", help="exit with code 1 if a file was left out (in the original data some are)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the points and the synthetic pets (default: 0)")
    parser.add_argument(
        "--save-heatmaps", action="store_true", help="also write each point's heatmap and mask as pictures"
    )
    args = parser.parse_args(argv)
    base: Path = args.base_dir

    if args.synthetic is not None and args.synthetic < 8:
        parser.error(
            f"--synthetic: at least 8 pictures are needed for both species in both splits, got {args.synthetic}"
        )
    if args.processes < 1:
        parser.error(f"--processes: at least 1, got {args.processes}")
    if args.seed < 0:
        parser.error(f"--seed: at least 0, got {args.seed}")
    creates = args.download or args.synthetic is not None
    if not base.exists() and not creates:
        parser.error(f"{base} does not exist. Name the folder that holds the photographs, or add --download.")
    if base.exists() and not base.is_dir():
        parser.error(f"{base} is not a directory")

    with _write_errors(base):
        base.mkdir(parents=True, exist_ok=True)
        if args.download:
            download(base)
        elif args.synthetic is not None:
            from dataset.synthetic import draw_dataset

            draw_dataset(base, args.synthetic, seed=args.seed)
        report, fresh = prepare(base, processes=args.processes, seed=args.seed)
        print(summary(base, report, fresh))
        if args.save_heatmaps:
            from dataset.pet_heatmap import save_heatmaps  # imports torch, which the preparation does not need

            for split in SPLITS:
                if any(report["counts"][split].values()):
                    print(f"  {save_heatmaps(base, split)} heatmaps and masks: {base / split / 'prompt'}")
    kept = sum(sum(counts.values()) for counts in report["counts"].values())
    return 1 if not kept or (args.strict and report["left_out"]) else 0


def prepare(base: Path, *, processes: int = 1, seed: int = 0, class_table: ClassTable = PETS) -> tuple[dict, bool]:
    """Prepare `base`; returns the report and whether there was anything to do.

    Raises InputError when `base` is in neither layout.
    """
    old = read_json(base / REPORT) if (base / REPORT).exists() else None
    originals = find_originals(base)
    if originals is None:
        if old is None:
            raise InputError(no_layout(base))
        # Prepared elsewhere and copied here without its originals.
        present = Counter(path.relative_to(base).parts[0] for path in _prepared_files(base, class_table))
        expected = {split: 2 * sum(counts.values()) for split, counts in old["counts"].items()}
        if any(present[split] != expected[split] for split in SPLITS):
            raise InputError(
                f"{base} holds {dict(present)} prepared files, expected {expected}: copy the whole folder again"
            )
        return old, False
    if old is not None and old.get("fingerprint") == _fingerprint(originals, seed, class_table):
        return old, False

    # Without its report a folder counts as not prepared, so that an interrupted run never counts as finished.
    (base / REPORT).unlink(missing_ok=True)
    for folder in [
        base / split / kind / species
        for split in SPLITS
        for kind in ("color", "label")
        for species in class_table.species
    ]:
        remove_leftovers(folder)
    work = partial(process_pair, base=base, seed=seed, class_table=class_table)
    outcomes = list(tqdm(_process_all(work, originals.pairs, processes), "prepare", len(originals.pairs), unit="image"))
    _leave_out_copies(outcomes)
    kept = [outcome for outcome in outcomes if not outcome.reason]
    set_aside = _move_strays(base, kept, class_table)
    for split in SPLITS:
        _write_points(base / split / "points.csv", [outcome for outcome in kept if outcome.pair.split == split])

    report = _make_report(originals, outcomes, class_table) | {"set_aside": set_aside}
    report["fingerprint"] = _fingerprint(originals, seed, class_table)
    write_json(base / REPORT, report)
    return report, True


def _make_report(originals: Originals, outcomes: list[Outcome], class_table: ClassTable) -> dict:
    """Counts, warnings, and the files that were left out or converted."""
    base, species = originals.base, class_table.species
    kept = [outcome for outcome in outcomes if not outcome.reason]
    found = Counter((outcome.pair.split, outcome.folder) for outcome in kept)
    left_out = originals.left_out + [
        (relative(outcome.pair.image, base), outcome.reason) for outcome in outcomes if outcome.reason
    ]
    return {
        "version": VERSION,
        "layout": originals.layout,
        "classes": list(class_table.names),
        "synthetic": (base / "SYNTHETIC.txt").exists(),
        "counts": {split: {folder: found[split, folder] for folder in species} for split in SPLITS},
        "warnings": [
            f"{split} holds no {folder}" for split in SPLITS for folder in species if not found[split, folder]
        ],
        "left_out": [{"file": file, "reason": reason} for file, reason in sorted(left_out)],
        "converted": [
            {"file": relative(outcome.pair.image, base), "reason": outcome.converted}
            for outcome in kept
            if outcome.converted
        ],
    }


def _process_all(work: Callable[[Pair], Outcome], pairs: list[Pair], processes: int) -> Iterator[Outcome]:
    if processes == 1:
        yield from map(work, pairs)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start_worker)
    try:
        yield from pool.map(work, pairs, chunksize=8)
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


def process_pair(pair: Pair, *, base: Path, seed: int, class_table: ClassTable = PETS) -> Outcome:
    """Check one pair and write its prepared image and label. OSError when they cannot be written."""
    try:
        image = load_picture(pair.image)
        label = load_picture(pair.label)
        classes = class_table.decode_label(label) if pair.species is None else decode_trimap(label, pair.species)
    except InputError as error:
        return Outcome(pair, str(error).removeprefix(f"{pair.image}: ").replace(f"{pair.label}: ", "its label is "))
    if image.size != label.size:
        return Outcome(pair, "image is {}x{}, its label {}x{}".format(*image.size, *label.size))
    found = [folder for folder, value in class_table.species.items() if (classes == value).any()]
    if len(found) != 1:
        return Outcome(pair, f"{' and '.join(found)} in one label" if found else "no pet in its label")

    (folder,) = found
    prepared = base / pair.split / "color" / folder / f"{pair.name}.jpg"
    rgb = to_rgb(image)
    converted = ""
    if image.format == "JPEG":
        _link(pair.image, prepared)
    else:
        converted = f"is a {image.format} picture ({image.mode}); converted to JPEG"
        try:
            content = _encode(rgb, "JPEG", quality=95, subsampling=0)
        except OSError as error:  # not a disk error: the picture has more than 65535 pixels on an edge
            return Outcome(pair, f"cannot be saved as JPEG ({error})")
        _write_if_changed(prepared, content)
    # Compression level 1 takes less than half of the default's time; labels remain a few kB.
    _write_if_changed(
        base / pair.split / "label" / folder / f"{pair.name}.png",
        _encode(class_table.encode_label(classes), "PNG", compress_level=1),
    )
    rng = np.random.default_rng([seed, zlib.crc32(pair.name.encode())])  # the points do not depend on other files
    pixels = hashlib.blake2b(rgb.tobytes(), digest_size=16, salt=str(rgb.size).encode()).digest()
    return Outcome(pair, "", folder, converted, pixels, sample_points(classes, class_table, rng))


def _leave_out_copies(outcomes: Iterable[Outcome]) -> None:
    """Leave out TrainVal pictures that are also in Test, or twice in TrainVal, where they could be on both sides of the
    train/validation split. Test itself stays complete, so that scores are comparable with published ones."""
    seen: dict[bytes, Pair] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.pair.split != "Test"):
        if outcome.reason:
            continue
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


def _prepared_files(base: Path, class_table: ClassTable) -> list[Path]:
    return [
        path
        for split in SPLITS
        for kind in ("color", "label")
        for folder in class_table.species
        for path in visible_files(base / split / kind / folder)
    ]


def _write_points(path: Path, outcomes: list[Outcome]) -> None:
    ordered = sorted(outcomes, key=lambda outcome: outcome.pair.name)
    rows = [[outcome.pair.name, *point] for outcome in ordered for point in outcome.points]
    _write_if_changed(path, format_csv(["name", "class", "x", "y"], rows))


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


def _fingerprint(originals: Originals, seed: int, class_table: ClassTable) -> str:
    """Hash of the classes and of the state of every original and prepared file: if it is equal, nothing is to do."""
    base = originals.base
    files = [*originals.files, *_prepared_files(base, class_table), *(base / split / "points.csv" for split in SPLITS)]
    states = []
    for path in files:
        state = path.stat() if path.exists() else None
        states.append((relative(path, base), state and state.st_size, state and state.st_mtime_ns))
    return hashlib.sha256(repr((VERSION, seed, class_table.as_plain_dict(), states)).encode()).hexdigest()


def summary(base: Path, report: dict, fresh: bool) -> str:
    """The report in a few lines: counts, and the files that were left out with the reasons."""
    lines = [
        f"{base}: {'prepared' if fresh else 'already prepared, nothing to do'} ({report['layout']} layout"
        + (", SYNTHETIC drawings" if report["synthetic"] else "")
        + ")"
    ]
    for split, counts in report["counts"].items():
        lines.append(f"  {split:9}" + ", ".join(f"{count} {folder}" for folder, count in counts.items()))
    lines += [f"  warning: {warning}; training and a fair test need all species" for warning in report["warnings"]]
    lines += [f"  converted: {row['file']}: {row['reason']}" for row in report["converted"][:20]]
    if report["set_aside"]:
        lines.append(
            f"  moved to {base / 'stale'}: {len(report['set_aside'])} prepared files that no longer match the originals"
        )
    if report["left_out"]:
        kinds = Counter(row["reason"] for row in report["left_out"])
        lines.append(f"  left out: {len(report['left_out'])} (all of them in {base / REPORT})")
        shown = report["left_out"][:20]
        lines += [f"    {row['file']}: {row['reason']}" for row in shown]
        if len(report["left_out"]) > len(shown):
            lines += [f"    in all: {count} x {reason}" for reason, count in kinds.most_common(10)]
    return "\n".join(lines)


@contextmanager
def _write_errors(base: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot read or write in {base}: {error}. Free space or change the permissions, then run again: "
            "the originals are untouched, and files that are already prepared are checked again."
        ) from error


if __name__ == "__main__":
    run_script(main)
