"""Every part of a model's folder is read completely: no weight is left at a random value, and none is ignored."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.errors import UserError
from ldm.formats.hub import fill
from ldm.networks.unet import check_supported, load_unet
from ldm.pipeline import LatentDiffusionPipeline
from support.commands import run_script
from support.models import tiny_pipeline

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


LOADERS: dict[str, Callable[[Path], object]] = {
    "unet": load_unet,
    "vae": Autoencoder.load,
    "text_encoder": ClipTextEncoder.load,
}
"""How LatentDiffusionPipeline.from_pretrained reads the parts."""


def refused(folder: Path, part: str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        LOADERS[part](folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def weights_of(part: Any) -> Weights:
    return getattr(part, "vae", part).state_dict()


def last(weights: Weights) -> str:
    return sorted(weights)[-1]


def adapter(weights: Weights) -> Weights:
    """As peft names the weights of a layer that has an adapter."""
    name = next(name for name in weights if name.endswith(("to_q.weight", "q_proj.weight")))
    layer = name.removesuffix(".weight")
    added = {f"{layer}.base_layer.weight": weights[name], f"{layer}.lora_A.default.weight": torch.zeros(2, 32)}
    return {key: value for key, value in weights.items() if key != name} | added


DAMAGE: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "missing": (lambda w: {k: v for k, v in w.items() if k != last(w)}, "is missing"),
    "surplus": (lambda w: w | {"mid_block.extra.weight": torch.ones(3)}, "it has a weight mid_block.extra.weight"),
    "misshapen": (lambda w: w | {last(w): torch.ones(3)}, "has shape (3,), but config.json needs"),
    "nan": (lambda w: w | {last(w): torch.full_like(w[last(w)], torch.nan)}, "contains NaN or infinity"),
    "integers": (lambda w: w | {last(w): torch.ones_like(w[last(w)], dtype=torch.int8)}, "is torch.int8"),
}


@pytest.mark.parametrize("part", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_weights_that_do_not_fit_are_named(folder: Path, part: str, damage: str) -> None:
    path, (change, message) = folder / part / FILES[part], DAMAGE[damage]
    weights = change(load_file(path))
    save_file(weights, path)
    refused(folder, part, message)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_attached_adapter_is_named(folder: Path, part: str) -> None:
    path = folder / part / FILES[part]
    save_file(adapter(load_file(path)), path)
    refused(folder, part, "is missing; an adapter is attached: merge it into the weights, or remove it")


@pytest.mark.parametrize("part", FILES)
def test_damaged_files_are_named(folder: Path, part: str) -> None:
    path = folder / part / FILES[part]
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, part, f"{FILES[part]} can't be read as safetensors")
    path.rename(path.with_suffix(".bin"))
    refused(folder, part, f"it has no {FILES[part]}", "pickles are never read")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"_class_name": "DiTTransformer2DModel"}, "_class_name DiTTransformer2DModel, not UNet2D"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "_class_name AutoencoderTiny, not AutoencoderKL"),
        ("text_encoder", {"model_type": "t5"}, "model_type 't5'"),
        ("text_encoder", {"model_type": "clip_vision_model"}, "model_type 'clip_vision_model'"),
        ("unet", {"addition_embed_type": "text_time"}, "a UNet of Stable Diffusion XL"),
        ("unet", {"time_cond_proj_dim": 256}, "weight time_embedding.cond_proj.weight is missing"),
        ("unet", {"time_cond_proj_dim": -2}, "time_cond_proj_dim -2: must be the width"),
        ("unet", {"class_embed_type": "timestep"}, "a class-conditional UNet"),
        ("unet", {"num_class_embeds": 10}, "num_class_embeds 10: a class-conditional UNet"),
        ("unet", {"dual_cross_attention": True}, "a UNet with two conditions"),
        ("unet", {"encoder_hid_dim": 8, "encoder_hid_dim_type": "text_proj"}, "a projection of its condition"),
        ("unet", {"down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"]}, "'SimpleCrossAttnDownBlock2D'"),
        ("unet", {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "'UNetMidBlock2DSimpleCrossAttn'"),
        ("unet", {"sample_size": None}, "sample_size None"),
        ("unet", {"cross_attention_dim": [32, 32]}, "cross_attention_dim [32, 32]"),
        ("unet", {"quantization_config": {"load_in_8bit": True}}, "its weights are quantised"),
        ("vae", {"block_out_channels": "many"}, "can't load an autoencoder"),
    ],
)
def test_other_networks_are_named(folder: Path, part: str, change: dict[str, Any], message: str) -> None:
    edit(folder / part / "config.json", **change)
    refused(folder, part, message)


def test_the_units_of_stable_diffusion_are_supported() -> None:
    check_supported({"sample_size": 64, "cross_attention_dim": 768, "class_embed_type": None, "attention_head_dim": 8})


def test_a_small_autoencoder_of_another_class_is_refused(folder: Path) -> None:
    """TAESD's folder, with and without the class in its configuration."""
    shutil.rmtree(folder / "vae")
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(
        folder / "vae"
    )
    refused(folder, "vae", "_class_name AutoencoderTiny, not AutoencoderKL")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k[0] != "_"}))
    refused(folder, "vae", "can't load an autoencoder")


def shard(folder: Path, stem: str, variant: str = "") -> list[Path]:
    """Split a network's weights into two files, as diffusers and transformers do."""
    single = folder / f"{stem}.safetensors"
    weights = load_file(single)
    single.unlink()
    names, files = sorted(weights), [f"{stem}{variant}-{k:05}-of-00002.safetensors" for k in (1, 2)]
    for k, file in enumerate(files):
        save_file({name: weights[name] for name in names[k::2]}, folder / file)
    index = {"metadata": {}, "weight_map": {name: files[k % 2] for k, name in enumerate(names)}}
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))
    return [folder / file for file in files]


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("part", FILES)
def test_a_missing_shard_is_named(folder: Path, saved: Path, part: str, variant: str) -> None:
    files = shard(folder / part, FILES[part].removesuffix(".safetensors"), variant)
    before, after = (weights_of(LOADERS[part](path)) for path in (saved, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    files[1].unlink()
    refused(folder, part, f"the shard {files[1].name} is missing")
    for index in (folder / part).glob("*.index*"):
        index.unlink()
    refused(folder, part, f"the shard {files[1].name} is missing")


def test_an_index_that_leaves_its_folder_is_refused(folder: Path) -> None:
    file, _ = shard(folder / "unet", "diffusion_pytorch_model")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    edit(index, weight_map={"conv_in.weight": f"../unet/{file.name}"})
    refused(folder, "unet", "must be a file in the same folder")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_variant_is_read_if_there_is_no_other(folder: Path, variant: str) -> None:
    """A folder as from save_pretrained(variant="fp16")."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    halves: dict[str, Weights] = {}
    for part, file in FILES.items():
        path = folder / part / file
        halves[part] = {name: value.to(dtype) for name, value in load_file(path).items()}
        path.unlink()
        save_file(halves[part], path.with_name(file.replace(".safetensors", f".{variant}.safetensors")))
    pipe = LatentDiffusionPipeline.from_pretrained(folder)
    for network, part in (
        (pipe.unet, "unet"),
        (pipe.autoencoder.vae, "vae"),
        (pipe.text_encoder.model, "text_encoder"),
    ):
        for name, value in network.state_dict().items():
            stored = halves[part].get(name, halves[part].get(f"text_model.{name}"))
            assert value.dtype == torch.float32
            assert torch.equal(value, stored.float())


def test_a_variant_is_downloaded_if_there_is_no_other(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    repository = tmp_path / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    snapshot = shutil.copytree(saved, repository / "snapshots" / "0123")
    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return snapshot_download(name, allow_patterns=allow_patterns, cache_dir=tmp_path)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("ldm.formats.hub.snapshot_download", download)
    assert Autoencoder.load("someone/model").digest == Autoencoder.load(saved).digest
    assert not any("fp16" in pattern for pattern in asked)
    weights = Path(snapshot) / "vae" / FILES["vae"]
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert Autoencoder.load("someone/model").digest == Autoencoder.load(saved).digest
    assert "vae/diffusion_pytorch_model.fp16.safetensors" in asked
    assert not any("text_encoder" in pattern for pattern in asked)
    LatentDiffusionPipeline.from_pretrained("someone/model")


def test_the_earlier_names_of_an_autoencoders_attention_are_read(tmp_path: Path) -> None:
    """Stable Diffusion 1's own folders have them."""
    from autoencoder.model import build_autoencoder

    vae = build_autoencoder(channels=(8, 16), layers=1, latent_channels=4, groups=4)
    vae.save_pretrained(tmp_path)
    earlier = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(tmp_path / FILES["vae"])
    for ours, theirs in earlier.items():
        weights = {name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}."): v for name, v in weights.items()}
    assert sum(".query." in name for name in weights) == 4
    save_file(weights, tmp_path / FILES["vae"])
    loaded = Autoencoder.load(tmp_path).vae.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in vae.state_dict().items())


def test_only_the_other_weights_of_a_whole_clip_are_left_out(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    tower = {"image_size": 16, "patch_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(text_config=config, vision_config=tower | {"intermediate_size": 8}))
    whole.save_pretrained(tmp_path / "clip")
    shutil.copytree(folder / "tokenizer", tmp_path / "clip", dirs_exist_ok=True)
    loaded = ClipTextEncoder.load(tmp_path / "clip")
    assert torch.equal(
        loaded.model.state_dict()["embeddings.token_embedding.weight"],
        whole.text_model.embeddings.token_embedding.weight,
    )
    path = tmp_path / "clip" / "model.safetensors"
    save_file(load_file(path) | {"text_model.prompt_tuning": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"it has a weight text_model\.prompt_tuning"):
        ClipTextEncoder.load(tmp_path / "clip")


def test_weights_are_copies(folder: Path) -> None:
    """A model that is loaded doesn't change with its file."""
    layer = torch.nn.Linear(2, 2, device="meta")
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    fill(layer, weights)
    weights["weight"].zero_()
    assert layer.weight.min() == 1


def test_a_command_gives_one_line(folder: Path) -> None:
    path = folder / "unet" / FILES["unet"]
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if name != "conv_in.weight"}, path)
    ended = run_script("txt2img", "--model", folder, "--out", folder / "out")
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert "the weight conv_in.weight is missing" in ended.err
