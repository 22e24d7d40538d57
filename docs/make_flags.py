"""Write docs/flags.md, the flags of every script with their defaults: python docs/make_flags.py"""

import importlib
import re
import sys
import typing
from dataclasses import Field, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from models import MODELS
from study.experiments import LISTS
from utils.config import describe_flag, flag_name
from utils.files import write_bytes

OTHERS = "predict study/run study/report dataset/dataset_prep dataset/exploration dataset/perturbation benchmarks/run"
SCRIPTS = [f"{model}/{kind}" for kind in ("train", "test") for model in MODELS] + OTHERS.split()
SHARED = {  # dataclasses that scripts inherit flags from, and the headings of their tables
    "TrainConfig": "All train.py", "ClipConfig": "train.py of the models on CLIP",
    "TestConfig": "All test.py", "ClipTestConfig": "test.py of the models on CLIP",
}  # fmt: skip
MACHINE = {"workers": "one per core, at most 8", "processes": "one per core"}  # defaults that depend on the machine
INTRODUCTION = """Written by `python docs/make_flags.py` from the dataclasses of the scripts; do not edit it. A flag is
listed once, and again where a script changes its default. A flag that is on or off is turned off by `--no-NAME`.
"""


def flags_markdown() -> str:
    """The content of docs/flags.md."""
    sections = {"# Flags": INTRODUCTION}
    for script in SCRIPTS:
        config = importlib.import_module(script.replace("/", ".")).Config
        for level in config.__mro__[-2::-1]:  # from the most general class to the script's own, without `object`
            inherited = [field for parent in level.__mro__[1:-1] for field in fields(parent)]
            hints, own = typing.get_type_hints(level), [one for one in fields(level) if one not in inherited]
            table = "| flag | default | help |\n|---|---|---|\n" + "".join(row(one, hints[one.name]) for one in own)
            parents = " and ".join(f'"{SHARED[parent.__name__]}"' for parent in level.__mro__[-2:0:-1])
            title = f"## {SHARED.get(level.__name__, f'{script}.py')}"
            sections[title] = f"In addition to {parents}:\n\n{table}" if parents else table
    for name, experiments in LISTS.items():
        lines = [f"| `{one.name}` | `{' '.join((one.model, *one.flags))}` |" for one in experiments]
        sections[f"## Experiments: `{name}`"] = "\n".join(["| experiment | model and flags |", "|---|---|", *lines, ""])
    return "\n".join(f"{title}\n\n{section}" for title, section in sections.items())


def row(field: Field, hint: typing.Any) -> str:
    """A row of the table. `describe_flag` appends the default to the help text; the table has a column for it."""
    name, text, default = flag_name(field.name), describe_flag(field), "none"
    if found := re.search(r" \(default: (.*?)\)", text):
        text, default = text.replace(found[0], "", 1), found[1] if field.default is None else f"`{found[1]}`"
        default = default.replace("; with --recipe strong: ", "`, strong: `")
    if field.metadata.get("positional"):
        name, default = field.name.upper(), "required"
    if hint is bool:
        default = "on" if field.default else "off"
    if typing.get_origin(hint) is typing.Literal:
        text += f" ({', '.join(f'`{choice}`' for choice in typing.get_args(hint))})"
    return f"| `{name}` | {MACHINE.get(field.name, default)} | {text} |\n"


if __name__ == "__main__":
    write_bytes(ROOT / "docs/flags.md", flags_markdown().encode())
