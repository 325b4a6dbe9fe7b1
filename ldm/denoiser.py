"""Network + parameterization → the denoiser E[x0 | x_t] that samplers and guidance work with.

The state x_t is kept in float32 (float64 in float64 work) while the network runs in its own dtype. The
casts are here, and the conversion to x0, which divides by a small alpha, is on the state's side of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.parameterization import Target, to_x0
from ldm.schedule import Level

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (b, c, h, w), index (b,), condition (b, …)) → output (b, c, h, w)."""
Denoise = Callable[[Tensor, Level], Tensor]
"""(x_t (b, c, h, w), level) → x0_hat (b, c, h, w): a denoiser with its condition and guidance, as samplers see it."""


def beside(network: Network, context: Tensor) -> Network:
    """Of a network that takes a context (b, k, h, w) as further channels, one of states alone: (b, c, h, w), or n times b
    of them, as guidance asks.
    """

    def with_context(x: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        given = context.to(x).repeat(len(x) // len(context), 1, 1, 1)
        return network(torch.cat([x, given], 1), index, condition)

    return with_context


@dataclass(frozen=True)
class Denoiser:
    """`(x_t, level, condition) → x0_hat`, for a batch at one level.

    `dtype` is what the network takes; None gives it the state as it is (the network casts for itself). A network that
    learned its variance gives twice the channels; with `fraction` its variance's place in [0, 1] is passed on after x0_hat,
    (b, 2c, h, w), else it is left out.
    """

    network: Network
    target: Target
    dtype: torch.dtype | None = None
    fraction: bool = False

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor) -> Tensor:
        """E[x0 | x_t], (b, c, h, w), in x_t's dtype. The network's index is int64, float32 if fractional."""
        index_dtype = torch.int64 if isinstance(level.index, int) else torch.float32
        index = torch.full((len(x_t),), level.index, dtype=index_dtype, device=x_t.device)
        output = self.network(x_t.to(self.dtype or x_t.dtype), index, condition).to(x_t.dtype)
        output, place = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
        x0 = to_x0(self.target, output, x_t, level.alpha, level.sigma)
        return torch.cat([x0, (place + 1) / 2], 1) if self.fraction else x0
