"""Builds the cross-attention UNet (Rombach et al. 2022, sec. 3.3) from diffusers' blocks."""

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

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


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """Of a pipeline's folder, on the CPU. Raises UserError where it can't be read."""
    try:
        unet = UNet2DConditionModel.from_pretrained(
            str(Path(folder) / "unet"), use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error)
        place, name = Path(folder) / "unet", "diffusion_pytorch_model"
        if not [*place.glob(f"{name}.safetensors"), *place.glob(f"{name}-*")]:
            said = "it has no diffusion_pytorch_model.safetensors; pickles and variants (fp16) aren't read"
        raise UserError(f"can't load the UNet of {str(folder)!r}: {said}") from None
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


AttentionBackend = Literal["sdpa", "xformers", "auto"]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (b, n, heads, d), keys and values (b, m, heads, d) → softmax(q kᵀ / √d) v, (b, n, heads, d)."""
_XFORMERS_DEVICE = "cuda"  # the only one with kernels


def require_attention(backend: AttentionBackend) -> None:
    """Raises UserError, naming what is wrong, where a backend can't be used: a check before there is a network."""
    if backend == "xformers":
        _load_xformers(torch.device(_XFORMERS_DEVICE), torch.float16, {64}, gradients=True)


def use_attention(
    unet: UNet2DConditionModel,
    backend: AttentionBackend = "sdpa",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Literal["sdpa", "xformers"]:
    """Compute attention with torch's scaled_dot_product_attention or with xformers; returns which. The weights are the same.

    `auto` is xformers where it works on the UNet's device, else sdpa. dtype, device: of the attention's arithmetic, as under
    autocast and when offloaded; the UNet's own unless given. Raises UserError, naming what is wrong, where xformers is asked for in vain.
    """
    if backend not in get_args(AttentionBackend):
        raise UserError(f"attention {backend!r}: choose {', '.join(get_args(AttentionBackend))}")
    attend: Attend = sdpa
    if backend != "sdpa":
        widths = {m.inner_dim // m.heads for m in unet.modules() if isinstance(m, Attention)}
        gradients = any(p.requires_grad for p in unet.parameters())
        try:
            attend = _load_xformers(device or unet.device, dtype or unet.dtype, widths, gradients)
        except UserError:
            if backend == "xformers":
                raise
    unet.set_attn_processor(AttentionProcessor(attend))
    return "sdpa" if attend is sdpa else "xformers"


class AttentionProcessor:
    """Self- and cross-attention of the UNet's transformer blocks."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **ignored: object
    ) -> Tensor:
        """(b, n, c), attending over itself or over (b, m, d) text tokens → (b, n, c)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1))  # (b, n, heads, c / heads)
            for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2)))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own attention, see `Attend`.

    On the CPU, torch's backward pass of 16-bit attention is slower by an order of magnitude than that of 32 bits
    (11 ms against 0.5 ms a call at 64×64 tokens), so there the products are taken in fp32 when gradients are needed.
    """
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, heads, n, d)
    if q.device.type == "cpu" and dtype.itemsize < 4 and torch.is_grad_enabled():
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def _load_xformers(device: torch.device, dtype: torch.dtype, widths: Iterable[int], gradients: bool) -> Attend:
    """xformers' attention, once it has been tried on heads of these widths. Raises UserError where it doesn't work."""
    if find_spec("xformers") is None:
        raise UserError("attention xformers isn't installed (pip install -e '.[xformers]'); sdpa needs nothing more")
    if device.type != _XFORMERS_DEVICE:
        raise UserError(f"attention xformers runs on a CUDA GPU only, not on the device {device}; sdpa runs anywhere")
    if not torch.get_device_module(device).is_available():
        raise UserError("attention xformers runs on a CUDA GPU only, and there is none; sdpa runs anywhere")
    try:
        from xformers.ops import memory_efficient_attention

        for width in widths:
            q, k, v = (
                torch.zeros(1, n, 2, width, device=device, dtype=dtype, requires_grad=gradients) for n in (64, 77, 77)
            )
            with torch.set_grad_enabled(gradients):
                out = memory_efficient_attention(q, k, v)
            if gradients:
                out.sum().backward()
    except Exception as error:  # a library that doesn't load, or that has no kernel for this GPU
        raise UserError(
            f"attention xformers doesn't work with {dtype} on {device}: {_reason(error)}; take sdpa"
        ) from error
    return memory_efficient_attention


def _reason(error: BaseException) -> str:
    """What xformers says of it, and what the loader said where xformers' own library didn't load."""
    lines = [_first(error)]
    library = getattr(sys.modules.get("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    if library is not None:
        while library.__cause__ is not None:
            library = library.__cause__
        lines.append(_first(library))
        if "libcudart.so.12" in lines[-1]:
            lines.append(
                "it is built for CUDA 12: pip install nvidia-cuda-runtime-cu12 and start with LD_PRELOAD set to its libcudart.so.12"
            )
    return "; ".join(lines)


def _first(error: BaseException) -> str:
    """A line of an error: it names its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :")
