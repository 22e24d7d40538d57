"""Folders of photographs and labels: download the originals, recognize their layout, pair photographs with labels;
the report of a prepared folder."""

import re
import shutil
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from utils.dataset import PETS
from utils.files import InputError, is_dir, is_file, read_json
from utils.image import HEIF_HINT, HEIF_SUFFIXES, PICTURE_SUFFIXES

SPLITS = ("TrainVal", "Test")
REPORT = "prep_report.json"
ANNOTATIONS = ("list.txt", "trainval.txt", "test.txt", "trimaps")  # all of them are needed in the original layout
SPECIES = {"1": PETS.value("cat"), "2": PETS.value("dog")}  # class of the species numbers in list.txt

# The 37 breeds of the Oxford-IIIT Pet data (Parkhi et al. 2012), whose photographs are named BREED_NUMBER.
CAT_BREEDS = {
    "Abyssinian", "Bengal", "Birman", "Bombay", "British_Shorthair", "Egyptian_Mau", "Maine_Coon", "Persian", "Ragdoll",
    "Russian_Blue", "Siamese", "Sphynx",
}  # fmt: skip
DOG_BREEDS = {
    "american_bulldog", "american_pit_bull_terrier", "basset_hound", "beagle", "boxer", "chihuahua",
    "english_cocker_spaniel", "english_setter", "german_shorthaired", "great_pyrenees", "havanese", "japanese_chin",
    "keeshond", "leonberger", "miniature_pinscher", "newfoundland", "pomeranian", "pug", "saint_bernard", "samoyed",
    "scottish_terrier", "shiba_inu", "staffordshire_bull_terrier", "wheaten_terrier", "yorkshire_terrier",
}  # fmt: skip
BREEDS = dict.fromkeys(CAT_BREEDS, PETS.value("cat")) | dict.fromkeys(DOG_BREEDS, PETS.value("dog"))


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
    """The files of `base`, before any picture is opened. `left_out` and `failed` hold (file, reason)."""

    base: Path
    layout: str
    pairs: list[Pair] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # cannot be read now, and are tried again next time
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
    images, trimaps = _by_stem(originals, base / "images"), _by_stem(originals, trimap_folder)
    for path in sorted((base / "images").iterdir()):
        if is_dir(path) and path.name[0] != ".":
            originals.leave_out(path, "a folder, which is not searched; move its pictures up")
    species, *splits = (_read_list(originals, path, images) for path in lists)
    labels = _match(originals, images, trimaps)

    for split, path, names in zip(SPLITS, lists[1:], splits):
        for name, own_species in names.items():
            # A list may not give the species; then the name tells it, if it is one of Oxford's.
            known = species.get(name, set()) | own_species or {BREEDS.get(breed_of(name))}
            if split == "TrainVal" and name in splits[1]:
                reason = "in both lists; kept in Test only, so that Test is never trained on"
                originals.leave_out(path, reason, entry=f": {name}")
            elif name not in images:
                originals.leave_out(path, "no such image", entry=f": {name}")
            elif name not in labels:
                originals.leave_out(images[name], "image without a label")
            elif len(known) > 1:
                listed = " and ".join(PETS.names[value] for value in sorted(known))
                originals.leave_out(images[name], f"{listed} in the lists (list.txt, {path.name})")
            elif None in known:
                originals.leave_out(images[name], "no list gives its species; add it to list.txt: NAME 1 SPECIES 1")
            else:
                originals.pairs.append(Pair(name, split, images[name], trimaps[labels[name]], *known))
    for name in images.keys() - splits[0].keys() - splits[1].keys():
        originals.leave_out(images[name], "in no list (trainval.txt, test.txt)")
    for name in trimaps.keys() - set(labels.values()):
        originals.leave_out(trimaps[name], "label without an image")
    return originals


def _find_report(base: Path) -> Originals:
    originals = Originals(base, "report")
    in_test = {path.stem for path in visible_files(base / "Test" / "color")}
    for split in SPLITS:
        images, labels = (_by_stem(originals, base / split / kind) for kind in ("color", "label"))
        label_of = _match(originals, images, labels)
        for name, path in images.items():
            if split == "TrainVal" and name in in_test:
                reason = "also in Test and kept there only, so that Test is never trained on; rename it if it differs"
                originals.leave_out(path, reason)
            elif name in label_of:
                originals.pairs.append(Pair(name, split, path, labels[label_of[name]]))
            else:
                originals.leave_out(path, "image without a label")
        for name in labels.keys() - set(label_of.values()):
            originals.leave_out(labels[name], "label without an image")
    return originals


def breed_of(name: str) -> str:
    """The breed in a name as Oxford gives them: "Abyssinian" of "Abyssinian_100"."""
    return name.rpartition("_")[0]


def _plain(name: str) -> str:
    """A name without the differences that people do not see: case, Unicode form, the suffix of a picture."""
    suffix = Path(name).suffix
    name = name.removesuffix(suffix) if suffix.lower() in PICTURE_SUFFIXES else name
    return unicodedata.normalize("NFC", name).casefold()


def match_names(names: Collection[str], known: Collection[str]) -> dict[str, list[str]]:
    """The candidates among `known` for each name: itself, or else those that differ only as `_plain` ignores it."""
    alike = defaultdict(list)
    for candidate in known:
        if candidate not in names:
            alike[_plain(candidate)].append(candidate)
    return {name: [name] if name in known else alike[_plain(name)] for name in names}


def _match(originals: Originals, images: dict[str, Path], labels: dict[str, Path]) -> dict[str, str]:
    """The name of each image's label. Images with several candidates are left out."""
    matched, found = {}, match_names(images, labels)
    claims = Counter(candidates[0] for candidates in found.values() if len(candidates) == 1)
    for name, candidates in found.items():
        if len(candidates) == 1 and claims[candidates[0]] > 1:
            (other, *_) = (one for one in found if found[one] == candidates and one != name)
            reason = f"{labels[candidates[0]].name} could also be the label of {images[other].name}; rename one"
            originals.leave_out(images[name], reason)
            continue
        if len(candidates) == 1:
            matched[name] = candidates[0]
        elif candidates:
            files = " or ".join(labels[candidate].name for candidate in candidates)
            originals.leave_out(images[name], f"its label could be {files}; rename one")
    return matched


def _by_stem(originals: Originals, folder: Path) -> dict[str, Path]:
    """The pictures of a folder by name without suffix; other files are left out."""
    pictures: dict[str, Path] = {}
    for path in visible_files(folder):
        originals.files.append(path)
        if path.name.encode(errors="replace").decode() != path.name:  # Python holds other bytes as lone surrogates
            originals.leave_out(path, "name is not valid UTF-8; rename it")
        elif path.suffix.lower() in HEIF_SUFFIXES - PICTURE_SUFFIXES:
            originals.leave_out(path, f"a HEIC photograph; {HEIF_HINT}")
        elif path.suffix.lower() not in PICTURE_SUFFIXES:
            originals.leave_out(path, f"not a picture by its suffix {path.suffix!r}")
        elif not is_file(path):
            originals.failed.append((relative(path, originals.base), "cannot be read, or a link that leads nowhere"))
        elif path.stem in pictures:
            originals.leave_out(path, f"same name as {pictures[path.stem].name}")
        else:
            pictures[path.stem] = path
    return pictures


def _read_list(originals: Originals, path: Path, images: Collection[str]) -> dict[str, set[int]]:
    """The species by image from lines `NAME CLASS-ID SPECIES BREED-ID`; an empty set if a line holds only the name.

    A name may contain spaces, and differ from the file's in case, Unicode form or by a suffix.
    """
    originals.files.append(path)
    entries: list[tuple[str, set[int]]] = []
    plain = {_plain(name) for name in images}
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if "\ufffd" in line:
            originals.leave_out(path, "not valid UTF-8; save the list in that encoding", entry=f":{number}")
            continue
        fields = re.fullmatch(r"(.+?)\s+\d+\s+(\d+)(\s+\d+)?", line)
        if _plain(line) in plain or len(line.split()) == 1:
            entries.append((line, set()))
        elif fields and fields[2] in SPECIES:
            entries.append((fields[1], {SPECIES[fields[2]]}))
        else:
            originals.leave_out(path, f"cannot read the line {line!r}", entry=f":{number}")

    candidates = match_names({name for name, _ in entries}, images)
    species: dict[str, set[int]] = {}
    for name, own in entries:
        if len(found := candidates[name]) > 1:
            originals.leave_out(path, f"could be {' or '.join(found)}; rename one", entry=f": {name}")
        else:
            species.setdefault(found[0] if found else name, set()).update(own)
    return species


def _read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 as Windows' PowerShell writes it. Other bytes become U+FFFD."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if 0 in content[:2]:  # UTF-16 without its mark: one byte of a Latin letter is zero
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    return content.decode(encoding, errors="replace")


def visible_files(folder: Path) -> list[Path]:
    """Files and links of a folder, sorted, without hidden ones (the original archive has many macOS `._NAME` files)."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and not is_dir(path))


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


def read_report(base: Path) -> dict[str, Any]:
    """The prep_report.json of a prepared folder. InputError when it is damaged, or not of dataset/dataset_prep.py."""
    earlier = {
        "classes": list(PETS.names),
        "failed": [],
        "files": {},
        "originals": {},
        "synthetic": False,
    }  # not in old ones
    try:
        report = earlier | read_json(base / REPORT)
        if wrong := next(_wrong_parts(report), None):
            raise InputError(f"{base / REPORT} has no {wrong} as dataset/dataset_prep.py writes it")
    except InputError as error:
        raise InputError(f"{error}. Move it away, then run: python dataset/dataset_prep.py {base}") from None
    return report


def _wrong_parts(report: dict[str, Any]) -> Iterator[str]:
    """The names of the parts of a report that are missing or of another kind."""
    kinds = {"fingerprint": str, "layout": str, "counts": dict, "files": dict, "originals": dict, "classes": list}
    kinds |= dict.fromkeys(("failed", "left_out", "converted", "warnings", "set_aside"), list)
    for name, kind in kinds.items():
        if not isinstance(report.get(name), kind):
            yield name
    for name in ("failed", "left_out", "converted"):
        if any(not isinstance(row, dict) or not {"file", "reason"} <= row.keys() for row in report[name]):
            yield name
    for name in ("files", "originals"):
        if any(not re.fullmatch(r"\d+ -?\d+ [0-9a-f]{8}", str(state)) for state in report[name].values()):
            yield name
    for split in SPLITS:
        counts = report["counts"].get(split)
        if not isinstance(counts, dict) or any(not isinstance(count, int) for count in counts.values()):
            yield f"counts of {split}"


def file_state(path: Path) -> str:
    """Size, time of the last change and checksum of a file, as the report holds them."""
    state = path.stat()
    return f"{state.st_size} {state.st_mtime_ns} {zlib.crc32(path.read_bytes()):08x}"


def is_unchanged(path: Path, state: str) -> bool:
    """Whether a file has the size and time of `state`, or, as after copying, another time but the same content."""
    size, changed, _ = state.split()
    now = path.stat()
    if now.st_size != int(size):
        return False
    return now.st_mtime_ns == int(changed) or file_state(path).split()[2] == state.split()[2]
