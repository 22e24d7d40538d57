"""The original photographs and labels: download them, recognize their layout, pair photographs with labels."""

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
    *lists, trimap_folder = (base / "annotations" / name for name in ANNOTATIONS)
    for path in (*lists, trimap_folder):
        if not path.exists():
            hint = f"unpack annotations.tar.gz again, or move {path.parent} away and run with --download"
            raise InputError(f"{path} is missing: {hint}")
    originals = Originals(base, "original")
    species, trainval, test = (_read_list(originals, path) for path in lists)
    images, trimaps = _by_stem(originals, base / "images"), _by_stem(originals, trimap_folder)

    for split, path, names in zip(SPLITS, lists[1:], (trainval, test)):
        for name, own_species in names.items():
            if split == "TrainVal" and name in test:
                reason = "in both lists; kept in Test only, so that Test is never trained on"
                originals.leave_out(path, reason, entry=f": {name}")
            elif name not in images:
                originals.leave_out(path, "no such image", entry=f": {name}")
            elif name not in trimaps:
                originals.leave_out(images[name], "image without a label")
            else:
                guess = "cat" if name[0].isupper() else "dog"  # names of cat breeds are capitalized in these data
                value = species.get(name) or own_species or PETS.value(guess)
                originals.pairs.append(Pair(name, split, images[name], trimaps[name], value))
    for name in images.keys() - trainval.keys() - test.keys():
        originals.leave_out(images[name], "in no list (trainval.txt, test.txt)")
    for name in trimaps.keys() - images:
        originals.leave_out(trimaps[name], "label without an image")
    return originals


def _find_report(base: Path) -> Originals:
    originals = Originals(base, "report")
    in_test = {path.stem for path in visible_files(base / "Test" / "color")}
    for split in SPLITS:
        images, labels = (_by_stem(originals, base / split / kind) for kind in ("color", "label"))
        for name, path in images.items():
            if split == "TrainVal" and name in in_test:
                reason = "also in Test and kept there only, so that Test is never trained on; rename it if it differs"
                originals.leave_out(path, reason)
            elif name in labels:
                originals.pairs.append(Pair(name, split, path, labels[name]))
            else:
                originals.leave_out(path, "image without a label")
        for name in labels.keys() - images:
            originals.leave_out(labels[name], "label without an image")
    return originals


def _by_stem(originals: Originals, folder: Path) -> dict[str, Path]:
    """The pictures of a folder by name without suffix; other files are left out."""
    pictures: dict[str, Path] = {}
    for path in visible_files(folder):
        originals.files.append(path)
        if path.name.encode(errors="replace").decode() != path.name:  # Python holds other bytes as lone surrogates
            originals.leave_out(path, "name is not valid UTF-8; rename it")
        elif path.suffix.lower() not in PICTURE_SUFFIXES:
            originals.leave_out(path, f"not a picture by its suffix {path.suffix!r}")
        elif path.stem in pictures:
            originals.leave_out(path, f"same name as {pictures[path.stem].name}")
        else:
            pictures[path.stem] = path
    return pictures


def _read_list(originals: Originals, path: Path) -> dict[str, int | None]:
    """Species by name from lines `NAME CLASS-ID SPECIES BREED-ID`; None if a line holds only the name."""
    originals.files.append(path)
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
    for name in ("images", "annotations"):  # may be half unpacked; complete archives are kept
        shutil.rmtree(unpacked / name, ignore_errors=True)
    try:
        OxfordIIITPet(str(unfinished), download=True)
    except Exception as error:  # network, server, checksum: torchvision raises many kinds of errors
        hint = "fetch images.tar.gz and annotations.tar.gz from https://www.robots.ox.ac.uk/~vgg/data/pets/ yourself"
        hint = f"Run again to continue, or {hint}, unpack both in {base} and run without --download."
        raise InputError(f"the download failed ({error}). {hint}") from error
    for name in ("annotations", "images"):  # images last: only then is the layout complete
        if not (base / name).exists():
            (unpacked / name).replace(base / name)
    shutil.rmtree(unfinished)


def no_layout(base: Path) -> str:
    """The error text for a folder in neither layout."""
    expected = "images/ and annotations/ (Oxford-IIIT), or TrainVal/ and Test/ with pictures in color/ and label/"
    found = ", ".join(sorted(path.name for path in base.iterdir())[:8]) or "nothing"
    hint = "--download fetches the data, --synthetic N draws some."
    return f"{base} is in neither layout. Expected {expected}; found: {found}. {hint}"


def relative(path: Path, base: Path) -> str:
    """The path below `base`, as reports name it."""
    return path.relative_to(base).as_posix()
