"""utils/run.py: a run folder is started, locked, resumed and saved."""

import csv
import math
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.pet import make_train_sets
from tests.helpers import UNET_ARGS, assert_same_weights, scale_loss, segmentation_step, train, train_config
from unet.model import UNet
from utils import run as run_module
from utils.config import as_plain_dict
from utils.dataset import PETS
from utils.files import InputError, acquire_lock, read_csv, read_json
from utils.helper import class_table_of, load_checkpoint, save_checkpoint
from utils.run import plot_curves, random_state, set_random_state, start_run
from utils.train import fit


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """The folder of a run of two epochs; read only."""
    out = tmp_path_factory.mktemp("run") / "unet"
    train(prepared, out, epochs=2, patience=0)
    return out


@pytest.fixture
def resumable(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_run_folder_is_complete(finished, prepared):
    names = {path.name for path in finished.iterdir() if "tfevents" not in path.name and path.name != ".lock"}
    assert names == {"config.json", "split.json", "log.csv", "curves.png", "last.pt", "best.pt"}
    assert any("tfevents" in path.name for path in finished.iterdir())
    rows = read_csv(finished / "log.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    columns = ["train_loss", "val_loss", "lr", "images_per_second"]
    columns += [f"val_iou_{name}" for name in (*PETS.names, "mean")]
    assert all(math.isfinite(float(row[name])) for row in rows for name in columns)

    best, lowest = load_checkpoint(finished / "best.pt", "unet"), min(rows, key=lambda row: float(row["val_loss"]))
    assert best["epoch"] == int(lowest["epoch"]) and best["scores"]["val_loss"] == float(lowest["val_loss"])
    assert best["scores"]["iou"]["mean"] == float(lowest["val_iou_mean"])
    assert class_table_of(best) == PETS and best["model_args"] == UNET_ARGS
    assert "optimizer" not in best and load_checkpoint(finished / "last.pt", "unet")["epoch"] == 2

    config = read_json(finished / "config.json")
    expected = as_plain_dict(train_config(prepared, finished, epochs=2, patience=0))
    assert expected.items() <= config.items() and config["model_args"] == UNET_ARGS
    assert config["environment"]["torch"] == torch.__version__ and config["environment"]["processes"] == 1
    train_set, val_set = make_train_sets(train_config(prepared, finished))
    assert read_json(finished / "split.json") == {"train": train_set.names, "val": val_set.names}


def test_worse_epoch_does_not_replace_best(prepared, tmp_path):
    calls = count(1)

    def rising(model, batch):
        output = segmentation_step(model, batch)
        return scale_loss(output, next(calls))

    last = train(prepared, tmp_path, step=rising, epochs=3, patience=0)
    assert last["epoch"] == 3 and load_checkpoint(tmp_path / "best.pt", "unet")["epoch"] == 1


def test_weights_depend_on_the_seed_alone(prepared, tmp_path):
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        start_run(train_config(prepared, tmp_path, seed=seed), "unet")
        weights.append(UNet(**UNET_ARGS).head.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_folder_of_another_run_is_refused(finished, prepared):
    before = (finished / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"holds another run \(config\.json, .*continue it with --resume, or choose"):
        start_run(train_config(prepared, finished), "unet")
    assert (finished / "last.pt").read_bytes() == before


def test_run_that_began_since_the_start_is_refused(prepared, tmp_path):
    run = start_run(train_config(prepared, tmp_path), "unet")
    first = train(prepared, tmp_path, epochs=1)
    with pytest.raises(InputError, match="holds another run"):
        fit(UNet(**UNET_ARGS), segmentation_step, *make_train_sets(run.config), run, UNET_ARGS)
    assert_same_weights(load_checkpoint(tmp_path / "last.pt", "unet"), first)


def test_two_trainings_do_not_share_a_folder(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "LOCK_SECONDS", 0)
    with acquire_lock(tmp_path / ".lock"):
        for resume in (False, True):
            with pytest.raises(InputError, match="another process is training into this folder; wait for it, or"):
                train(prepared, tmp_path, epochs=1, resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def interrupted_step(model, batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", [segmentation_step, interrupted_step])
def test_ended_run_releases_its_lock(prepared, tmp_path, step):
    run = start_run(train_config(prepared, tmp_path, epochs=1), "unet")
    with suppress(KeyboardInterrupt):
        fit(UNet(**UNET_ARGS), step, *make_train_sets(run.config), run, UNET_ARGS)
    acquire_lock(tmp_path / ".lock", timeout=0).close()


def test_run_without_last_starts_again(finished, prepared, tmp_path):
    """It was killed before last.pt was written."""
    for name in ("config.json", "split.json"):
        shutil.copy(finished / name, tmp_path)
    whole = load_checkpoint(finished / "last.pt", "unet")
    assert_same_weights(train(prepared, tmp_path, epochs=2, patience=0, resume=True), whole)


def test_what_cannot_be_resumed(resumable, prepared):
    """Other images, another architecture, a copy of best.pt."""
    with pytest.raises(InputError, match="was started with other images"):
        train(prepared, resumable, epochs=3, resume=True, limit=8)
    saved = torch.load(resumable / "last.pt", weights_only=True)
    save_checkpoint(resumable / "last.pt", {**saved, "model_args": {"num_classes": 3, "base_channels": 4}})
    with pytest.raises(InputError, match=r"last\.pt holds .*'base_channels': 4.*expected .*'base_channels': 2"):
        train(prepared, resumable, epochs=3, resume=True)
    (resumable / "best.pt").replace(resumable / "last.pt")
    with pytest.raises(InputError, match=r"last\.pt cannot be resumed: it has no optimizer"):
        train(prepared, resumable, epochs=3, resume=True)


def test_resumed_log_has_the_columns_of_all_rows(resumable, prepared):
    """An earlier version logged other columns."""
    saved = torch.load(resumable / "last.pt", weights_only=True)
    for row in saved["log"]:
        row["momentum"] = 0.5
        del row["seconds"]
    save_checkpoint(resumable / "last.pt", saved)
    (resumable / ".last.pt.123.tmp").touch()
    train(prepared, resumable, epochs=3, patience=0, resume=True)
    header, *rows = csv.reader((resumable / "log.csv").open())
    assert set(header) == {*saved["log"][0], "seconds"} and len(header) == len(set(header))
    assert [len(row) for row in rows] == [len(header)] * 3
    values = [dict(zip(header, row)) for row in rows]
    assert [row["epoch"] for row in values] == ["1", "2", "3"]
    assert [row["momentum"] for row in values] == ["0.5", "0.5", ""]
    assert [bool(row["seconds"]) for row in values] == [False, False, True]
    assert not list(resumable.glob(".*.tmp")), "files of a killed process are removed"


def test_random_state_round_trip():
    state = random_state()
    first = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first)
    missing_gpu = [torch.zeros(16, dtype=torch.uint8)] * (torch.cuda.device_count() + 1)
    set_random_state({**state, "cuda": [*state["cuda"], *missing_gpu[len(state["cuda"]) :]]})
    assert torch.equal(torch.rand(3), first)


def make_rows(**scores):
    losses = {"epoch": [1, 2, 3], "train_loss": [0.9, 0.5, 0.1], "val_loss": [0.8, 0.4, 0.6]}
    return [dict(zip({**losses, **scores}, values)) for values in zip(*losses.values(), *scores.values())]


def test_curves_show_losses_and_iou():
    names = (*PETS.names, "mean")
    scores = {f"val_iou_{name}": [0.1 * number, 0.2, 0.3] for number, name in enumerate(names)}
    scores["val_iou_cat"][0] = None  # no cat in truth or prediction
    losses, iou = plot_curves(make_rows(**scores), PETS, 2).axes
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.lines}
    assert curves == {
        "training": ([1, 2, 3], [0.9, 0.5, 0.1]),
        "validation": ([1, 2, 3], [0.8, 0.4, 0.6]),
        "best.pt (epoch 2)": ([2], [0.4]),
    }
    assert [text.get_text() for text in losses.get_legend().get_texts()] == list(curves)
    assert [line.get_label() for line in iou.lines] == list(names)
    for line in iou.lines:
        expected = [np.nan if value is None else value for value in scores[f"val_iou_{line.get_label()}"]]
        np.testing.assert_equal(list(line.get_ydata()), expected)


def test_curves_of_a_reconstruction_show_no_iou():
    (losses,) = plot_curves(make_rows(), PETS, 2).axes
    assert losses.get_ylabel() == "loss"


def test_curves_of_a_log_with_other_columns_leave_gaps():
    rows = [{"epoch": n, "train_loss": 1.0, "val_loss": 1.0} for n in (1, 2)]
    scores = {f"val_iou_{name}": 0.5 for name in (*PETS.names, "mean")}
    _, axis = plot_curves([rows[0], rows[1] | scores], PETS).axes
    for line in axis.get_lines():
        np.testing.assert_array_equal(line.get_ydata(), [np.nan, 0.5])
