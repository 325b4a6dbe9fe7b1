"""Single files with the original names: diffusers' loader reads ours, we read others', and no bit changes."""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from conditioning.tokenizer import save_tokenizer, train_tokenizer
from ldm.errors import RunError, UserError
from ldm.formats.single_file import (
    _empty_networks,
    _tables,
    from_original,
    layouts,
    load_single_file,
    read_pickled,
    save_single_file,
    to_original,
)
from ldm.networks.unet import add_guidance
from ldm.pipeline import LatentDiffusionPipeline
from ldm.schedule import BetaSchedule
from support.commands import Ended, run_script
from support.models import small_unet, tiny_pipeline

PROMPTS = ["a red star", "a small blue circle"]
SD1: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    "text": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": 77,
        "vocab_size": 49408,
    },
}
"""The configuration of Stable Diffusion 1.5."""
NARROW: dict[str, dict[str, Any]] = {
    "unet": SD1["unet"] | {"sample_size": 16, "cross_attention_dim": 32, "block_out_channels": (32, 64, 64, 96)},
    "vae": SD1["vae"] | {"block_out_channels": (32, 32, 64, 64), "sample_size": 128},
    "text": SD1["text"]
    | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
        "vocab_size": 600,
    },
}
SD2: dict[str, dict[str, Any]] = {
    "unet": NARROW["unet"] | {"use_linear_projection": True, "attention_head_dim": (2, 4, 4, 6)},
    "vae": NARROW["vae"],
    "text": NARROW["text"] | {"hidden_act": "gelu", "num_hidden_layers": 3, "vocab_size": 49408},  # OpenCLIP's
}
ODD: dict[str, dict[str, Any]] = {
    "unet": NARROW["unet"]
    | {
        "block_out_channels": (32, 64, 96),
        "layers_per_block": 3,
        "transformer_layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "attention_head_dim": (1, 2, 3),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    },
    "vae": NARROW["vae"]
    | {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "text": NARROW["text"] | {"hidden_act": "gelu", "num_hidden_layers": 24},
}
"""A configuration with other levels, layers and depths, and a text tower of OpenCLIP's depth, all of it used."""


def noisy(module: nn.Module, seed: int) -> Any:
    """Make every weight random, so that none can be confused with another, but near its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return module.eval().requires_grad_(False)


def stock_folder(folder: Path, shape: dict[str, dict[str, Any]], scheduler: Any) -> Path:
    """Write a diffusers folder with random weights, made by diffusers and transformers except for the tokenizer."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, 600, shape["text"]["max_position_embeddings"])
    text = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape["text"],
    )
    pipe = StableDiffusionPipeline(
        noisy(AutoencoderKL(**shape["vae"]), 1),
        noisy(CLIPTextModel(text), 2),
        tokenizer,
        noisy(UNet2DConditionModel(**shape["unet"]), 3),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)
    save_tokenizer(tokenizer, folder / "tokenizer")
    return folder


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS: dict[str, Callable[[Path], object]] = {
    "sd1": lambda folder: stock_folder(folder, NARROW, PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)),
    "sd2": lambda folder: stock_folder(
        folder, SD2, DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    ),
    "odd": lambda folder: stock_folder(folder, ODD, DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)),
    "ours": lambda folder: tiny_pipeline().save_pretrained(folder),
    "learned": lambda folder: tiny_pipeline(variance="learned").save_pretrained(folder),
    "inpaints": lambda folder: tiny_pipeline(inpaints=True).save_pretrained(folder),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """made(kind) returns a diffusers folder and the single file that is made from it."""
    root, done = tmp_path_factory.mktemp("models"), set()

    def make(kind: str) -> tuple[Path, Path]:
        folder, file = root / kind, root / f"{kind}.safetensors"
        if kind not in done:
            KINDS[kind](folder)
            save_single_file(LatentDiffusionPipeline.from_pretrained(folder), file)
            done.add(kind)
        return folder, file

    return make


def stock(file: Path, folder: Path) -> StableDiffusionPipeline:
    index = json.loads((folder / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# -- everybody's file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_reads_the_same_weights(made: Any, kind: str) -> None:
    folder, file = made(kind)
    ours, theirs = LatentDiffusionPipeline.from_pretrained(folder), stock(file, folder)
    assert equal(ours.unet.state_dict(), theirs.unet.state_dict())
    assert equal(ours.autoencoder.vae.state_dict(), theirs.vae.state_dict())
    assert equal(ours.text_encoder.model.state_dict(), theirs.text_encoder.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_one_that_diffusers_converter_knows(made: Any, kind: str) -> None:
    folder, file = made(kind)
    weights, pipe = load_file(file), LatentDiffusionPipeline.from_pretrained(folder)
    unet, vae = dict(pipe.unet.config), dict(pipe.autoencoder.vae.config)
    assert equal(convert_ldm_unet_checkpoint(dict(weights), unet), pipe.unet.state_dict())
    assert equal(convert_ldm_vae_checkpoint(dict(weights), vae), pipe.autoencoder.vae.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_a_file_contain_the_same_bits(made: Any, kind: str, tmp_path: Path) -> None:
    folder, file = made(kind)
    pipe = LatentDiffusionPipeline.from_single_file(file, config=folder)
    pipe.save_pretrained(tmp_path / "folder")
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = (load_file(f / f"{part}.safetensors") for f in (folder, tmp_path / "folder"))
        if part == "text_encoder/model":  # with or without a prefix, depending on transformers' version
            before, after = ({k.removeprefix("text_model."): v for k, v in s.items()} for s in (before, after))
        assert equal(before, after), part
    save_single_file(LatentDiffusionPipeline.from_pretrained(tmp_path / "folder"), tmp_path / "again.safetensors")
    assert equal(load_file(file), load_file(tmp_path / "again.safetensors"))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "odd", "ours"])
def test_a_step_equals_that_of_stock_diffusers(made: Any, kind: str) -> None:
    folder, file = made(kind)
    difference, size = one_step(file, folder)
    print(f"{kind}: {difference:.1e} at a deviation of {size:.2f}")
    assert difference <= 1e-4
    assert size > 0.1  # an image and not one colour


def one_step(file: Path, folder: Path, **size: int) -> tuple[float, float]:
    """Return the greatest difference of our latents and diffusers' after a step of ddim, and their deviation."""
    theirs = stock(file, folder)
    theirs.scheduler = DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    settings = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent", **size}
    one, other = (
        pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **settings, **more).images
        for pipe, more in (
            (LatentDiffusionPipeline.from_single_file(file, config=folder), {"sampler": "ddim", "spacing": "trailing"}),
            (theirs, {}),
        )
    )
    return float((one - other).abs().max()), float(other.std())


@pytest.mark.slow
def test_the_shape_of_stable_diffusion_1_5_at_full_size() -> None:
    with tempfile.TemporaryDirectory() as where:  # 8.6 GB, which tmp_path would keep
        scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
        folder, file = stock_folder(Path(where) / "sd15", SD1, scheduler), Path(where) / "sd15.safetensors"
        save_single_file(LatentDiffusionPipeline.from_pretrained(folder), file)
        theirs, ours = stock(file, folder), load_single_file(file, folder)
        assert equal(theirs.unet.state_dict(), ours.unet.state_dict())
        assert equal(theirs.vae.state_dict(), ours.vae.state_dict())
        assert equal(theirs.text_encoder.state_dict(), ours.text_encoder.state_dict())
        del theirs, ours
        difference, size = one_step(file, folder, height=128, width=128)
    print(f"full size: {difference:.1e} at a deviation of {size:.2f}")
    assert difference <= 1e-4


# -- names ------------------------------------------------------------------------------------------------------------


def full_size(tmp_path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights of Stable Diffusion 1.5, without the weights."""
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        (tmp_path / part).mkdir()
    with torch.device("meta"):
        UNet2DConditionModel(**SD1["unet"]).save_config(tmp_path / "unet")
        AutoencoderKL(**SD1["vae"]).save_config(tmp_path / "vae")
    CLIPTextConfig(**SD1["text"]).save_pretrained(tmp_path / "text_encoder")
    DDIMScheduler(**BETAS).save_pretrained(tmp_path / "scheduler")
    return {
        name: tuple(module.get_parameter(ours[0]).shape)
        for module, layout in layouts(_empty_networks(tmp_path), openclip=False)
        for name, ours in layout.items()
    }


def test_the_names_of_stable_diffusion_1_5(tmp_path: Path) -> None:
    names = full_size(tmp_path)
    counts = [sum(name.startswith(p) for name in names) for p in ("model.", "first_stage_model.", "cond_stage_model.")]
    assert counts == [686, 248, 196]  # of the released files, whose 197th of text is position_ids
    unet, vae = "model.diffusion_model.", "first_stage_model."
    for name, shape in {  # as the original configuration v1-inference.yaml makes them
        f"{unet}time_embed.2.weight": (1280, 1280),
        f"{unet}input_blocks.0.0.weight": (320, 4, 3, 3),
        f"{unet}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        f"{unet}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{unet}input_blocks.11.0.out_layers.3.bias": (1280,),
        f"{unet}middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
        f"{unet}middle_block.2.emb_layers.1.weight": (1280, 1280),
        f"{unet}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.11.0.in_layers.2.weight": (320, 640, 3, 3),
        f"{unet}out.2.weight": (4, 320, 3, 3),
        f"{vae}encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        f"{vae}encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        f"{vae}encoder.norm_out.weight": (512,),
        f"{vae}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{vae}decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{vae}decoder.mid.attn_1.proj_out.bias": (512,),
        f"{vae}quant_conv.weight": (8, 8, 1, 1),
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.weight": (768, 3072),
    }.items():
        assert names[name] == shape, name
    assert "model.diffusion_model.input_blocks.10.1.norm.weight" not in names


def test_the_autoencoders_attention_is_made_of_convolutions(made: Any) -> None:
    folder, file = made("sd1")
    weights = load_file(file)
    names = [f"first_stage_model.encoder.mid.attn_1.{x}.weight" for x in ("q", "k", "v", "proj_out")]
    assert {tuple(weights[name].shape) for name in names} == {(64, 64, 1, 1)}
    flat = weights | {name: weights[name][:, :, 0, 0] for name in names}
    one, other = from_original(weights, folder), from_original(flat, folder)
    assert equal(one.vae.state_dict(), other.vae.state_dict())


def test_openclip_stores_query_key_and_value_in_one_tensor(made: Any) -> None:
    (folder, file), (_, first) = made("sd2"), made("sd1")
    weights = load_file(file)
    assert weights["cond_stage_model.model.transformer.resblocks.2.attn.in_proj_weight"].shape == (96, 32)
    assert not any(name.startswith("cond_stage_model.transformer.") for name in weights)
    assert not any(name.startswith("cond_stage_model.model.") for name in load_file(first))
    extras = {  # the unused layer, and entries that generation doesn't need
        name.replace("resblocks.2.", "resblocks.3."): value for name, value in weights.items() if "resblocks.2." in name
    } | {"cond_stage_model.model.text_projection": torch.zeros(32, 32), "model_ema.decay": torch.tensor(0.999)}
    extras |= {"cond_stage_model.model.logit_scale": torch.tensor(1.0), "model_ema.num_updates": torch.tensor(3)}
    parts = from_original(weights | extras, folder)
    assert equal(parts.text_encoder.state_dict(), from_original(weights, folder).text_encoder.state_dict())


def test_the_schedule_is_written_as_the_original_has_it(made: Any) -> None:
    folder, file = made("sd1")
    weights = load_file(file)
    scheduler = PNDMScheduler.from_pretrained(str(folder), subfolder="scheduler")
    assert torch.allclose(weights["alphas_cumprod"], scheduler.alphas_cumprod, rtol=1e-5)
    assert torch.allclose(weights["betas"], scheduler.betas, rtol=1e-5)
    assert {weights[name].dtype for name in ("betas", "alphas_cumprod_prev", "posterior_variance")} == {torch.float32}
    flow = to_original(tiny_pipeline("flow", schedule="flow"))
    assert "betas" not in flow
    assert "alphas_cumprod" not in flow


@pytest.mark.parametrize(
    ("kind", "architecture", "prediction", "resolution"),
    [
        ("sd1", "latent-diffusion", "epsilon", "128x128"),
        ("sd2", "latent-diffusion", "v", "128x128"),
    ],
)
def test_metadata_describes_architecture_and_prediction_type(
    made: Any, kind: str, architecture: str, prediction: str, resolution: str
) -> None:
    with safe_open(made(kind)[1], framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == prediction
    assert metadata["modelspec.resolution"] == resolution
    assert float(metadata["scaling_factor"]) == 0.18215


def test_settings_that_other_programs_may_ignore_give_warnings(
    made: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_pipeline("flow", schedule="flow")
    pipe.autoencoder.vae.register_to_config(scaling_factor=0.5)
    save_single_file(pipe, tmp_path / "flow.safetensors")
    assert "schedule or target flow" in caplog.text
    assert "scaling factor 0.5" in caplog.text
    assert (
        "unet block_out_channels [32, 64] differs from Stable Diffusion's [320, 640, 1280, 1280]: other tools"
        in caplog.text
    )
    caplog.clear()
    folder, file = made("sd1")
    save_file(load_file(file), tmp_path / "v.safetensors", {"modelspec.prediction_type": "v"})
    load_single_file(tmp_path / "v.safetensors", folder)
    assert "has prediction_type 'v' in its metadata, but the configuration's 'epsilon' is used" in caplog.text


def test_the_stored_tables_are_the_coefficients_of_the_process() -> None:
    """The posterior is the product of two Gaussians, x_t given x_s and x_s given x0 (Ho et al. 2020, eq. 7)."""
    betas = np.linspace(0.02, 0.9, 7)
    bar = np.cumprod(1 - betas)
    before = np.concatenate([[1.0], bar[:-1]])
    with np.errstate(divide="ignore"):
        variance = 1 / ((1 - betas) / betas + 1 / (1 - before))
    x0, eps, x_s = 0.7, -1.3, 0.4
    x_t = np.sqrt(bar) * x0 + np.sqrt(1 - bar) * eps
    mean = variance * np.sqrt(1 - betas) / betas * x_s
    mean[1:] += (variance * np.sqrt(before))[1:] / (1 - before)[1:] * x0
    mean[0] = x0
    t = {name: table.double().numpy() for name, table in _tables(BetaSchedule(torch.tensor(betas))).items()}
    found = {
        "betas": (t["betas"], betas),
        "bar": (t["alphas_cumprod"], bar),
        "before": (t["alphas_cumprod_prev"], before),
        "x_t": (t["sqrt_alphas_cumprod"] * x0 + t["sqrt_one_minus_alphas_cumprod"] * eps, x_t),
        "x0": (t["sqrt_recip_alphas_cumprod"] * x_t - t["sqrt_recipm1_alphas_cumprod"] * eps, np.full(7, x0)),
        "noise": (np.exp(t["log_one_minus_alphas_cumprod"]), 1 - bar),
        "variance": (t["posterior_variance"], variance),
        "log variance": (t["posterior_log_variance_clipped"], np.log(np.maximum(variance, 1e-20))),
        "mean": (t["posterior_mean_coef1"] * x0 + t["posterior_mean_coef2"] * x_s, mean),
    }
    for name, (ours, expected) in found.items():
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_half_precision_is_converted_to_float32_and_needs_no_open_file(made: Any, tmp_path: Path) -> None:
    folder, file = made("sd1")
    halves = {name: value.half() for name, value in load_file(file).items()}
    extras = {  # of the released files
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(24)[None],
        "model_ema.diffusion_modeloutbias": torch.zeros(4),
        "sqrt_recipm1_alphas_cumprod": torch.ones(1000),
        "logvar": torch.zeros(1000),
    }
    save_file(halves | extras, tmp_path / "half.safetensors")
    parts = load_single_file(tmp_path / "half.safetensors", folder)
    (tmp_path / "half.safetensors").write_bytes(b"")
    assert torch.equal(parts.unet.conv_in.weight, halves["model.diffusion_model.input_blocks.0.0.weight"].float())


# -- what doesn't fit -------------------------------------------------------------------------------------------------


def test_parts_without_a_counterpart_are_named() -> None:
    pipe = tiny_pipeline()
    unet = small_unet(modulation=True)
    with pytest.raises(UserError, match=r"unet\.modulation .* has no counterpart"):
        to_original(LatentDiffusionPipeline(unet, pipe.autoencoder, pipe.text_encoder, pipe.process))
    add_guidance(pipe.unet)
    with pytest.raises(UserError, match=r"unet\.time_embedding\.cond_proj\.weight: has no counterpart"):
        to_original(pipe)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"freq_shift": 1}, "unet freq_shift 1: the original layout supports only 0"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ("unet", {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "block 'AttnDownBlock2D': must be one of"),
        ("unet", {"mid_block_type": "UNetMidBlock2D"}, "unet mid_block_type 'UNetMidBlock2D'"),
        ("vae", {"use_quant_conv": False}, "vae use_quant_conv False"),
        ("vae", {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "vae latents_mean"),
        ("vae", {"block_out_channels": [16]}, "configuration .* can't be read|the file has"),
        ("vae", {"block_out_channels": [16, 64]}, "has shape .* in the file, but .* in the configuration"),
        ("unet", {"block_out_channels": "many"}, "configuration .* can't be read"),
        ("text_encoder", {"model_type": "t5"}, "model_type 't5'"),
        (
            "text_encoder",
            {"num_hidden_layers": 3},
            r"the file has no weight cond_stage_model\.transformer\.text_model\.encoder\.layers\.2",
        ),
        ("text_encoder", {"hidden_size": -1}, "configuration .* can't be read"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    made: Any, tmp_path: Path, part: str, change: dict[str, Any], message: str
) -> None:
    folder, file = made("ours")
    shutil.copytree(folder, tmp_path / "config")
    path = tmp_path / "config" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as error:
        load_single_file(file, tmp_path / "config")
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_are_refused(made: Any, tmp_path: Path) -> None:
    folder, file = made("ours")
    weights = load_file(file)
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    less = {key: value for key, value in weights.items() if key != name}
    for wrong, message in (
        (less, f"the file has no weight {name}"),
        (weights | {"model.diffusion_model.label_emb.0.0.weight": torch.ones(2)}, r"the file has .*label_emb"),
        (
            weights | {"cond_stage_model.transformer.text_model.encoder.layers.9.mlp.fc1.bias": torch.ones(2)},
            "layers.9",
        ),
        (weights | {name: torch.full_like(weights[name], torch.nan)}, "contains NaN or infinity"),
        (weights | {name: torch.ones(3, 3)}, r"shape \(3, 3\) in the file, but \(32, 32, 3, 3\)"),
        (weights | {name: torch.tensor(1.0)}, r"shape \(\) in the file"),
        (weights | {name: torch.ones(32, 32, 3, 3, dtype=torch.int8)}, "is torch.int8"),
        (weights | {name: torch.ones(32, 32, 3, 3, device="meta")}, "meta"),
        (weights | {name: torch.ones(32, 32, 3, 3).to_sparse()}, "sparse"),
        ({}, "the file has no weight"),
    ):
        with pytest.raises(UserError, match=message):
            from_original(wrong, folder)
    with pytest.raises(UserError, match=r"configuration .* can't be read"):
        load_single_file(file, tmp_path)
    with pytest.raises(UserError, match="exists already"):
        save_single_file(tiny_pipeline(), file)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        save_single_file(tiny_pipeline(), tmp_path / "model.ckpt")


def test_damaged_files_give_one_line(made: Any, tmp_path: Path) -> None:
    folder, file = made("ours")
    content, path = file.read_bytes(), tmp_path / "damaged.safetensors"
    huge = (2**62).to_bytes(8, "little") + content[8:]
    for damaged in (b"", content[:100], content[: len(content) // 2], huge, b"\0" * 64, pickle.dumps({"a": 1})):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"can't read .* as safetensors"):
            load_single_file(path, folder)
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="can't read"):
            load_single_file(missing, folder)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(weights: object, path: Path, metadata: object) -> None:
        from safetensors import SafetensorError

        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr("ldm.formats.single_file.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        save_single_file(tiny_pipeline(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


# -- pickles and the command ------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_pickles_are_converted_only_on_request_and_never_executed(made: Any, tmp_path: Path) -> None:
    folder, file = made("sd1")
    weights, canary, path = load_file(file), tmp_path / "canary", tmp_path / "model.ckpt"
    torch.save({"state_dict": weights, "global_step": 470000, "epoch": 3}, path)
    with pytest.raises(UserError, match="is a pickle, which isn't loaded"):
        load_single_file(path, folder)
    assert equal(read_pickled(path), weights)

    evil = {"state_dict": weights, "callbacks": Malicious(canary)}
    attacks = [pickle.dumps(evil["callbacks"], protocol) for protocol in (0, 2, 5)]
    for zipped in (True, False):
        torch.save(evil, path, _use_new_zipfile_serialization=zipped)
        attacks.append(path.read_bytes())
    pickle.loads(attacks[1])  # the pickle does execute code when loaded
    canary.rmdir()
    torch.save(weights["betas"], path)
    attacks += [path.read_bytes(), b"", b"\x80", *map(pickle.dumps, ([1], 3, {"state_dict": 3}))]
    for attack in attacks:
        for name in ("model.ckpt", "model.pt", "model.safetensors"):
            (tmp_path / name).write_bytes(attack)
            for load in (read_pickled, lambda p: load_single_file(p, folder)):
                with pytest.raises(UserError) as error:
                    load(tmp_path / name)
                assert "\n" not in str(error.value)
                assert "weights_only" not in str(error.value)  # no advice to execute it anyway
        assert not canary.exists()


def convert(model: Path | str, out: Path | str, config: Path | str = "") -> Ended:
    return run_script("convert", "--model", model, "--out", out, "--config", config)


def test_the_command_converts_all_three_ways(made: Any, tmp_path: Path) -> None:
    folder, file = made("sd1")
    assert convert(folder, tmp_path / "new" / "a.safetensors")[0] == 0
    assert equal(load_file(file), load_file(tmp_path / "new" / "a.safetensors"))
    assert convert(tmp_path / "new" / "a.safetensors", tmp_path / "folder", folder)[0] == 0
    torch.save({"state_dict": load_file(file)}, tmp_path / "b.ckpt")
    assert convert(tmp_path / "b.ckpt", tmp_path / "b.safetensors", folder)[0] == 0
    assert equal(load_file(file), load_file(tmp_path / "b.safetensors"))
    one, other = (LatentDiffusionPipeline.from_pretrained(f) for f in (folder, tmp_path / "folder"))
    assert equal(one.unet.state_dict(), other.unet.state_dict())
    assert torch.equal(one.encode(PROMPTS), other.encode(PROMPTS))
    written = ["b.ckpt", "b.safetensors", "b.yaml", "folder", "new"]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.is_dir() or p.name != "b-text") == written


def test_the_command_refuses_in_one_line(made: Any, tmp_path: Path) -> None:
    folder, file = made("sd1")
    before = file.read_bytes()
    torch.save({"state_dict": Malicious(tmp_path / "canary")}, tmp_path / "evil.ckpt")
    out, torn = tmp_path / "out", tmp_path / "torn"
    shutil.copytree(folder, torn)
    (torn / "tokenizer" / "tokenizer.json").write_text("{")
    bare = Path(shutil.copy(file, tmp_path / "bare.safetensors"))
    for arguments, message in (
        ((folder, file), "exists already"),
        ((file, folder, folder), "exists already"),
        ((folder, tmp_path / "model.ckpt"), "pickle files can't be written"),
        ((bare, out), "it isn't a Stable Diffusion 1, and no description NAME.yaml is beside it"),
        ((file, out, tmp_path / "none"), "--config"),
        ((file, out, torn), "tokenizer"),
        ((folder, out, folder), "only for single-file models"),
        ((tmp_path / "none", out), "no such file or folder"),
        (("", out), "--model is missing"),
        ((folder, ""), "--out is missing"),
        ((tmp_path / "evil.ckpt", out, folder), "contains objects other than weights"),
        ((file, out, made("ours")[0]), "the file has no weight"),
    ):
        status, _, error = convert(*arguments)
        assert status == 2, error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare.safetensors", "evil.ckpt", "torn"]
