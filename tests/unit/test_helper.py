"""utils/helper.py: checkpoints, and rebuilding a model from one."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import CPU
from unet.model import UNet
from utils.dataset import PETS
from utils.files import InputError
from utils.helper import (
    class_table_of,
    describe_environment,
    load_checkpoint,
    load_model_state,
    model_state,
    restore_model,
    save_checkpoint,
)

SETTINGS = {"config": {"image_size": 32, "seed": 0}, "epoch": 1}


def checkpoint():
    model_args = {"base_channels": 2}
    return {"model_name": "unet", "model": UNet(**model_args).state_dict(), "model_args": model_args, **SETTINGS}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint())
    before = path.read_bytes()
    real, full = Path.open, Path("/dev/full")
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: real(full if self.suffix == ".tmp" else self, *a, **k))
    with pytest.raises(InputError, match=r"cannot write .*last\.pt: .*No space left"):
        save_checkpoint(path, checkpoint())
    assert path.read_bytes() == before


class Attack:
    def __reduce__(self):
        return print, ("this would have run",)


def test_missing_checkpoint_names_the_script_that_trains():
    with pytest.raises(InputError, match=r"no such checkpoint.*python unet/train\.py"):
        load_checkpoint(Path("nowhere/best.pt"), "unet")


@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_truncated_checkpoint_is_named(tmp_path, kept):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"best\.pt is truncated or not a checkpoint"):
        load_checkpoint(path, "unet")


def test_other_files_are_not_checkpoints(tmp_path):
    path = tmp_path / "best.pt"
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(path, "unet")
    for content in ({**checkpoint(), "model_args": 3}, {"weights": torch.zeros(3)}):
        torch.save(content, path)
        with pytest.raises(InputError, match="not a checkpoint of this repository"):
            load_checkpoint(path, "unet")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_checkpoint_is_not_executed(tmp_path, capsys, writer):
    path = tmp_path / "best.pt"
    content = {**checkpoint(), "extra": Attack()}
    torch.save(content, path) if writer == "torch" else path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"refused|not a checkpoint"):
        load_checkpoint(path, "unet")
    assert "would have run" not in capsys.readouterr().out


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    path = tmp_path / "best.pt"
    for arguments in ({"base_channels": 3}, {"depth": 5}):
        save_checkpoint(path, {**checkpoint(), "model_args": arguments})
        with pytest.raises(InputError, match="does not fit UNet"):
            restore_model(path, UNet, "unet", CPU)


def test_folder_and_unreadable_class_table_are_named(tmp_path):
    with pytest.raises(InputError, match=r"a folder without a best\.pt"):
        load_checkpoint(tmp_path, "unet")
    for table in ("x", {"rows": [{"name": "cat", "legs": 4}], "ignored": {}}):
        save_checkpoint(tmp_path / "best.pt", {**checkpoint(), "class_table": table})
        with pytest.raises(InputError, match=r"best\.pt has a class table that this version cannot read"):
            load_checkpoint(tmp_path / "best.pt", "unet")


def test_checkpoint_without_a_class_table_gets_that_of_the_pets(tmp_path):
    """Checkpoints from before it was stored."""
    save_checkpoint(tmp_path / "unet.pt", checkpoint())
    assert class_table_of(load_checkpoint(tmp_path / "unet.pt")) == PETS


def test_external_weights_stay_out_of_checkpoints():
    def build():
        model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "head": nn.Linear(2, 1)})
        model["encoder"].external_weights = True
        return model

    saved, model = build(), build()
    state = model_state(saved)
    assert set(state) == {"head.weight", "head.bias"}
    own = model["encoder"].weight.clone()
    load_model_state(model, state)
    assert torch.equal(model["head"].weight, saved["head"].weight) and torch.equal(model["encoder"].weight, own)
    with pytest.raises(RuntimeError, match=r"head\.bias"):
        load_model_state(model, {"head.weight": state["head.weight"]})


def test_environment_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = describe_environment(CPU, "fp32")
    assert environment["commit"] is None and environment["torch"] == torch.__version__
