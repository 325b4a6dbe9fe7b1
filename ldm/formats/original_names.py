"""Names of weights in the original Stable Diffusion code, and the diffusers weights that each of them consists of.

The networks are the same; the names and positions of their weights differ. Rombach et al.'s UNet numbers its blocks in
one sequence (`input_blocks`, `middle_block`, `output_blocks`). Their decoder counts its levels from the image's side.
The autoencoder's attention consists of 1×1 convolutions, and OpenCLIP's text tower (Stable Diffusion 2) has query, key
and value in one matrix. So a layout is a table from each original name to the names of the diffusers weights in it.

A model is refused if it differs from the values that are built into the original code (`_BUILT_IN`), or if it has
weights without an original name. An autoencoder without attention in the middle is accepted: it is the original's
`attn_type: none`, which has no weights.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ldm.errors import UserError
from ldm.formats.clip_layout import openclip_names
from ldm.formats.scheduler_config import Process
from ldm.libraries import AutoencoderKL, UNet2DConditionModel
from ldm.networks.text_tower import TextTower

_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_CLIP, OPENCLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
POINTWISE = re.compile(r".*\.mid\.attn_1\.(q|k|v|proj_out)\.weight")  # a 1×1 convolution there, a matrix here
_BUILT_IN: dict[str, dict[str, Any]] = {
    "unet": {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "only_cross_attention": False,
        "resnet_skip_time_act": False,
        "time_embedding_type": "positional",
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
    },
    "vae": {
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    },
}
"""Values that are built into the original code, by diffusers' names. With other values, the weights don't fit it."""
_BLOCKS = {
    *("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
    *("DownEncoderBlock2D", "UpDecoderBlock2D"),
}


class Parts(NamedTuple):
    """Networks and diffusion process that are read from a file and its configuration.

    The networks are frozen, in evaluation mode, float32 and on the CPU.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: TextTower
    process: Process
    tokenizer: Path | None = None
    """Folder of the tokenizer; None: it is CLIP's own."""


def layouts(parts: Parts, *, openclip: bool) -> Iterator[tuple[nn.Module, dict[str, tuple[str, ...]]]]:
    """Yield each network and its table: original name → names of the diffusers weights that are joined by rows."""
    tower = parts.text_encoder
    yield parts.unet, _layout(parts.unet, _unet_names(parts.unet), _UNET, "unet")
    yield parts.vae, _layout(parts.vae, _vae_names(parts.vae), _VAE, "vae")
    if openclip:
        yield tower, {OPENCLIP + name: ours for name, ours in openclip_names(len(tower.encoder.layers)).items()}
    else:
        yield tower, {_CLIP + key: (key,) for key in tower.state_dict()}


def _layout(module: nn.Module, names: Mapping[str, str], prefix: str, network: str) -> dict[str, tuple[str, ...]]:
    """Return the table of a network. names: module's name in diffusers → original name; names inside it stay."""

    def original(key: str) -> str:
        parent = key
        while parent := parent.rpartition(".")[0]:
            if parent in names:
                return names[parent] + key.removeprefix(parent)
        raise UserError(
            f"weight {network}.{key}: has no counterpart in the original layout; keep this model as a folder"
        )

    return {prefix + original(key): (key,) for key in module.state_dict()}


def _unet_names(unet: UNet2DConditionModel) -> dict[str, str]:
    if kind := unet.config.addition_embed_type:
        raise UserError(
            f"unet.modulation (addition_embed_type {kind!r}): has no counterpart in the original layout; keep this "
            "model as a folder"
        )
    _check_built_in("unet", unet.config)
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def add(ours: str, k: int, block: str, first: int = 0) -> None:
        """Add the names of a residual block and the attention after it: modules `first` and `first + 1` of `block`."""
        names.update({f"{ours}.resnets.{k}.{a}": f"{block}.{first}.{b}" for a, b in _RESNET.items()})
        names[f"{ours}.attentions.{k}"] = f"{block}.{first + 1}"

    n = 1
    for level, down in enumerate(unet.down_blocks):
        for k in range(len(down.resnets)):
            add(f"down_blocks.{level}", k, f"input_blocks.{n}")
            n += 1
        if down.downsamplers:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    add("mid_block", 0, "middle_block")
    add("mid_block", 1, "middle_block", 2)
    n = 0
    for level, up in enumerate(unet.up_blocks):
        for k in range(len(up.resnets)):
            add(f"up_blocks.{level}", k, f"output_blocks.{n}")
            n += 1
        if up.upsamplers:  # at the end of the level's last block
            last = 2 if hasattr(up, "attentions") else 1
            names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{last}.conv"
    return names


def _vae_names(vae: AutoencoderKL) -> dict[str, str]:
    _check_built_in("vae", vae.config)
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    levels = len(vae.config.block_out_channels)
    for half, blocks, direction in (
        ("encoder", vae.encoder.down_blocks, "down"),
        ("decoder", vae.decoder.up_blocks, "up"),
    ):
        names |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        resnets = {f"{half}.mid_block.resnets.{k}": f"{half}.mid.block_{k + 1}" for k in range(2)}
        for level, block in enumerate(blocks):
            original = f"{half}.{direction}.{level if direction == 'down' else levels - 1 - level}"
            resnets |= {
                f"{half}.{direction}_blocks.{level}.resnets.{k}": f"{original}.block.{k}"
                for k in range(len(block.resnets))
            }
            names[f"{half}.{direction}_blocks.{level}.{direction}samplers.0.conv"] = (
                f"{original}.{direction}sample.conv"
            )
        names |= {f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in resnets.items() for a, b in _VAE_RESNET.items()}
        names |= {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}" for a, b in _VAE_ATTENTION.items()}
    return names


def _check_built_in(network: str, config: Mapping[str, Any]) -> None:
    for name, value in _BUILT_IN[network].items():
        if config.get(name, value) != value:
            raise UserError(
                f"{network} {name} {config[name]!r}: the original layout supports only {value!r}; keep this model as a "
                "folder"
            )
    if unsupported := sorted({*config["down_block_types"], *config["up_block_types"]} - _BLOCKS):
        raise UserError(
            f"{network} block {unsupported[0]}: the original layout supports only {', '.join(sorted(_BLOCKS))}; keep "
            "this model as a folder"
        )
