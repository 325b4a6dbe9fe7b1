"""Builds the cross-attention UNet (Rombach et al. 2022, sec. 3.3) from diffusers' blocks."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ldm.errors import UserError


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


AttentionBackend = Literal["sdpa", "xformers"]


def require_attention(backend: AttentionBackend) -> None:
    """Raises UserError, naming what is missing, where a backend can't be used."""
    if backend == "xformers" and find_spec("xformers") is None:
        raise UserError("attention xformers isn't installed (pip install -e '.[xformers]'); sdpa needs nothing more")
    if backend == "xformers" and not torch.cuda.is_available():
        raise UserError("attention xformers runs on a CUDA GPU only, and there is none; sdpa runs anywhere")


def use_attention(unet: UNet2DConditionModel, backend: AttentionBackend = "sdpa") -> None:
    """Compute attention with torch's scaled_dot_product_attention or with xformers. The weights are the same."""
    require_attention(backend)
    match backend:
        case "sdpa":
            unet.set_attn_processor(SdpaProcessor())
        case "xformers":
            unet.enable_xformers_memory_efficient_attention()
        case _:
            assert_never(backend)


class SdpaProcessor:
    """Self- and cross-attention of the UNet's transformer blocks.

    On the CPU, torch's backward pass of 16-bit attention is slower by an order of magnitude than that of 32 bits
    (11 ms against 0.5 ms a call at 64×64 tokens), so there the products are taken in fp32 when gradients are needed.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **ignored: object
    ) -> Tensor:
        """(b, n, c), attending over itself or over (b, m, d) text tokens → (b, n, c)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (b, heads, n, c / heads)
            for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        dtype = q.dtype
        if q.device.type == "cpu" and dtype != torch.float32 and torch.is_grad_enabled():
            with torch.autocast("cpu", enabled=False):
                out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
