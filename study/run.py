"""python study/run.py --data Dataset --out runs/study -- --epochs 30

Prepare and explore the data, train and test every experiment of a list, write the report. Flags after `--` go to every
train.py that has them. Started again with the same flags, it continues where it was stopped.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from study.experiments import LISTS, Experiment
from utils.config import RESUMABLE, Terminated, as_plain_dict, flag, flag_name, parse, run_script
from utils.files import InputError, read_json, write_json

SHARED_WITH_TEST = ("--workers", "--device")  # flags for the trainings that test.py gets, too


@dataclass
class Config:
    """The flags of the study itself."""

    data: Path = flag(Path("Dataset"), "folder of the data; prepared first")
    synthetic: int | None = flag(None, "draw this many pets into --data first", low=8)
    out: Path = flag(Path("runs/study"), "folder of the runs")
    results: Path | None = flag(None, "folder of the report (default: report/ in --out)")
    experiments: Literal["models", "pretraining"] = flag("models", "the list of study/experiments.py to run")
    only: list[str] | None = flag(None, "only these experiments of the list")
    seeds: int = flag(1, "runs of each experiment, with the seeds 0, 1, ...", low=1)
    perturb: bool = flag(True, "also test under all perturbations")


class Planned(NamedTuple):
    """One run of the study: its experiment, its folder, and its train.py's flags and parsed Config."""

    experiment: Experiment
    folder: Path
    flags: list[str]
    config: Any

    @property
    def checkpoint(self) -> Path:
        from models import MODELS

        return self.folder / MODELS[self.experiment.model].checkpoint

    def is_tested(self, perturb: bool) -> bool:
        """Whether test.py has written its last file."""
        return (self.checkpoint.parent / "test" / ("robustness.json" if perturb else "metrics.json")).exists()


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config, passed = parse(Config, __doc__, arguments[:split]), group_flags(arguments[split + 1 :])
    runs = plan(config, passed)
    refuse_other_settings(config, passed)
    synthetic = ["--synthetic", str(config.synthetic)] if config.synthetic else []
    execute(["dataset/dataset_prep.py", str(config.data), *synthetic])
    announce(config, runs)
    check_clip([run for run in runs if not run.is_tested(config.perturb)])
    write_json(config.out / "config.json", settings(config, passed))  # only now: a study that cannot start leaves none
    execute(["dataset/exploration.py", str(config.data), "--out", str(config.out / "exploration")])
    shared = [part for name in SHARED_WITH_TEST for part in passed.get(name, [])]
    test_flags = ["--data", str(config.data), *shared, *["--perturb"] * config.perturb]
    for number, run in enumerate(runs, start=1):
        print(f"--- {number} of {len(runs)}: {run.folder.relative_to(config.out)}", flush=True)
        if not run.is_tested(config.perturb):
            resume = ["--resume"] if (run.folder / "config.json").exists() else []
            execute([f"{run.experiment.model}/train.py", *run.flags, *resume])
            execute([f"{run.experiment.model}/test.py", "--checkpoint", str(run.checkpoint), *test_flags])
    results = config.results or config.out / "report"
    folders = [str(run.folder) for run in runs]
    execute(["study/report.py", *folders, "--out", str(results), "--data", str(config.data)])


def group_flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Flags with their values, by the flag's name: {"--epochs": ["--epochs", "30"]}."""
    groups: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0].replace("--no-", "--")
            groups[name] = []
        elif name is None:
            raise InputError(f"after -- a flag of a train.py is expected, got {argument!r}")
        groups[name].append(argument)
    return groups


def plan(config: Config, passed: dict[str, list[str]]) -> list[Planned]:
    """Every run, in order. Bad values end the script as they do in train.py; InputError for an unknown name or flag."""
    experiments = LISTS[config.experiments]
    names = [experiment.name for experiment in experiments]
    if unknown := set(config.only or []) - set(names):
        raise InputError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(names)}")
    chosen = [experiment for experiment in experiments if not config.only or experiment.name in config.only]
    scripts = {model: importlib.import_module(f"{model}.train") for model in {one.model for one in chosen}}
    known = {model: {flag_name(field.name) for field in fields(module.Config)} for model, module in scripts.items()}
    if unknown := set(passed) - set().union(*known.values()):
        raise InputError(f"{' '.join(sorted(unknown))}: no train.py of this study has such a flag")
    runs = []
    for seed in range(config.seeds):
        for experiment in chosen:
            folder = config.out / f"seed{seed}" / experiment.name
            flags = ["--data", str(config.data), "--out", str(folder), "--seed", str(seed), *experiment.flags]
            takes = known[experiment.model] - set(experiment.refuses)
            flags += [part for name, group in passed.items() if name in takes for part in group]
            if experiment.starts_from:
                option, other, file = experiment.starts_from
                if other in {one.name for one in chosen}:
                    flags += [option, str(folder.with_name(other) / file)]
            script = scripts[experiment.model]
            runs.append(Planned(experiment, folder, flags, parse(script.Config, script.__doc__, flags)))
    return runs


def settings(config: Config, passed: dict[str, list[str]]) -> dict[str, Any]:
    """The content of config.json."""
    return {**as_plain_dict(config), "flags": passed}


def refuse_other_settings(config: Config, passed: dict[str, list[str]]) -> None:
    """InputError when the folder holds a study of another list or with other flags for the trainings.

    Which experiments are run, where data and report are, and how fast it runs may change.
    """
    path = config.out / "config.json"
    if not path.exists():
        return

    def fixed(values: dict[str, Any]) -> dict[str, Any]:
        free = {flag_name(name) for name in RESUMABLE - {"epochs", "patience"}}
        flags = {name: group for name, group in values.get("flags", {}).items() if name not in free}
        return {"--experiments": values.get("experiments"), "--seeds": values.get("seeds"), **flags}

    before, now = fixed(read_json(path)), fixed(settings(config, passed))
    changed = [f"  {name} was {before.get(name)}, is {now.get(name)}" for name in {**before, **now}
               if before.get(name) != now.get(name)]  # fmt: skip
    if changed:
        raise InputError(
            f"{config.out} holds a study with other settings, see {path}:\n" + "\n".join(changed)
            + "\nUse the same settings, or choose another --out."
        )  # fmt: skip


def announce(config: Config, runs: Sequence[Planned]) -> None:
    """Print what is finished and what remains."""
    from dataset.perturbation import choose_perturbations
    from utils.robustness import list_variants

    counts = read_json(config.data / "prep_report.json")["counts"]
    images = {split: sum(counts[split].values()) for split in counts}
    passes = len(list_variants(choose_perturbations([] if config.perturb else None)))
    lines, remaining = [], 0
    for run in runs:
        finished = run.is_tested(config.perturb)
        remaining += not finished
        state = "finished" if finished else "begun" if (run.folder / "config.json").exists() else "to do"
        lines.append(f"  {run.folder.relative_to(config.out)}: {state}, at most {run.config.epochs} epochs")
    print(
        f"study of {len(runs)} runs, {remaining} not finished: {images['TrainVal']} images to train and validate, "
        f"{images['Test']} test images with {passes} forward passes each, then a report\n" + "\n".join(lines),
        flush=True,
    )  # fmt: skip


def check_clip(runs: Sequence[Planned]) -> None:
    """InputError before hours of other work when the CLIP weights that a run needs are missing."""
    needed = {run.config.clip_model for run in runs if not getattr(run.config, "clip_random_init", True)}
    for clip_model in needed:
        from clip_seg.weights import load_vision

        load_vision(clip_model)


def execute(command: Sequence[str]) -> None:
    """Run a script of the repository; InputError when it fails, KeyboardInterrupt when it was interrupted."""
    script, *arguments = command
    process = subprocess.Popen([sys.executable, str(ROOT / script), *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt as error:
        if isinstance(error, Terminated):  # Ctrl-C reaches the script by itself
            process.terminate()
        process.wait()
        raise
    if code in (130, 143):
        raise KeyboardInterrupt
    if code:
        raise InputError(f"{script} failed: fix the error above, and start the study again")


if __name__ == "__main__":
    run_script(main)
