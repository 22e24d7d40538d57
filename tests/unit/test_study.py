"""study/run.py and experiments.py: the scripts that a study starts, with which flags, and what it refuses."""

import importlib
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import pytest

from models import MODELS
from study import run as study
from study.experiments import EXPERIMENTS, LISTS, PRETRAINING
from tests.helpers import ROOT
from utils.config import as_plain_dict, flag_name, parse
from utils.files import InputError, write_json
from utils.script import Terminated

RANDOM_CLIP = ("--", "--clip-random-init")
WITHOUT_CLIP = next(one for one in EXPERIMENTS if not one.starts_from and "clip" not in one.model)
ON_CLIP = next(one for one in EXPERIMENTS if not one.starts_from and "clip" in one.model)
DEPENDENT = next(one for one in EXPERIMENTS if one.starts_from)


class Command(NamedTuple):
    script: str
    arguments: list[str]

    @property
    def model(self) -> str:
        return self.script.split("/")[0]

    def value(self, name: str) -> str:
        return self.arguments[self.arguments.index(name) + 1]


def config_of(model: str) -> type:
    return importlib.import_module(f"{model}.train").Config


def flags_of(model: str) -> set[str]:
    return {flag_name(field.name) for field in fields(config_of(model))}


@pytest.fixture
def commands(monkeypatch) -> list[Command]:
    """The scripts that the study starts. None runs; each leaves the files by which the study sees that it has run."""
    started = []

    def start(line):
        assert line[0] == sys.executable and all(isinstance(part, str) for part in line)
        command = Command(Path(line[1]).relative_to(ROOT).as_posix(), line[2:])
        started.append(command)
        if command.script.endswith("/train.py"):
            config = parse(config_of(command.model), "", command.arguments)
            write_json(config.out / "config.json", as_plain_dict(config))
        elif command.script.endswith("/test.py"):
            folder = Path(command.value("--checkpoint")).parent / "test"
            for name in ("metrics", *["robustness"] * ("--perturb" in command.arguments)):
                write_json(folder / f"{name}.json", {})
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(subprocess, "Popen", start)
    return started


@pytest.fixture
def run_study(monkeypatch, tmp_path):
    """Run study/run.py in this process, into tmp_path."""

    def start(*flags):
        monkeypatch.setattr("sys.argv", ["run.py", "--out", str(tmp_path), "--data", "D", *map(str, flags)])
        study.main()

    return start


def select(commands: list[Command], script: str) -> list[Command]:
    return [command for command in commands if command.script.endswith(script)]


def folder(command: Command, out: Path) -> str:
    """SEED/EXPERIMENT of a training."""
    return str(Path(command.value("--out")).relative_to(out))


@pytest.mark.parametrize("name", LISTS)
def test_every_experiment_of_a_list_is_trained_and_tested_once_per_seed(commands, run_study, tmp_path, name, capsys):
    run_study("--experiments", name, "--seeds", 2, *(RANDOM_CLIP if name == "models" else ()))
    folders = [f"seed{seed}/{one.name}" for seed in range(2) for one in LISTS[name]]
    scripts = [f"{one.model}/{script}" for one in 2 * LISTS[name] for script in ("train.py", "test.py")]
    prepare, explore = "dataset/dataset_prep.py", "dataset/exploration.py"
    assert [command.script for command in commands] == [prepare, explore, *scripts, "study/report.py"]
    assert commands[0].arguments == ["D"] and commands[1].arguments[0] == "D"

    assert [folder(command, tmp_path) for command in select(commands, "train.py")] == folders
    for number, (command, experiment) in enumerate(zip(select(commands, "train.py"), 2 * LISTS[name])):
        assert command.value("--data") == "D" and set(experiment.flags) <= set(command.arguments)
        seed = f"seed{command.value('--seed')}"
        assert seed in Path(command.value("--out")).parts
        if experiment.starts_from:
            flag, other, file = experiment.starts_from
            assert command.value(flag) == str(tmp_path / seed / other / file)
            assert f"{seed}/{other}" in folders[:number], "trained before"
    for command, path, experiment in zip(select(commands, "test.py"), folders, 2 * LISTS[name]):
        assert command.value("--checkpoint") == str(tmp_path / path / MODELS[experiment.model].checkpoint)
        assert "--perturb" in command.arguments and command.value("--data") == "D"
    report = commands[-1]
    assert report.arguments[: len(folders)] == [str(tmp_path / path) for path in folders]
    assert report.value("--out") == str(tmp_path / "report") and report.value("--data") == "D"
    printed = capsys.readouterr().out
    assert f"study of {len(folders)} runs" in printed
    assert all(f"{tmp_path / path}: to do" in printed for path in folders)


def test_only_the_named_experiments_are_run(commands, run_study):
    """Without the experiment that it starts from, it starts from its own first stage or weights."""
    run_study("--only", DEPENDENT.name, "--no-perturb", *(RANDOM_CLIP if "clip" in DEPENDENT.model else ()))
    (train,), (test,) = select(commands, "train.py"), select(commands, "test.py")
    assert train.model == test.model == DEPENDENT.model
    assert DEPENDENT.starts_from[0] not in train.arguments and "--perturb" not in test.arguments


def test_encoders_of_the_pretraining_list_are_shared(commands, run_study):
    """Each reconstruction is trained once per seed; every experiment with another head gets its encoder."""
    run_study("--experiments", "pretraining", "--seeds", 2)
    training = [command for command in select(commands, "train.py") if command.model == "autoencoder"]
    losses = [one.flags[1] for one in PRETRAINING if "--reconstruction-loss" in one.flags]
    pretrained = [command for command in training if "--encoder" not in command.arguments]
    assert [command.value("--reconstruction-loss") for command in pretrained] == 2 * losses
    reused = [command.value("--encoder") for command in training if "--encoder" in command.arguments]
    files = {str(Path(command.value("--out")) / "reconstruction/best.pt") for command in pretrained}
    assert set(reused) - {"random"} == files
    assert reused.count("random") == 2 * sum("random" in one.flags for one in PRETRAINING)


def test_flags_after_the_dashes_go_to_every_training_that_has_them(commands, run_study):
    passed = {
        "--epochs": "7", "--base-channels": "8", "--pretrain-epochs": "2", "--clip-random-init": None,
        "--workers": "1", "--device": "cpu",
    }  # fmt: skip
    run_study("--", *(part for pair in passed.items() for part in pair if part is not None))
    for command, experiment in zip(select(commands, "train.py"), EXPERIMENTS, strict=True):
        for name, value in passed.items():
            takes = name in flags_of(experiment.model) - set(experiment.refuses)
            assert (name in command.arguments) == takes, f"{experiment.name} {name}"
            assert not takes or value in (None, command.value(name))
    for command in select(commands, "test.py"):
        assert command.value("--workers") == "1" and command.value("--device") == "cpu"
        assert not {"--epochs", "--base-channels"} & set(command.arguments)


def test_flags_are_grouped_with_their_values():
    groups = study.group_flags(["--epochs", "3", "--no-skips", "--lr=1e-3", "--clip-random-init"])
    assert groups == {
        "--epochs": ["--epochs", "3"], "--skips": ["--no-skips"], "--lr": ["--lr=1e-3"],
        "--clip-random-init": ["--clip-random-init"],
    }  # fmt: skip


def test_flags_of_the_study_reach_their_scripts(commands, run_study, tmp_path):
    run_study("--only", WITHOUT_CLIP.name, "--synthetic", 24, "--results", tmp_path / "results")
    assert commands[0].arguments == ["D", "--synthetic", "24"]
    assert commands[-1].value("--out") == str(tmp_path / "results")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "resnet", "vgg", EXPERIMENTS[0].name], f"--only resnet vgg: there are {EXPERIMENTS[0].name}"),
        (["--", "--epochs", "3", "--depth", "5", "--width", "2"], "--depth --width: no train.py"),
        (["--", "--accumulate", "2"], "--accumulate no longer exists: .*--micro-batch-size"),
        (["--only", WITHOUT_CLIP.name, *RANDOM_CLIP], "--clip-random-init: no train.py of this study"),
        (["--", "--seed", "3", "--out", "X"], "--out --seed after --: the study sets it for each run"),
        (["--", "3"], "after -- a flag of a train.py is expected, got '3'"),
    ],
)  # fmt: skip
def test_unknown_names_and_flags_are_refused_before_anything_runs(commands, run_study, flags, message):
    with pytest.raises(InputError, match=message):
        run_study(*flags)
    assert commands == []


def test_bad_values_end_the_study_as_they_end_a_training(commands, run_study, capsys):
    for flags, message in [
        (["--epochs", "0"], "argument --epochs: expected at least 1, got 0"),
        (["--loss", "l7"], "argument --loss: expected one of cross-entropy"),
    ]:
        with pytest.raises(SystemExit) as error:
            run_study("--", *flags)
        assert error.value.code == 2 and message in capsys.readouterr().err and commands == []


def test_finished_runs_are_kept_and_begun_runs_are_resumed(commands, run_study, tmp_path, capsys):
    """One run was stopped in training, one in testing; other workers are allowed."""
    names = [one.name for one in PRETRAINING][:4]
    flags = ["--experiments", "pretraining", "--only", *names, "--", "--workers"]
    run_study(*flags, 0)
    commands.clear()
    in_training, in_testing = (tmp_path / "seed0" / name / "segmentation/test" for name in names[1:3])
    shutil.rmtree(in_training)
    (in_testing / "robustness.json").unlink()
    capsys.readouterr()
    run_study(*flags, 1)
    training = [(folder(command, tmp_path), command.arguments[-1]) for command in select(commands, "train.py")]
    assert training == [(f"seed0/{name}", "--resume") for name in names[1:3]]
    assert len(select(commands, "test.py")) == 2
    printed = capsys.readouterr().out
    assert printed.count(": finished") == 2 and printed.count(": to do") == 2
    assert len([part for part in commands[-1].arguments if "/seed0/" in part]) == 4, "the report is about all runs"


def test_a_test_without_perturbations_is_finished_with_its_scores(commands, run_study):
    run_study("--only", WITHOUT_CLIP.name, "--no-perturb")
    commands.clear()
    run_study("--only", WITHOUT_CLIP.name, "--no-perturb")
    assert not select(commands, "train.py") and not select(commands, "test.py")
    run_study("--only", WITHOUT_CLIP.name)
    assert "--perturb" in select(commands, "test.py")[0].arguments


def test_other_settings_are_refused_and_named(commands, run_study):
    run_study("--only", WITHOUT_CLIP.name)
    commands.clear()
    with pytest.raises(InputError, match=r"has other settings:\n  --epochs was 50, is 3\n  --lr was .*, is 0.5\nUse"):
        run_study("--only", WITHOUT_CLIP.name, "--", "--epochs", 3, "--lr", 0.5, "--workers", 3)
    assert commands == []


def test_clip_weights_are_checked_before_any_training(commands, run_study, tmp_path, clip_folder):
    names = ["--only", WITHOUT_CLIP.name, ON_CLIP.name]
    with pytest.raises(InputError, match=r"no CLIP weights for --clip-model .*nowhere"):
        run_study(*names, "--", "--clip-model", tmp_path / "nowhere")
    assert not select(commands, "train.py")
    clip = shutil.copytree(clip_folder, tmp_path / "clip")
    run_study(*names, "--", "--clip-model", clip)
    shutil.rmtree(clip)
    run_study(*names, "--", "--clip-model", clip)
    assert len(select(commands, "train.py")) == 2, "the second time nothing is left to train"


@pytest.mark.parametrize(
    ("first", "code", "error", "events"),
    [
        (Terminated(), 143, Terminated, ["wait", "terminate", "wait"]),
        (KeyboardInterrupt(), 130, KeyboardInterrupt, ["wait", "wait", "terminate", "wait"]),
        (130, None, KeyboardInterrupt, ["wait"]),
        (143, None, Terminated, ["wait"]),
    ],
    ids=["SIGTERM", "Ctrl-C", "130", "143"],
)
def test_interrupts_of_the_study_and_of_the_script_end_both(monkeypatch, first, code, error, events):
    """SIGTERM is passed on to the script; Ctrl-C reaches it by itself. `first` and `code` are what `wait` gives."""
    process = Mock(**{"wait.side_effect": [first, code, code]})
    monkeypatch.setattr(subprocess, "Popen", lambda line: process)
    with pytest.raises(KeyboardInterrupt) as raised:
        study.execute(["unet/train.py", "--epochs", 3])
    assert raised.type is error and [name for name, _, _ in process.mock_calls] == events


@pytest.mark.parametrize("name", LISTS)
def test_lists_are_consistent(name):
    """Names are unique; a baseline is an earlier experiment of the list; the refused flags exist."""
    seen = []
    for experiment in LISTS[name]:
        assert experiment.name not in seen and experiment.baseline in (None, *seen)
        assert set(experiment.refuses) <= flags_of(experiment.model), experiment.name
        seen.append(experiment.name)
