"""Builds the cross-attention UNet (Rombach et al. 2022, sec. 3.3) from diffusers' blocks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ldm.errors import UserError
from ldm.formats.hub import load_network
from ldm.networks.attention import use_attention


def build_unet(
    *,
    channels: Sequence[int],
    layers: int,
    attention: Sequence[bool],
    heads: Sequence[int],
    depth: int = 1,
    groups: int = 32,
    modulation: bool = False,
    learned_variance: bool = False,
    latent_channels: int,
    latent_size: int,
    text_width: int,
) -> UNet2DConditionModel:
    """A UNet2DConditionModel from random weights whose first output is zero.

    `heads[k]` is the number of attention heads of level k. With `modulation`, attention-pooled text features are added
    to the time embedding, which then scales and shifts every residual block (FiLM, Perez et al. 2018). A learned variance
    takes as many output channels again. Every residual branch starts at zero too, as in the reference implementation of
    Dhariwal & Nichol 2021: the network begins as the identity and learns from there.
    Raises UserError when the numbers don't fit one another.
    """
    for level, (c, h) in enumerate(zip(channels, heads, strict=True)):
        if c % groups or c % h:
            raise UserError(f"unet.channels {c} of level {level} is not divisible by {groups} groups and by {h} heads")
    if modulation and text_width % heads[0]:
        raise UserError(f"unet.modulation: text features of width {text_width} don't split into {heads[0]} heads")
    if latent_size % 2 ** (len(channels) - 1):
        raise UserError(
            f"latents of {latent_size} a side can't be halved {len(channels) - 1} times: use fewer unet.channels "
            "or another resolution"
        )
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention))
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels * (1 + learned_variance),
        down_block_types=down,
        up_block_types=up,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        cross_attention_dim=text_width,
        # The number of heads: diffusers' name for it is a historical mistake.
        attention_head_dim=tuple(heads),
        transformer_layers_per_block=depth,
        norm_num_groups=groups,
        addition_embed_type="text" if modulation else None,
        addition_embed_type_num_heads=heads[0],
        resnet_time_scale_shift="scale_shift" if modulation else "default",
    )
    for name, module in unet.named_modules():
        if name == "conv_out" or name.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    use_attention(unet)
    return unet


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """Of a pipeline's folder, on the CPU. Raises UserError where it can't be read."""
    unet: UNet2DConditionModel = load_network(
        UNet2DConditionModel, Path(folder) / "unet", f"the UNet of {str(folder)!r}"
    )
    use_attention(unet)
    return unet


@torch.no_grad()
def widen(unet: UNet2DConditionModel, channels: int) -> None:
    """Have it take so many channels, in place. The weights of the further ones are zero: it begins as what it was."""
    old = unet.conv_in
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, padding=old.padding).to(old.weight)
    nn.init.zeros_(new.weight)
    new.weight[:, : old.in_channels] = old.weight
    assert new.bias is not None
    new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=channels)


def stock_limits(unet: UNet2DConditionModel, inpaints: bool) -> str | None:
    """What stock diffusers can't do with this UNet, in one line; None: nothing."""
    if not inpaints or unet.config.in_channels == 9:
        return None
    return (
        f"a UNet of {unet.config.in_channels} channels to inpaint with: stock diffusers' StableDiffusionInpaintPipeline takes "
        "9; inpaint.py and our pipeline take any"
    )
