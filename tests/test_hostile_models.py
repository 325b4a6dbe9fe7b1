"""Models' folders with JSON that was edited, damaged or made to harm: one line, no hang, and no question to the hub."""

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from autoencoder.perceptual import ClipPerceptual
from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from support.models import save_models
from train.evaluation.features import load_features


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline, model/, the same as a single file, and a CLIP, clip/."""
    folder = tmp_path_factory.mktemp("saved")
    save_models(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `saved`. Opening a connection fails the test."""

    def connect(*_: object, **__: object) -> None:
        pytest.fail("a connection was opened")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, connect)
    return Path(shutil.copytree(saved, tmp_path / "models", copy_function=os.link))


def rewrite(path: Path, content: Any) -> None:
    """Replace a file's content: text as it is, a mapping added to the JSON object, anything else as JSON."""
    if isinstance(content, dict):
        content = json.loads(path.read_text()) | content
    text = content if isinstance(content, str) else json.dumps(content)
    path.unlink()  # else the original would change too
    path.write_text(text)


def refused(read: Any, path: Path | str) -> str:
    start = time.process_time()
    with pytest.raises(UserError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert time.process_time() - start < 10
    return str(caught.value)


def from_file(model: Path) -> object:
    return LatentDiffusionPipeline.from_single_file(model.with_name("single.safetensors"), config=model)


NOT_OBJECTS = ['"runwayml/stable-diffusion-v1-5"', "null", "[1]", "3", "", "{", "[" * 50_000, "\x00", "9" * 5000]


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda text: text[:12])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler"])
def test_a_configuration_that_is_no_object_is_refused(folder: Path, part: str, content: str) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    rewrite(folder / "model" / part / name, content)
    for read in (LatentDiffusionPipeline.from_pretrained, from_file):
        refused(read, folder / "model")


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("unet", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ("vae", {"quantization_config": {"quant_method": "gguf"}}, "quantised"),
        ("unet", {"downsample_padding": True}, ""),
        ("unet", {"downsample_padding": "1"}, ""),
        ("unet", {"layers_per_block": 10**9}, "layers_per_block 1000000000: up to 1,000"),
        ("vae", {"layers_per_block": 10**9}, "layers_per_block 1000000000: up to 1,000"),
        ("text_encoder", {"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000: up to 1,000"),
        ("text_encoder", {"max_position_embeddings": 10**15}, "max_position_embeddings"),
        ("unet", {"transformer_layers_per_block": [[10**6]]}, "transformer_layers_per_block 1000000: up to 1,000"),
        ("unet", {"block_out_channels": [32] * 100_000}, "block_out_channels has 100,000 entries"),
        ("vae", {"block_out_channels": [10**30]}, "block_out_channels"),
        ("unet", {"attention_head_dim": True}, "attention_head_dim True: must be int"),
        ("unet", {"attention_head_dim": [2, "2"]}, "attention_head_dim '2': must be int"),
        ("unet", {"flip_sin_to_cos": "yes"}, "flip_sin_to_cos 'yes': must be bool"),
        ("vae", {"scaling_factor": {"a": []}}, "scaling_factor {'a': []}: must be float"),
        ("vae", {"scaling_factor": 0}, "scaling_factor 0: must be a number above 0"),
        ("vae", {"scaling_factor": -1.5}, "scaling_factor -1.5: must be a number above 0"),
        ("unet", {"norm_num_groups": 0}, ""),
        ("unet", {"block_out_channels": []}, ""),
        ("unet", {"attention_head_dim": [0, 0]}, ""),
        ("text_encoder", {"num_attention_heads": 0}, ""),
        ("text_encoder", {"eos_token_id": None}, "eos_token_id None: must be a whole number"),
        ("text_encoder", {"eos_token_id": [2, 3]}, "eos_token_id"),
        ("text_encoder", {"hidden_act": ["gelu"]}, ""),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps"),
        ("scheduler", {"trained_betas": [2.0, -1.0]}, ""),
        ("scheduler", {"trained_betas": "x"}, ""),
        ("scheduler", {"variance_type": [1]}, ""),
        ("scheduler", {"prediction_type": {"a": 1}}, ""),
        ("scheduler", {"timestep_spacing": ["leading"]}, ""),
        ("scheduler", {"trained_betas": None, "beta_schedule": "linear", "beta_start": -3, "beta_end": 5}, ""),
        ("scheduler", {"steps_offset": 10**400}, ""),
    ],
)
def test_hostile_values_are_refused(folder: Path, part: str, change: dict[str, Any], words: str) -> None:
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    rewrite(folder / "model" / part / name, change)

    def generate(path: Path) -> None:
        LatentDiffusionPipeline.from_pretrained(path)("a", num_inference_steps=2)

    assert words in refused(generate, folder / "model")


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda text: text[:12])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_clip_with_damaged_files_is_refused(folder: Path, name: str, content: str) -> None:
    rewrite(folder / "clip" / name, content)
    for read in (ClipPerceptual, load_features):
        refused(read, str(folder / "clip"))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"quantization_config": {"load_in_8bit": True}}, "quantised"),
        ("config.json", {"vision_config": []}, ""),
        ("config.json", {"vision_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ("preprocessor_config.json", {"image_mean": [1, 2]}, "must be three numbers"),
        ("preprocessor_config.json", {"image_std": [1, 0, 1]}, "none of them 0"),
        ("preprocessor_config.json", {"image_std": [1, 10**400, 1]}, "must be three numbers"),
    ],
)
def test_a_clip_with_hostile_values_is_refused(folder: Path, name: str, change: dict[str, Any], words: str) -> None:
    rewrite(folder / "clip" / name, change)
    for read in (ClipPerceptual, load_features):
        assert words in refused(read, str(folder / "clip"))


def test_an_adapter_beside_a_clip_is_refused(folder: Path) -> None:
    """transformers would load the model that it names, from the hub."""
    (folder / "clip/adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "peft_type": "LORA"}')
    for read in (ClipPerceptual, load_features):
        assert "it is an adapter" in refused(read, str(folder / "clip"))


@pytest.mark.parametrize("content", NOT_OBJECTS, ids=lambda text: text[:12])
def test_a_damaged_model_index_is_not_needed(folder: Path, content: str) -> None:
    rewrite(folder / "model/model_index.json", content)
    assert LatentDiffusionPipeline.from_pretrained(folder / "model").model.task == "txt2img"
