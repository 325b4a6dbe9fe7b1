"""Distributions of training timesteps: maps from the batch's uniform random numbers to indices 0 … T-1.

Each map is an inverse distribution function, so stratified numbers result in stratified timesteps. A batch gets the
same timesteps on any number of processes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.errors import UserError
from ldm.float64 import double, float64_device


@dataclass(frozen=True, slots=True)
class SampledTimesteps:
    """Timesteps of a batch."""

    index: Tensor
    """Index of each timestep, (b,) int64."""
    weight: Tensor | float
    """Importance weight, (b,) or 1. The weighted mean of a loss estimates its mean over uniform timesteps."""


class Timesteps(Protocol):
    """A map from uniform random numbers u (b,) in [0, 1) to timesteps of a schedule of T timesteps."""

    def __call__(self, u: Tensor, T: int) -> SampledTimesteps: ...


def uniform(u: Tensor, T: int) -> SampledTimesteps:
    """Return timesteps that all have the same probability."""
    return SampledTimesteps((u * T).long().clamp(max=T - 1), 1.0)  # a cast may have rounded u to 1


@dataclass(frozen=True)
class LogitNormal:
    """Timesteps t = sigmoid(mean + std z) for standard normal z: Esser et al. 2024 (arXiv 2403.03206), eq. 19.

    In the paper, this distribution itself weights the levels. So the importance weight is 1.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise UserError(
                f"logit-normal timesteps of mean {self.mean}, std {self.std}: both must be finite and std positive"
            )

    def __call__(self, u: Tensor, T: int) -> SampledTimesteps:
        t = torch.sigmoid(self.mean + self.std * torch.special.ndtri(double(u)))
        return SampledTimesteps((t * T).long().clamp(max=T - 1).to(u.device), 1.0)


class Importance(nn.Module):
    """Importance sampling, p(i) ∝ sqrt(E[loss(i)^2]): Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 18.

    Timesteps are divided into bins. A bin's mean square is a running average over its examples: n examples replace a
    share 1 - (1 - rate)^n of it. A share `floor` of the probability stays uniform. All of it is uniform until every bin
    has had an example. The buffers are the state; they are the same on every process after `update`.
    """

    mean_square: Tensor
    """Running average of the squared loss in each bin, (bins,)."""
    seen: Tensor
    """Number of examples in each bin so far, (bins,)."""
    pending: Tensor
    """Sums of squared losses and counts since the last `update`, (2, bins).

    It isn't a buffer, because DDP copies buffers from rank 0.
    """

    def __init__(self, bins: int = 100, rate: float = 0.02, floor: float = 0.05) -> None:
        super().__init__()
        self.rate, self.floor = rate, floor
        self.register_buffer("mean_square", torch.zeros(bins, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(bins, dtype=torch.float64))
        self.discard()

    def probability(self) -> Tensor:
        """Return the probability of each bin, (bins,)."""
        bins = len(self.seen)
        complete = (self.seen > 0).all() & (self.mean_square > 0).any()
        root = torch.where(complete, self.mean_square.sqrt(), 1.0)
        return (1 - self.floor) * root / root.sum() + self.floor / bins

    def forward(self, u: Tensor, T: int) -> SampledTimesteps:
        p = self.probability()
        ends, device = p.cumsum(0), u.device
        u = double(u).to(p.device) * ends[-1]
        bin_index = torch.searchsorted(ends, u, right=True).clamp(max=len(p) - 1)
        position = ((u - (ends - p)[bin_index]) / p[bin_index]).clamp(0, 1)  # within the bin
        index = ((bin_index + position) * T / len(p)).long().clamp(max=T - 1)
        weight = 1 / (len(p) * p[bin_index])
        return SampledTimesteps(index.to(device), weight if weight.device == device else weight.float().to(device))

    def record(self, index: Tensor, loss: Tensor, T: int) -> None:
        """Record the losses (b,) of a part of a batch; non-finite losses are left out."""
        square = double(loss.detach()) ** 2
        bin_index, self.pending = self._bin(index, T).to(square.device), self.pending.to(square.device)
        finite = torch.isfinite(square).double()
        self.pending[0].index_add_(0, bin_index, torch.where(finite > 0, square, 0.0))
        self.pending[1].index_add_(0, bin_index, finite)

    def discard(self) -> None:
        """Discard the losses recorded since the last `update`."""
        self.pending = torch.zeros(2, *self.seen.shape, dtype=torch.float64, device=self.seen.device)

    def update(self) -> None:
        """Update the averages with the losses recorded on all processes since the last call."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.pending)
        total, count = self.pending
        mean = torch.where(count > 0, total / count.clamp(min=1), self.mean_square)
        share = torch.where(self.seen > 0, 1 - (1 - self.rate) ** count, (count > 0).double())
        self.mean_square.lerp_(mean, share)
        self.seen += count
        self.discard()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the state like any module's, but leave it where it is if the device has no float64."""
        device = fn(torch.empty(0)).device
        return self if float64_device(device) != device else super()._apply(fn, recurse)

    def _bin(self, index: Tensor, T: int) -> Tensor:
        return index * len(self.seen) // T
