"""Attention of the UNet, computed by torch or by xformers."""

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.kinds import AttentionBackend
from ldm.libraries import Attention, UNet2DConditionModel
from ldm.networks.attention_precision import needs_fp32

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention: queries (b, n, heads, d), keys and values (b, m, heads, d) → softmax(q kᵀ / √d) v, (b, n, heads, d)."""
KeysValues = Mapping[Attention, tuple[Tensor, Tensor]]
"""Keys and values of text tokens, (b, m, c) each, of each cross-attention."""
_XFORMERS_DEVICE = "cuda"  # the only device with kernels


def require_attention(backend: AttentionBackend) -> None:
    """Check, before the network is built, that a backend can be used. Raises UserError with the reason if it can't."""
    if backend == "xformers":
        _load_xformers(torch.device(_XFORMERS_DEVICE), torch.float16, {64}, gradients=True)


def use_attention(
    unet: UNet2DConditionModel,
    backend: AttentionBackend = "sdpa",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Literal["sdpa", "xformers"]:
    """Set the UNet's attention to torch's scaled_dot_product_attention or xformers, and return which one is used.

    The weights stay the same. `auto` is xformers if it works on the UNet's device, else sdpa. dtype, device: those of
    attention's inputs, which differ from the UNet's under autocast or offloading; default: the UNet's own. Raises
    UserError with the reason if xformers is requested and doesn't work.
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
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        keys_values: KeysValues | None = None,
        **ignored: object,
    ) -> Tensor:
        """Attend from (b, n, c) to itself or to text tokens (b, m, d); return (b, n, c).

        keys_values: those of the text tokens, computed before.
        """
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if keys_values is not None and attn in keys_values:
            k, v = keys_values[attn]
        else:
            k, v = attn.to_k(source), attn.to_v(source)
        # (b, n, heads, c / heads)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (attn.to_q(hidden_states), k, v))
        return attn.to_out[1](attn.to_out[0](self.attend(q, k, v).flatten(2)))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention with torch; see `Attend` for the shapes."""
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b, heads, n, d)
    if needs_fp32(q):
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def _load_xformers(device: torch.device, dtype: torch.dtype, widths: Iterable[int], gradients: bool) -> Attend:
    """Return xformers' attention after a test on heads of these widths. Raises UserError if it doesn't work."""
    if find_spec("xformers") is None:
        raise UserError(
            "attention xformers: xformers isn't installed; install it with pip install xformers, or choose sdpa"
        )
    if device.type != _XFORMERS_DEVICE:
        raise UserError(f"attention xformers: needs a CUDA GPU, but the device is {device}; choose sdpa")
    if not torch.get_device_module(device).is_available():
        raise UserError("attention xformers: needs a CUDA GPU, but torch finds none; choose sdpa")
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
    except Exception as error:  # the library can't be loaded, or has no kernel for this GPU
        raise UserError(
            f"attention xformers doesn't work with {dtype} on {device}: {_reason(error)}; choose sdpa"
        ) from error
    return memory_efficient_attention


def _reason(error: BaseException) -> str:
    """Return xformers' error message, and the loader's message if xformers' own library can't be loaded."""
    lines = [_first_line(error)]
    loader_error = getattr(sys.modules.get("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    if loader_error is not None:
        while loader_error.__cause__ is not None:
            loader_error = loader_error.__cause__
        lines.append(_first_line(loader_error))
        if "libcudart.so.12" in lines[-1]:
            lines.append(
                "xformers is built for CUDA 12: pip install nvidia-cuda-runtime-cu12, and set LD_PRELOAD to its "
                "libcudart.so.12"
            )
    return "; ".join(lines)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class name if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" :")
