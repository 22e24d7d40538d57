"""python study/run.py --data Dataset --out runs/study -- --epochs 30

Prepare and explore the data, train and test every experiment of a list, write the report. Flags after `--` go to every
train.py that has them. Started again with the same flags, it continues after an interruption.
"""

import importlib
import itertools
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from study.experiments import LISTS, Experiment
from utils.config import REMOVED_FLAGS, RESUMABLE, as_plain_dict, flag, flag_name, parse
from utils.files import InputError, read_json
from utils.script import Terminated, run_script

SET_BY_STUDY = {"--data", "--out", "--seed", "--resume"}  # flags of train.py that the study itself sets


@dataclass
class Config:
    """The flags of the study itself."""

    data: Path = flag(Path("Dataset"), "folder of the data; prepared first")
    synthetic: int | None = flag(None, "draw this many pets into --data first", low=8)
    out: Path = flag(Path("runs/study"), "folder of the runs")
    results: Path | None = flag(None, "folder of the report (default: report/ in --out)")
    experiments: Literal[tuple(LISTS)] = flag("models", "the list of study/experiments.py to run")
    only: list[str] | None = flag(None, "only these experiments of the list")
    seeds: int = flag(1, "runs of each experiment, with the seeds 0, 1, ...", low=1)
    perturb: bool = flag(True, "also test under all perturbations")


class Planned(NamedTuple):
    """One run of the study: its experiment, its folder, and train.py's flags and parsed Config."""

    experiment: Experiment
    folder: Path
    flags: list[str]
    config: Any

    @property
    def checkpoint(self) -> Path:
        from models import MODELS

        return self.folder / MODELS[self.experiment.model].checkpoint

    def is_tested(self, perturb: bool) -> bool:
        """Whether test.py has written its scores."""
        return (self.checkpoint.parent / "test" / ("robustness.json" if perturb else "metrics.json")).exists()


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    config, passed = parse(Config, __doc__, arguments[:split]), group_flags(arguments[split + 1 :])
    runs = plan(config, passed)
    for run in runs:
        refuse_other_settings(run)
    drawn = ["--synthetic", config.synthetic] if config.synthetic else []
    execute(["dataset/dataset_prep.py", config.data, *drawn])
    check_clip([run for run in runs if not run.is_tested(config.perturb)])
    print(f"study of {len(runs)} runs")
    for run in runs:
        state = "finished" if run.is_tested(config.perturb) else "to do"
        print(f"  {run.folder}: {state}, {run.config.epochs} epochs", flush=True)
    execute(["dataset/exploration.py", config.data, "--out", config.out / "exploration"])
    shared = [part for name in ("--workers", "--threads", "--device") for part in passed.get(name, [])]
    test_flags = ["--data", config.data, *shared, *(["--perturb"] if config.perturb else [])]
    for number, run in enumerate(runs, start=1):
        print(f"--- {number} of {len(runs)}: {run.folder}", flush=True)
        if not run.is_tested(config.perturb):
            resume = ["--resume"] if (run.folder / "config.json").exists() else []
            execute([f"{run.experiment.model}/train.py", *run.flags, *resume])
            execute([f"{run.experiment.model}/test.py", "--checkpoint", run.checkpoint, *test_flags])
    folders, out = [run.folder for run in runs], config.results or config.out / "report"
    execute(["study/report.py", *folders, "--out", out, "--data", config.data])


def group_flags(arguments: Sequence[str]) -> dict[str, list[str]]:
    """Flags with their values, by the flag's name: {"--epochs": ["--epochs", "30"]}."""
    groups: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.partition("=")[0].replace("--no-", "--")
        elif not groups:
            raise InputError(f"after -- a flag of a train.py is expected, got {argument!r}")
        groups.setdefault(name, []).append(argument)
    return groups


def plan(config: Config, passed: dict[str, list[str]]) -> list[Planned]:
    """Every run, in order. Bad values end the script as they do in train.py; InputError for an unknown name or flag."""
    experiments = {experiment.name: experiment for experiment in LISTS[config.experiments]}
    if unknown := set(config.only or []) - set(experiments):
        raise InputError(f"--only {' '.join(sorted(unknown))}: there are {', '.join(experiments)}")
    chosen = [experiment for name, experiment in experiments.items() if not config.only or name in config.only]
    scripts = {one.model: importlib.import_module(f"{one.model}.train") for one in chosen}
    known = {model: {flag_name(field.name) for field in fields(script.Config)} for model, script in scripts.items()}
    if fixed := SET_BY_STUDY & set(passed):
        raise InputError(f"{' '.join(sorted(fixed))} after --: the study sets it for each run, see study/run.py --help")
    if gone := [f"{name} no longer exists: {REMOVED_FLAGS[name]}" for name in passed if name in REMOVED_FLAGS]:
        raise InputError("\n".join(gone))
    if unknown := set(passed) - set().union(*known.values()):
        raise InputError(f"{' '.join(sorted(unknown))}: no train.py of this study has such a flag")
    runs = []
    for seed, experiment in itertools.product(range(config.seeds), chosen):
        folder, script = config.out / f"seed{seed}" / experiment.name, scripts[experiment.model]
        flags = ["--data", str(config.data), "--out", str(folder), "--seed", str(seed), *experiment.flags]
        takes = known[experiment.model] - set(experiment.refuses)
        flags += [part for name, group in passed.items() if name in takes for part in group]
        if experiment.starts_from and experiment.starts_from[1] in {one.name for one in chosen}:
            option, other, file = experiment.starts_from
            flags += [option, str(folder.with_name(other) / file)]
        runs.append(Planned(experiment, folder, flags, parse(script.Config, script.__doc__, flags)))
    return runs


def refuse_other_settings(run: Planned) -> None:
    """InputError when a run was started with other settings; RESUMABLE ones, except epochs and patience, may differ."""
    path, now = run.folder / "config.json", as_plain_dict(run.config)
    saved = read_json(path) if path.exists() else now
    fixed = [name for name in now if name not in RESUMABLE - {"epochs", "patience"}]
    changed = [name for name in fixed if saved.get(name) != now[name]]
    if changed:
        lines = "\n".join(f"  {flag_name(name)} was {saved.get(name)}, is {now[name]}" for name in changed)
        raise InputError(f"{path} has other settings:\n{lines}\nUse the same, or another --out for the study.")


def check_clip(runs: Sequence[Planned]) -> None:
    """InputError when the CLIP weights that a run needs are missing, before hours of other work."""
    for clip_model in {run.config.clip_model for run in runs if not getattr(run.config, "clip_random_init", True)}:
        from clip_seg.weights import load_vision

        load_vision(clip_model)


def execute(command: Sequence[object]) -> None:
    """Run a script of the repository; InputError when it fails, KeyboardInterrupt when it was interrupted."""
    script, *arguments = map(str, command)
    process = subprocess.Popen([sys.executable, str(ROOT / script), *arguments])
    try:
        code = process.wait()
    except KeyboardInterrupt as error:
        try:
            if not isinstance(error, Terminated):  # Ctrl-C reaches the script by itself, `kill -INT` does not
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
        finally:  # a second signal leaves no script behind, either
            process.terminate()
            process.wait()
        raise
    if code in (130, 143):
        raise Terminated if code == 143 else KeyboardInterrupt
    if code:
        raise InputError(f"{script} failed: fix the error above, then start the study again")


if __name__ == "__main__":
    run_script(main)
