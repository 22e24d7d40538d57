"""The original photographs and labels: download them, recognize their layout, pair photographs with labels."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from utils.dataset import PETS
from utils.files import InputError
from utils.image import PICTURE_SUFFIXES

SPLITS = ("TrainVal", "Test")
ANNOTATIONS = ("list.txt", "trainval.txt", "test.txt", "trimaps")  # all of them are needed in the original layout
SPECIES = {"1": PETS.value("cat"), "2": PETS.value("dog")}  # class of the species numbers in list.txt


@dataclass
class Pair:
    """A photograph and its label. `species` is set if the label is a trimap, which does not contain it."""

    name: str
    split: str
    image: Path
    label: Path
    species: int | None = None


@dataclass
class Originals:
    """The files of `base`, before any picture is opened. `left_out` holds (file, reason)."""

    base: Path
    layout: str
    pairs: list[Pair] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # every file that the result depends on

    def leave_out(self, path: Path, reason: str, *, entry: str = "") -> None:
        """Record that a file, or an entry of a list file, is not used, and the reason."""
        file = relative(path, self.base) + entry
        self.left_out.append((file.encode(errors="backslashreplace").decode(), reason))


def find_originals(base: Path) -> Originals | None:
    """Recognize the layout of `base` and pair images with labels; None if it has neither layout."""
    if (base / "images").is_dir() and (base / "annotations").is_dir():
        return _find_original(base)
    if any(visible_files(base / split / "color") for split in SPLITS):
        return _find_report(base)
    return None


def _find_original(base: Path) -> Originals:
    annotations = base / "annotations"
    for name in ANNOTATIONS:
        if not (annotations / name).exists():
            raise InputError(
                f"{annotations / name} is missing: unpack annotations.tar.gz again, "
                f"or move {annotations} away and run with --download"
            )
    lists = {"TrainVal": annotations / "trainval.txt", "Test": annotations / "test.txt"}
    originals = Originals(base, "original", files=[annotations / "list.txt", *lists.values()])
    images = _by_stem(originals, base / "images")
    trimaps = _by_stem(originals, annotations / "trimaps")
    species = _read_list(originals, annotations / "list.txt")
    listed = {split: _read_list(originals, path) for split, path in lists.items()}

    for split in SPLITS:
        for name, own_species in listed[split].items():
            if split == "TrainVal" and name in listed["Test"]:
                reason = "in both lists; kept in Test only, so that Test is never trained on"
                originals.leave_out(lists[split], reason, entry=f": {name}")
            elif name not in images:
                originals.leave_out(lists[split], "no such image", entry=f": {name}")
            elif name not in trimaps:
                originals.leave_out(images[name], "image without a label")
            else:
                guess = PETS.value(
                    "cat" if name[0].isupper() else "dog"
                )  # breeds of cats are capitalized in these data
                value = species.get(name) or own_species or guess
                originals.pairs.append(Pair(name, split, images[name], trimaps[name], value))
    for name, path in images.items():
        if not any(name in names for names in listed.values()):
            originals.leave_out(path, "in no list (trainval.txt, test.txt)")
    for name, path in trimaps.items():
        if name not in images:
            originals.leave_out(path, "label without an image")
    return originals


def _find_report(base: Path) -> Originals:
    originals = Originals(base, "report")
    in_test = {path.stem for path in visible_files(base / "Test" / "color")}
    for split in SPLITS:
        images = _by_stem(originals, base / split / "color")
        labels = _by_stem(originals, base / split / "label")
        for name, path in images.items():
            if split == "TrainVal" and name in in_test:
                reason = "also in Test and kept there only, so that Test is never trained on; rename it if it differs"
                originals.leave_out(path, reason)
            elif name in labels:
                originals.pairs.append(Pair(name, split, path, labels[name]))
            else:
                originals.leave_out(path, "image without a label")
        for name, path in labels.items():
            if name not in images:
                originals.leave_out(path, "label without an image")
    return originals


def _by_stem(originals: Originals, folder: Path) -> dict[str, Path]:
    """The pictures of a folder by name without suffix; other files are left out."""
    pictures: dict[str, Path] = {}
    for path in visible_files(folder):
        originals.files.append(path)
        if not _is_utf8(path.name):
            originals.leave_out(path, "name is not valid UTF-8; rename it")
        elif path.suffix.lower() not in PICTURE_SUFFIXES:
            originals.leave_out(path, f"not a picture by its suffix {path.suffix!r}")
        elif path.stem in pictures:
            originals.leave_out(path, f"same name as {pictures[path.stem].name}")
        else:
            pictures[path.stem] = path
    return pictures


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # Python represents other bytes by lone surrogates
        return False
    return True


def _read_list(originals: Originals, path: Path) -> dict[str, int | None]:
    """Species by name from lines `NAME CLASS-ID SPECIES BREED-ID`; None if a line holds only the name."""
    names: dict[str, int | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        if len(fields) == 1:
            names[fields[0]] = None
        elif len(fields) >= 3 and fields[2] in SPECIES:
            names[fields[0]] = SPECIES[fields[2]]
        else:
            originals.leave_out(path, f"cannot read the line {line!r}", entry=f":{number}")
    return names


def visible_files(folder: Path) -> list[Path]:
    """Files of a folder, sorted, without hidden ones (the original archive contains many macOS `._NAME` files)."""
    if not folder.is_dir():
        return []
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and entry.name[0] != ".")


def download(base: Path) -> None:
    """Fetch and unpack the Oxford-IIIT Pet data (800 MB) into `base`; torchvision knows the addresses and checksums."""
    if (base / "images").is_dir() and all((base / "annotations" / name).exists() for name in ANNOTATIONS):
        return
    from torchvision.datasets import OxfordIIITPet

    unfinished = base / ".download"
    unpacked = unfinished / "oxford-iiit-pet"
    for name in (
        "images",
        "annotations",
    ):  # may be half unpacked; complete archives are kept
        shutil.rmtree(unpacked / name, ignore_errors=True)
    try:
        OxfordIIITPet(str(unfinished), download=True)
    except Exception as error:  # network, server, checksum: torchvision raises many kinds of errors
        raise InputError(
            f"the download failed ({error}). Run again to continue, or fetch images.tar.gz and annotations.tar.gz from "
            f"https://www.robots.ox.ac.uk/~vgg/data/pets/ yourself, unpack both in {base} and run without --download."
        ) from error
    for name in ("annotations", "images"):  # images last: only then is the layout complete
        if not (base / name).exists():
            (unpacked / name).replace(base / name)
    shutil.rmtree(unfinished)


def no_layout(base: Path) -> str:
    """The error text for a folder in neither layout."""
    found = ", ".join(sorted(path.name for path in base.iterdir())[:8]) or "nothing"
    return (
        f"{base} is in neither layout. Expected images/ and annotations/ (Oxford-IIIT), or TrainVal/color, "
        f"TrainVal/label, Test/color, Test/label with files in them; found: {found}. "
        "--download fetches the data, --synthetic N draws some."
    )


def relative(path: Path, base: Path) -> str:
    """The path below `base`, as it stands in reports."""
    return path.relative_to(base).as_posix()
