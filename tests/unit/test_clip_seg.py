"""clip_seg/: CLIP's features and its weights. The contract of all models is in test_models.py."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from clip_seg.model import ClipEncoder, ClipSegmenter, Decoder, build_segmenter, make_encoder
from clip_seg.weights import hash_weights, load_vision
from models import load_model
from tests.helpers import CPU, TINY_CLIP, save_model
from utils.files import InputError
from utils.helper import model_state

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("image_size", [32, 48])
def test_tokens_are_those_of_transformers_in_their_place(clip_folder, image_size):
    encoder = ClipEncoder(load_vision(str(clip_folder)), image_size=image_size).eval()
    images = torch.rand(2, 3, image_size, image_size)
    theirs = CLIPVisionModel.from_pretrained(clip_folder).eval()
    with torch.inference_mode():
        maps = encoder(images)
        states = theirs(encoder.normalize(images), interpolate_pos_encoding=image_size != 32, output_hidden_states=True)
    grid = image_size // 8
    assert [tuple(part.shape) for part in maps] == [(2, 32, grid, grid)] * 4
    for row in range(grid):
        for column in range(grid):
            expected = states.last_hidden_state[:, 1 + row * grid + column]
            torch.testing.assert_close(maps[-1][:, :, row, column], expected, atol=1e-5, rtol=0)
    assert torch.equal(maps[1].flatten(2).transpose(1, 2), states.hidden_states[2][:, 1:]), "after half of the layers"


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (3, 0), (3, 3)])
def test_features_change_most_where_the_image_changes(clip_folder, row, column):
    encoder = ClipEncoder(load_vision(str(clip_folder))).eval()
    image = torch.rand(1, 3, 64, 64) * 0.5
    brighter = image.clone()
    brighter[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 0.5
    with torch.inference_mode():
        change = (encoder(brighter)[-1] - encoder(image)[-1]).abs().sum(dim=1)[0]
    assert divmod(int(change.argmax()), 4) == (row, column)


def test_full_size_has_the_shapes_of_the_design():
    encoder, arguments = make_encoder("openai/clip-vit-base-patch32", random_init=True)
    assert arguments["weights_hash"] is None, "random weights come with the checkpoint"
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 87_456_000
    assert encoder.taps == [3, 6, 9, 12]
    with torch.inference_mode():
        maps = encoder.eval()(torch.rand(1, 3, 256, 256))
    assert [tuple(part.shape) for part in maps] == [(1, 768, 7, 7)] * 4
    model = ClipSegmenter(encoder)
    assert (model.project.in_channels, model.project.out_channels) == (768, 1024)
    assert [block.up.out_channels for block in model.decoder.blocks] == [512, 256, 128, 64]
    assert model.decoder(torch.rand(1, 1024, 7, 7), []).shape == (1, 64, 112, 112)


@pytest.mark.parametrize(("patch", "grid"), [(32, 7), (16, 14), (14, 16)])
def test_other_patch_sizes(patch, grid):
    vision = CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP | {"patch_size": patch, "image_size": 224}))
    logits = ClipSegmenter(ClipEncoder(vision), base_channels=1, skips=True)(torch.rand(2, 3, 50, 70))
    assert ClipEncoder(vision).grid == grid and logits.shape == (2, 3, 50, 70)


def test_every_skip_reaches_the_output():
    torch.manual_seed(0)
    tokens = [torch.rand(2, 8, 3, 3, requires_grad=True) for _ in range(3)]
    output = Decoder(64, skip_channels=8)(torch.rand(2, 64, 3, 3), tokens)
    assert output.shape == (2, 4, 48, 48)
    output.square().sum().backward()
    assert all(bool((part.grad != 0).all()) for part in tokens)


def test_preparation_agrees_with_the_processor_of_transformers(clip_folder):
    """CLIPImageProcessor crops to a square; on square images it resizes equally, except for rounding to 8 bits."""
    from transformers import CLIPImageProcessor

    encoder = ClipEncoder(load_vision(str(clip_folder)))
    torch.manual_seed(0)
    images = torch.nn.functional.interpolate(torch.rand(2, 3, 12, 12), (64, 64), mode="bilinear")
    images = images.mul(255).to(torch.uint8)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    theirs = processor(list(images), return_tensors="pt")["pixel_values"]
    for gradients in (False, True):  # resized as bytes, and as floats
        floats = (images / 255).requires_grad_(gradients)
        ours = encoder.normalize(encoder.prepare(floats))
        torch.testing.assert_close(ours.detach(), theirs, atol=1.5 / 255 / 0.26, rtol=0)
    ours.sum().backward()
    assert floats.grad.abs().min() > 0


@pytest.fixture
def frozen(clip_folder, tmp_path):
    """A segmenter on the frozen CLIP of `tmp_path`/clip, after a step of training, and its checkpoint."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    encoder, encoder_args = make_encoder(str(folder), frozen=True)
    model = ClipSegmenter(encoder, base_channels=2).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.rand(2, 3, 40, 40)).square().mean().backward()
    optimizer.step()
    assert hash_weights(encoder.vision) == encoder_args["weights_hash"], "training changed frozen weights"
    path = save_model(tmp_path / "best.pt", model, "clip_seg", {"encoder": encoder_args, "base_channels": 2})
    return model.eval().to(memory_format=torch.channels_last), path


def test_frozen_clip_is_loaded_from_its_folder(frozen, tmp_path):
    model, path = frozen
    image = torch.rand(1, 3, 40, 40)
    with torch.inference_mode():
        assert torch.equal(load_model(path, CPU)[0](image), model(image))
        (tmp_path / "clip").rename(tmp_path / "moved")
        with pytest.raises(InputError, match=r"no CLIP weights for --clip-model .*clip"):
            load_model(path, CPU)
        moved, _ = load_model(path, CPU, clip_model=str(tmp_path / "moved"))
        assert torch.equal(moved(image), model(image))


def test_frozen_clip_is_verified_by_its_hash(frozen, tmp_path):
    weights = load_file(tmp_path / "clip/model.safetensors")
    name = next(key for key in weights if "mlp.fc1.weight" in key)
    weights[name] = weights[name] + 1e-3
    save_file(weights, tmp_path / "clip/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"holds other weights .* than the model was trained on"):
        load_model(frozen[1], CPU)


@pytest.mark.parametrize("options", [{}, {"frozen": True, "random_init": True}])
def test_other_weights_are_in_the_checkpoint(clip_folder, options):
    """Trained ones, and random ones even when they are frozen: nothing has to be found again."""
    encoder, encoder_args = make_encoder(str(clip_folder), **options)
    state = model_state(ClipSegmenter(encoder, base_channels=2))
    assert any("vision" in key for key in state) and encoder_args["weights_hash"] is None
    build_segmenter(encoder=encoder_args | {"clip_model": "nowhere"}, base_channels=2).load_state_dict(state)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_whole_clip_gives_its_vision_half(tmp_path, file):
    """From safetensors, and from the hub's default file: a pickle with a buffer that transformers 4 had."""
    torch.manual_seed(0)
    whole = CLIPModel(CLIPConfig(vision_config=TINY_CLIP, text_config=TEXT))
    whole.save_pretrained(tmp_path)
    saved = tmp_path / "model.safetensors"
    if file == "pytorch_model.bin":
        weights = load_file(saved)
        assert any(key.startswith("vision_model.encoder.layers.0.") for key in weights)
        saved.unlink()
        torch.save({**weights, "vision_model.embeddings.position_ids": torch.arange(17)[None]}, tmp_path / file)
    vision = CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP))
    vision.load_state_dict(whole.vision_model.state_dict())
    assert hash_weights(load_vision(str(tmp_path))) == hash_weights(vision)


def test_half_precision_weights_become_float32(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**TINY_CLIP)).half().save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in load_vision(str(tmp_path)).parameters()} == {torch.float32}


def test_models_other_than_clip_vision_transformers(tmp_path, clip_folder):
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(tmp_path / "text")
    with pytest.raises(InputError, match=r"is a clip_text_model model, expected a CLIP with a vision transformer"):
        load_vision(str(tmp_path / "text"))
    for config, message in [
        ('{"model_type": "resnet"}', r"is a resnet model, expected a CLIP"),
        ('{"architecture": "resnet50_clip"}', r"other is a None model, expected a CLIP"),  # as timm saves RN50
        ((clip_folder / "config.json").read_text(),
         r"(?s)no CLIP weights for .*other.*hf download openai/.*--clip-random-init"),
    ]:  # fmt: skip
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other/config.json").write_text(config)
        with pytest.raises(InputError, match=message):
            load_vision(str(tmp_path / "other"))


def test_missing_weights_are_an_error(clip_folder, tmp_path):
    shutil.copytree(clip_folder, tmp_path / "tiny")
    weights = load_file(clip_folder / "model.safetensors")
    del weights[next(key for key in weights if "layers.3.mlp.fc2.bias" in key)]
    save_file(weights, tmp_path / "tiny/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of a CLIP vision transformer, .*layers\.3\.mlp\.fc2\.bias"):
        load_vision(str(tmp_path / "tiny"))


def test_image_size_must_be_a_multiple_of_the_patch(clip_folder):
    message = "--clip-image-size 45 is not a multiple of the patch size of 8 pixels: use 48"
    with pytest.raises(InputError, match=message):
        make_encoder(str(clip_folder), image_size=45)
