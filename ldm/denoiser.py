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
"""(x_t (b, c, h, w), time (b,), condition (b, …)) → output (b, c, h, w), or (b, 2c, h, w) with a learned variance."""


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a denoiser says of a state."""

    x0: Tensor
    """E[x0 | x_t], (b, c, h, w)."""
    variance_fraction: Tensor | None = None
    """Place of the learned variance between its bounds, 0 to 1, (b, c, h, w); None: the network learned none."""

    def each(self, change: Callable[[Tensor], Tensor]) -> "Denoised":
        """Change both tensors in the same way."""
        return Denoised(change(self.x0), None if self.variance_fraction is None else change(self.variance_fraction))


Denoise = Callable[[Tensor, Level], Denoised]
"""A denoiser with its condition and guidance, as samplers see it: (x_t (b, c, h, w), level) → Denoised."""


def split(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into its prediction (b, c, h, w) and the fraction of a variance where it learned one.

    The further channels hold the variance's place between its bounds in [-1, 1].
    """
    prediction, place = output.split([channels, output.shape[1] - channels], 1)
    return prediction, (place + 1) / 2 if place.shape[1] else None


def beside(network: Network, context: Tensor) -> Network:
    """Adapt a network that takes context channels to the interface of one that does not.

    The context is (b, k, h, w); the states may be (b, c, h, w), or n times as many, as guidance asks.
    """

    def with_context(x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        given = context.to(x).repeat(len(x) // len(context), 1, 1, 1)
        return network(torch.cat([x, given], 1), time, condition)

    return with_context


@dataclass(frozen=True)
class Denoiser:
    """`(x_t, level, condition) → Denoised`, for a batch at one level.

    The network is given states of `dtype`, or as they are where it is None (the network casts for itself).
    """

    network: Network
    target: Target
    dtype: torch.dtype | None = None

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor) -> Denoised:
        """Denoise states (b, c, h, w), in their dtype. The network's time is int64, or float32 between timesteps."""
        time_dtype = torch.int64 if isinstance(level.model_time, int) else torch.float32
        time = torch.full((len(x_t),), level.model_time, dtype=time_dtype, device=x_t.device)
        output = self.network(x_t.to(self.dtype or x_t.dtype), time, condition).to(x_t.dtype)
        output, fraction = split(output, x_t.shape[1])
        return Denoised(to_x0(self.target, output, x_t, level.alpha, level.sigma), fraction)
