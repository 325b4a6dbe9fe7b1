"""diffusers' configurations of a single file, from its description in CompVis' form or from its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import UserError, one_line
from ldm.files import read_json
from ldm.formats.original_config import BETAS, CLASSES
from ldm.formats.plain_yaml import read_yaml
from ldm.parameterization import PREDICTION_TYPE
from ldm.schedule import BetaSchedule, Schedule


class Configs(NamedTuple):
    """diffusers' and transformers' configurations of a model's parts."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    scheduler: dict[str, Any]
    tokenizer: Path | None
    """Folder of the tokenizer; None: it is CLIP's own."""


def guess(state: Mapping[str, Tensor], target: str | None) -> Configs:
    """Return the configurations of a file without a description, if it is a Stable Diffusion 1 or 2.

    target: target in its metadata. Raises UserError for any other file.
    """
    key = state.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    shape = None if key is None else tuple(key.shape)
    target = target or ("v" if "v_pred" in state else None)
    if shape == (320, 768):
        heads: dict[str, Any] = {"num_heads": 8}
        text: dict[str, Any] = {"target": CLASSES["clip"]}
    elif shape == (320, 1024) and target:  # its weights don't say whether they predict eps or v
        heads = {"num_head_channels": 64, "use_linear_in_transformer": True}
        text = {"target": CLASSES["openclip"], "params": {"layer": "penultimate"}}
    else:
        raise UserError("it isn't a Stable Diffusion 1, and no description NAME.yaml is beside it")
    unet = {
        "in_channels": state["model.diffusion_model.input_blocks.0.0.weight"].shape[1],
        "out_channels": 4,
        "model_channels": 320,
        "attention_resolutions": [1, 2, 4],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "context_dim": shape[1],
        **heads,
    }
    params = {
        "parameterization": target or "eps",
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "image_size": 64,
        "unet_config": {"params": unet},
        "first_stage_config": {"params": {"embed_dim": 4, "ddconfig": _SD_VAE}},
        "cond_stage_config": text,
    }
    return _configs(params, Path(), state)


_SD_VAE = {"in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "resolution": 512}


def read_description(path: Path, state: Mapping[str, Tensor]) -> Configs:
    """Return the configurations in a description. state: the file's weights, whose noise schedule counts.

    Raises UserError if it can't be read.
    """
    try:
        return _configs(read_yaml(path)["model"]["params"], path.parent, state)
    except UserError as error:
        raise UserError(f"description {str(path)!r}: {error}") from None
    except Exception as error:  # a wrong value may raise any error
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise UserError(f"description {str(path)!r} can't be read ({reason}): give --config") from None


def _configs(params: Mapping[str, Any], folder: Path, state: Mapping[str, Tensor]) -> Configs:
    unet, stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
    vae = stage["ddconfig"]
    channels = [unet["model_channels"] * k for k in unet["channel_mult"]]
    attention = [2**level in unet["attention_resolutions"] for level in range(len(channels))]
    heads = [c // unet["num_head_channels"] for c in channels] if "num_heads" not in unet else unet["num_heads"]
    text, tokenizer = _text_config(params["cond_stage_config"], folder)
    levels = len(vae["ch_mult"])
    return Configs(
        {
            "sample_size": params.get("image_size", 64),
            "in_channels": unet["in_channels"],
            "out_channels": unet["out_channels"],
            "block_out_channels": channels,
            "layers_per_block": unet["num_res_blocks"],
            "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention],
            "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
            "attention_head_dim": heads,
            "transformer_layers_per_block": unet.get("transformer_depth", 1),
            "cross_attention_dim": unet["context_dim"],
            "use_linear_projection": bool(unet.get("use_linear_in_transformer")),
            "resnet_time_scale_shift": "scale_shift" if unet.get("use_scale_shift_norm") else "default",
        },
        {
            "in_channels": vae["in_channels"],
            "out_channels": vae["out_ch"],
            "block_out_channels": [vae["ch"] * k for k in vae["ch_mult"]],
            "layers_per_block": vae["num_res_blocks"],
            "latent_channels": stage["embed_dim"],
            "sample_size": vae["resolution"],
            "scaling_factor": params.get("scale_factor", 0.18215),
            "mid_block_add_attention": vae.get("attn_type") != "none",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        text,
        _scheduler(params, state),
        tokenizer,
    )


def _scheduler(params: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    names = {theirs: ours for ours, theirs in BETAS.items()}
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": params.get("timesteps", 1000),
        "beta_schedule": names[params.get("beta_schedule", "linear")],
        "beta_start": params.get("linear_start", 1e-4),
        "beta_end": params.get("linear_end", 2e-2),
        "prediction_type": PREDICTION_TYPE[params.get("parameterization", "eps")],
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }
    betas, named = state.get("betas"), Schedule.from_diffusers(config)
    assert isinstance(named, BetaSchedule)
    if betas is not None and not (
        len(betas) == named.T and torch.allclose(named.betas.float(), betas.float(), rtol=1e-4)
    ):
        config |= {"num_train_timesteps": len(betas), "trained_betas": betas.double().tolist()}
    return config


def _text_config(node: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], Path | None]:
    """Return the configuration of a text encoder, and the folder of its tokenizer; None: CLIP's own."""
    target, params = str(node["target"]).rpartition(".")[2], node.get("params") or {}
    version = str(params.get("version", ""))
    if target == "FrozenOpenCLIPEmbedder":
        layers = 23 if params.get("layer") == "penultimate" else 24
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "hidden_act": "gelu"}
        return _CLIP_TEXT | sizes | {"num_hidden_layers": layers, "pad_token_id": 0}, None
    if target != "FrozenCLIPEmbedder":
        raise UserError(f"text encoder {target}: must be FrozenCLIPEmbedder or FrozenOpenCLIPEmbedder")
    if version in ("", "openai/clip-vit-large-patch14"):
        return dict(_CLIP_TEXT), None
    for place in (Path(version), folder / version, folder / Path(version).name):
        if (place / "config.json").is_file():
            return read_json(place / "config.json"), place
    raise UserError(f"text encoder {version!r}: no such folder, nor beside the file")


_CLIP_TEXT: dict[str, Any] = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
"""CLIP-L's text tower, that of Stable Diffusion 1."""
