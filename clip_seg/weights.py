"""CLIP's weights: from the hub or a folder, checked, and known again by their hash."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging as transformers_logging

from utils.files import InputError

DEFAULT = "openai/clip-vit-base-patch32"

# What makes a vision transformer of its size; the rest of a CLIPVisionConfig is about training and files.
ARCHITECTURE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip

transformers_logging.set_verbosity_error()  # that the text half of a CLIP model is not used is no news
transformers_logging.disable_progress_bar()


def load_vision(name: str) -> CLIPVisionModel:
    """CLIP's vision transformer of a hub id or a local folder, in float32.

    InputError when there is none, it is no CLIP vision transformer, or weights are missing: none is ever filled in.
    """
    read_config(name)
    try:
        vision, report = CLIPVisionModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a missing, unreadable or damaged file fails in many ways, each in its library's own
        raise _not_there(name, error) from error
    if absent := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise InputError(
            f"--clip-model {name} lacks {len(absent)} weights of a CLIP vision transformer, {absent[0]} among them: "
            "fetch it again, or use another"
        )
    return vision


def random_vision(name: str) -> CLIPVisionModel:
    """A vision transformer of the same architecture with random weights, seeded by PyTorch's generator."""
    # The default's architecture is that of a default config, so that random weights need no hub.
    return CLIPVisionModel(CLIPVisionConfig() if name == DEFAULT and not Path(name).exists() else read_config(name))


def read_config(name: str) -> CLIPVisionConfig:
    """The config of a hub id or a local folder; InputError when it is not that of a CLIP vision transformer."""
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # offline, a misspelled id, no config, a model that transformers does not know
        raise _not_there(name, error) from error
    vision = getattr(config, "vision_config", config) if config.model_type == "clip" else config
    if not isinstance(vision, CLIPVisionConfig):
        raise InputError(
            f"--clip-model {name} is a {config.model_type} model, expected a CLIP with a vision transformer, "
            f"such as {DEFAULT}"
        )
    return vision


def describe(vision: CLIPVisionModel) -> dict[str, Any]:
    """The architecture as plain values: `CLIPVisionConfig(**describe(vision))` is its config."""
    return {name: getattr(vision.config, name) for name in ARCHITECTURE}


def hash_weights(vision: CLIPVisionModel) -> str:
    """SHA-256 over all weights, sorted by name."""
    digest = hashlib.sha256()
    for _, value in sorted(vision.state_dict().items()):
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def find_weights(name: str, expected_hash: str) -> CLIPVisionModel:
    """`load_vision`, but InputError when they are not the weights of that hash."""
    vision = load_vision(name)
    if (found := hash_weights(vision)) != expected_hash:
        raise InputError(
            f"--clip-model {name} holds other weights (sha256 {found[:12]}...) than the model was trained on "
            f"({expected_hash[:12]}...): give the right ones as --clip-model"
        )
    return vision


def _not_there(name: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0]
    wanted = name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists() else DEFAULT
    return InputError(
        f"no CLIP weights for --clip-model {name}: {reason}\n"
        f"Where there is internet, fetch them with: hf download {wanted}\n"
        "or give a folder that holds config.json and model.safetensors as --clip-model. "
        "In training, --clip-random-init starts from random weights instead."
    )
