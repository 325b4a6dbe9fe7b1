"""The description of an architecture in the form of CompVis' code: NAME.yaml beside NAME.safetensors.

AUTOMATIC1111's web UI builds the network that NAME.yaml describes (Rombach et al.'s `configs/`), and CompVis' and
Stability's code take it as an argument. It contains what the weights don't show: the number of heads, the target, the
schedule and the tokenizer. `original_config_reader` reads it.
"""

from typing import Any

from ldm.errors import UserError
from ldm.formats.file_limits import ORIGINALS, TEXT, Model, depth_of, facts, heads_of, unet_of
from ldm.formats.scheduler_config import name_betas
from ldm.schedule import BetaSchedule

BETAS = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "cosine"}
"""Names of beta schedules: diffusers' → CompVis'."""
CLASSES = {
    "diffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "inpainting": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion",
    "unet": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "vae": "ldm.models.autoencoder.AutoencoderKL",
    "clip": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "openclip": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
}


def text_version(model: Model) -> str | None:
    """Return "1" or "2" if a model has the text encoder of that Stable Diffusion; None for any other."""
    own = facts(model)
    for version, expected in ORIGINALS.items():
        if all(own[fact] == expected[fact] for fact in TEXT if fact != "text padding"):
            return version
    return None


def describe(model: Model, text_folder: str) -> dict[str, Any]:
    """Return the description of a model. text_folder: folder with its text encoder and tokenizer, if that is its own.

    Raises UserError with the first setting that such a description can't contain.
    """
    unet, vae, process = unet_of(model).config, model.autoencoder.vae.config, model.process
    for network, config in (("unet", unet), ("vae", vae)):
        if config.norm_num_groups != 32:
            raise UserError(f"{network} norm_num_groups {config.norm_num_groups}: must be 32")
    schedule = process.schedule
    if not isinstance(schedule, BetaSchedule) or process.target == "flow":
        raise UserError("a flow: must be a schedule of betas, and target eps, v or x0")
    factor = 2 ** (len(vae.block_out_channels) - 1)
    side = unet.sample_size if isinstance(unet.sample_size, int) else max(unet.sample_size)
    inpaints = model.backbone.context_channels > 0
    kind, start, end = name_betas(schedule) or ("", 0.0, 0.0)
    if kind not in ("scaled_linear", "linear"):  # cosine has no ends; the file's tables replace any other
        start, end = 0.00085, 0.012
    params = {
        "parameterization": process.target,
        "beta_schedule": BETAS.get(kind, "linear"),
        "linear_start": float(f"{start:.6g}"),
        "linear_end": float(f"{end:.6g}"),
        "timesteps": schedule.T,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": side,
        "channels": vae.latent_channels,
        "cond_stage_trainable": False,
        "conditioning_key": "hybrid" if inpaints else "crossattn",
        "scale_factor": vae.scaling_factor,
        "use_ema": False,
        "unet_config": _node("unet", _unet(unet)),
        "first_stage_config": _node("vae", _vae(vae, side * factor)),
        "cond_stage_config": _text(model, text_folder),
    }
    if inpaints:
        params["finetune_keys"] = None
    return {"model": _node("inpainting" if inpaints else "diffusion", params)}


def _node(name: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"target": CLASSES[name], **({"params": params} if params else {})}


def _multiples(network: str, channels: list[int]) -> list[int]:
    if uneven := [c for c in channels if c % channels[0]]:
        raise UserError(f"{network} block_out_channels {channels}: {uneven[0]} must be a multiple of {channels[0]}")
    return [c // channels[0] for c in channels]


def _unet(unet: Any) -> dict[str, Any]:
    channels, heads, depth = list(unet.block_out_channels), heads_of(unet), depth_of(unet)
    attention = [block.startswith("CrossAttn") for block in unet.down_block_types]
    used = [c // h for c, h, attends in zip(channels, heads, attention, strict=True) if attends]
    used.append(channels[-1] // heads[-1])  # the middle block always attends
    counts = {h for h, attends in zip(heads, [*attention[:-1], True], strict=True) if attends}
    if not isinstance(depth, int):
        raise UserError(f"unet transformer_layers_per_block {depth}: must be equal at all levels")
    if len(counts) == 1:
        heads_entry = {"num_heads": counts.pop()}
    elif len(set(used)) == 1:
        heads_entry = {"num_head_channels": used[0]}
    else:
        raise UserError(f"unet heads {heads}: must be equal at all levels, or have an equal number of channels")
    return {
        "image_size": 32,  # unused
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "model_channels": channels[0],
        "attention_resolutions": [2**level for level, attends in enumerate(attention) if attends],
        "num_res_blocks": unet.layers_per_block,
        "channel_mult": _multiples("unet", channels),
        **heads_entry,
        "use_spatial_transformer": True,
        **({"use_linear_in_transformer": True} if unet.use_linear_projection else {}),
        **({"use_scale_shift_norm": True} if unet.resnet_time_scale_shift == "scale_shift" else {}),
        "transformer_depth": depth,
        "context_dim": unet.cross_attention_dim,
        "use_checkpoint": False,
        "legacy": False,
    }


def _vae(vae: Any, resolution: int) -> dict[str, Any]:
    channels = list(vae.block_out_channels)
    return {
        "embed_dim": vae.latent_channels,
        "monitor": "val/rec_loss",
        "ddconfig": {
            **({} if vae.mid_block_add_attention else {"attn_type": "none"}),
            "double_z": True,
            "z_channels": vae.latent_channels,
            "resolution": resolution,
            "in_channels": vae.in_channels,
            "out_ch": vae.out_channels,
            "ch": channels[0],
            "ch_mult": _multiples("vae", channels),
            "num_res_blocks": vae.layers_per_block,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    }


def _text(model: Model, folder: str) -> dict[str, Any]:
    match text_version(model):
        case "1":
            return _node("clip", {})
        case "2":
            return _node("openclip", {"freeze": True, "layer": "penultimate"})
        case _:
            length = model.text_encoder.tokenizer.model_max_length
            return _node("clip", {"version": folder, "max_length": length})
