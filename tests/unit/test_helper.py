"""utils/helper.py: what a checkpoint file may be."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from unet.model import UNet
from utils.files import InputError
from utils.helper import (
    load_checkpoint,
    load_model,
    pick_device,
    random_state,
    save_checkpoint,
    set_random_state,
    to_device,
)


def checkpoint() -> dict:
    model = UNet(base_channels=2)
    return {
        "model_name": "unet",
        "model": model.state_dict(),
        "model_args": {"base_channels": 2},
        "config": {},
        "epoch": 1,
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_named_and_spares_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, checkpoint())
    before = path.read_bytes()
    real_open = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: real_open(Path("/dev/full") if self.suffix == ".tmp" else self, *a, **k)
    )
    with pytest.raises(InputError, match=r"cannot write .*last\.pt: .*No space left"):
        save_checkpoint(path, checkpoint())
    assert path.read_bytes() == before


class Attack:
    def __reduce__(self):
        return print, ("this would have run",)


def test_missing():
    with pytest.raises(InputError, match=r"no such checkpoint.*python unet/train\.py"):
        load_checkpoint(Path("nowhere/best.pt"), "unet")


@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_truncated(tmp_path, kept):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"best\.pt is truncated or not a checkpoint"):
        load_checkpoint(path, "unet")


def test_not_a_checkpoint(tmp_path):
    path = tmp_path / "best.pt"
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(InputError, match="not a checkpoint"):
        load_checkpoint(path, "unet")
    torch.save({**checkpoint(), "model_args": 3}, path)
    with pytest.raises(InputError, match="not a checkpoint of this repository"):
        load_checkpoint(path, "unet")
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="not a checkpoint of this repository"):
        load_checkpoint(path, "unet")


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_is_refused(tmp_path, capsys, writer):
    path = tmp_path / "best.pt"
    content = {**checkpoint(), "extra": Attack()}
    torch.save(content, path) if writer == "torch" else path.write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=r"refused|not a checkpoint"):
        load_checkpoint(path, "unet")
    assert "would have run" not in capsys.readouterr().out


def test_of_another_model(tmp_path):
    path = tmp_path / "best.pt"
    save_checkpoint(path, checkpoint())
    with pytest.raises(InputError, match="holds a unet model, expected autoencoder"):
        load_checkpoint(path, "autoencoder")


def test_of_another_architecture(tmp_path):
    path = tmp_path / "best.pt"
    for arguments in ({"base_channels": 3}, {"depth": 5}):
        save_checkpoint(path, {**checkpoint(), "model_args": arguments})
        with pytest.raises(InputError, match="does not fit UNet"):
            load_model(path, UNet, "unet", torch.device("cpu"))


def test_random_state_round_trip():
    state = random_state()
    first = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_images_become_floats_on_the_device():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    batch = to_device({"image": image, "name": ["a"]}, torch.device("cpu"))
    assert batch["image"].flatten().tolist() == pytest.approx([0, 0.2, 1]) and batch["name"] == ["a"]


def test_absent_device():
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: this machine has none"):
            pick_device("cuda")
    assert pick_device("cpu").type == "cpu"
