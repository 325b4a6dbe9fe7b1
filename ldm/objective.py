"""The training objective: the network's error on its target, weighted by noise level.

L = E_{x0, eps, u} [ w(i) loss(target, network(x_t, i, condition)) ] with i = floor(u T): Ho et al. 2020
(arXiv 2006.11239), eq. 14, where w = 1. Min-SNR-gamma: Hang et al. 2023 (arXiv 2303.09556).
"""

from dataclasses import dataclass, field
from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.denoiser import Network
from ldm.parameterization import Target, error_ratio, target_of
from ldm.schedule import Schedule

Weighting = Literal["uniform", "min_snr"]
LossKind = Literal["l2", "l1", "huber"]


@dataclass(frozen=True, slots=True)
class Losses:
    """One number per example, each (b,); `weighted.mean()` is the loss to descend."""

    weighted: Tensor
    unweighted: Tensor
    index: Tensor


def level_weight(weighting: Weighting, target: Target, snr: Tensor, gamma: float) -> Tensor:
    """The weight of the target's own loss at each SNR, of the shape of snr.

    Min-SNR is min(SNR, gamma) on the error of x0, whatever the target: min(SNR, gamma) / SNR on eps,
    min(SNR, gamma) / (SNR + 1) on v.
    """
    match weighting:
        case "uniform":
            return torch.ones_like(snr)
        case "min_snr":
            return snr.clamp(max=gamma) / error_ratio(target, snr)
        case _:
            assert_never(weighting)


def pointwise(kind: LossKind, output: Tensor, target: Tensor) -> Tensor:
    """The loss of each element; huber is l2 where the error is below 1 and linear beyond."""
    match kind:
        case "l2":
            return F.mse_loss(output, target, reduction="none")
        case "l1":
            return F.l1_loss(output, target, reduction="none")
        case "huber":
            return 2 * F.huber_loss(output, target, reduction="none")
        case _:
            assert_never(kind)


@dataclass(frozen=True)
class Objective:
    """A callable over a network and a batch; all its randomness is in the batch.

    Computed in float32 (float64 for float64 data), whatever the network's dtype. Waits for no device.
    """

    schedule: Schedule
    target: Target = "eps"
    weighting: Weighting = "uniform"
    gamma: float = 5.0
    loss: LossKind = "l2"
    _tables: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, network: Network, x0: Tensor, u: Tensor, noise: Tensor, condition: Tensor) -> Losses:
        """Losses of a batch: x0 and noise (b, c, h, w), u (b,) in [0, 1), condition the network's."""
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        noise = noise.to(x0.dtype)
        T = self.schedule.T
        index = (u * T).long().clamp(max=T - 1).to(x0.device)  # (b,); a cast may round u to 1
        alpha, sigma, weight = self._table(x0.device, x0.dtype)[:, index]
        alpha, sigma = (c.view(-1, *[1] * (x0.ndim - 1)) for c in (alpha, sigma))  # (b, 1, 1, 1)
        output = network(alpha * x0 + sigma * noise, index, condition).to(x0.dtype)
        error = pointwise(self.loss, output, target_of(self.target, x0, noise, alpha, sigma))
        unweighted = error.flatten(1).mean(1)
        return Losses(weight * unweighted, unweighted, index)

    def _table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """alpha, sigma and weight by index (3, T), copied to a device once."""
        if (device, dtype) not in self._tables:
            snr = self.schedule.snr
            alpha, sigma = self.schedule.alpha_bar.sqrt(), (1 + snr).rsqrt()
            rows = torch.stack([alpha, sigma, level_weight(self.weighting, self.target, snr, self.gamma)])
            self._tables[device, dtype] = rows.to(device, dtype)
        return self._tables[device, dtype]
