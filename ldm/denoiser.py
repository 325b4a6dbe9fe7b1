"""The denoiser E[x0 | x_t] that samplers and guidance use, made of a network and its parameterization.

The state x_t is float32 (float64 for float64 data), and the network may run in another dtype. This module casts between
them. The conversion to x0 runs in the state's dtype, since it divides by a small alpha.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.parameterization import Target, to_x0
from ldm.schedule import Level

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Network (x_t (b, c, h, w), time (b,), condition (b, …)) → (b, c, h, w), or (b, 2c, h, w) with a learned variance."""

ScaledNetwork = Callable[..., Tensor]
"""Network with an optional fourth argument: guidance scales (b,), for a network that reads them; None: 1."""


@dataclass(frozen=True, slots=True)
class Denoised:
    """Output of a denoiser for one batch of states."""

    x0: Tensor
    """E[x0 | x_t], (b, c, h, w)."""
    variance_fraction: Tensor | None = None
    """Position of the learned variance between its bounds, 0 to 1, (b, c, h, w); None: no variance was learned."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Denoised":
        """Apply a function to both tensors."""
        fraction = self.variance_fraction
        return Denoised(function(self.x0), None if fraction is None else function(fraction))


Denoise = Callable[[Tensor, Level], Denoised]
"""Denoiser with its condition and guidance, as samplers use it: (x_t (b, c, h, w), level) → Denoised."""


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Split a network's output into the prediction, (b, c, h, w), and the variance fraction, of the same shape.

    The first `channels` channels are the prediction. The rest are the variance's position between its bounds, from -1
    to 1; the fraction is the same position from 0 to 1, or None if there are no further channels.
    """
    prediction, position = output.split([channels, output.shape[1] - channels], 1)
    return prediction, (position + 1) / 2 if position.shape[1] else None


def with_context(network: ScaledNetwork, context: Tensor) -> ScaledNetwork:
    """Return a network that takes only the state and adds these context channels to the input of `network`.

    The context is (b, k, h, w). The states are (b, c, h, w), or (n b, c, h, w) when guidance evaluates n conditions.
    """

    def call(x: Tensor, time: Tensor, condition: Tensor, *scale: Tensor) -> Tensor:
        repeated = context.to(x).repeat(len(x) // len(context), 1, 1, 1)
        return network(torch.cat([x, repeated], 1), time, condition, *scale)

    return call


def at_scale(network: ScaledNetwork, scale: float) -> Network:
    """Return a network with a fixed guidance scale, made of one that reads the scales of a batch, (b,)."""

    def call(x: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return network(x, time, condition, torch.full((len(x),), scale, device=x.device))

    return call


@dataclass(frozen=True)
class Denoiser:
    """Denoiser `(x_t, level, condition) → Denoised` for a batch at one level.

    The states are cast to `dtype` for the network; None: not cast (the network casts them itself).
    """

    network: Network
    target: Target
    dtype: torch.dtype | None = None

    def __call__(self, x_t: Tensor, level: Level, condition: Tensor) -> Denoised:
        """Denoise states (b, c, h, w), in their dtype. The network's time is int64, or float32 between timesteps."""
        time_dtype = torch.int64 if isinstance(level.model_time, int) else torch.float32
        time = torch.full((len(x_t),), level.model_time, dtype=time_dtype, device=x_t.device)
        output = self.network(x_t.to(self.dtype or x_t.dtype), time, condition).to(x_t.dtype)
        output, fraction = split_output(output, x_t.shape[1])
        return Denoised(to_x0(self.target, output, x_t, level.alpha, level.sigma), fraction)
