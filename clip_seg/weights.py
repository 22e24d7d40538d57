"""CLIP's weights: load them from the hub or a folder, check that they are complete, verify their hash."""

import hashlib
import re
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging as transformers_logging

from clip_seg.config import DEFAULT_CLIP
from utils.files import InputError

# The values of a CLIPVisionConfig that determine the architecture; the others concern training and files.
ARCHITECTURE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "hidden_act", "layer_norm_eps",
)  # fmt: skip

transformers_logging.set_verbosity_error()  # no warning that the text half of CLIP is not used
transformers_logging.disable_progress_bar()


def load_vision(name: str) -> CLIPVisionModel:
    """CLIP's vision transformer of a hub id or a local folder, in float32; InputError when any weight is missing."""
    read_config(name)
    try:
        options = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
        vision, report = CLIPVisionModel.from_pretrained(name, **options)
    except MemoryError:
        raise
    except Exception as error:  # missing, unreadable or damaged files raise many kinds of errors
        raise _missing_weights(name, error) from error
    if absent := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        lacks = f"lacks {len(absent)} weights of a CLIP vision transformer, {absent[0]} among them"
        raise InputError(f"--clip-model {name} {lacks}: fetch it again, or use another")
    return vision


def random_vision(name: str) -> CLIPVisionModel:
    """A vision transformer of the same architecture with random weights, seeded by PyTorch's generator."""
    # A default CLIPVisionConfig has the architecture of DEFAULT_CLIP, so that random weights need no hub.
    default = name == DEFAULT_CLIP and not Path(name).exists()
    return CLIPVisionModel(CLIPVisionConfig() if default else read_config(name))


def read_config(name: str) -> CLIPVisionConfig:
    """The config of a hub id or a local folder; InputError when it is not that of a CLIP vision transformer."""
    try:
        plain, _ = CLIPVisionConfig.get_config_dict(name)
    except MemoryError:
        raise
    except Exception as error:  # offline, a misspelled id, no config, a damaged one
        raise _missing_weights(name, error) from error
    # Only the values are read: AutoConfig would offer to run the code that a folder may bring for an unknown type.
    kind = plain.get("model_type") if isinstance(plain, dict) else None
    if kind not in ("clip", "clip_vision_model"):
        expected = f"expected a CLIP with a vision transformer, such as {DEFAULT_CLIP}"
        raise InputError(f"--clip-model {name} is a {kind} model, {expected}")
    try:
        vision = plain.get("vision_config", {}) if kind == "clip" else plain
        config = CLIPVisionConfig.from_dict({**vision, "model_type": "clip_vision_model"})
        sizes = [getattr(config, name) for name in ARCHITECTURE[:6]]
        if config.num_channels != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes}, {config.num_channels} channels")
        return config
    except Exception as error:  # values of other types
        raise InputError(f"--clip-model {name} has a config.json that is no CLIP's: {error}") from error


def hash_weights(vision: CLIPVisionModel) -> str:
    """SHA-256 over all weights, sorted by name."""
    digest = hashlib.sha256()
    for _, value in sorted(vision.state_dict().items()):
        digest.update(value.detach().cpu().contiguous().numpy())
    return digest.hexdigest()


def find_weights(name: str, expected_hash: str) -> CLIPVisionModel:
    """`load_vision`; InputError when the weights have another hash."""
    vision = load_vision(name)
    if (found := hash_weights(vision)) != expected_hash:
        other = f"other weights (sha256 {found[:12]}...) than the model was trained on ({expected_hash[:12]}...)"
        raise InputError(f"--clip-model {name} holds {other}: give the right ones as --clip-model")
    return vision


def _missing_weights(name: str, error: Exception) -> InputError:
    reason = str(error).strip().split("\n")[0]
    wanted = name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists() else DEFAULT_CLIP
    return InputError(
        f"no CLIP weights for --clip-model {name}: {reason}\n"
        f"Where there is internet, fetch them with: hf download {wanted}\n"
        "or give a folder that holds config.json and model.safetensors as --clip-model. "
        "In training, --clip-random-init starts from random weights instead."
    )
