"""The training objective: the network's error on its target, weighted by noise level, or the variational bound.

    L_simple = E_{x0, eps, i} [ w(i) loss(target, network(x_i, i, condition)) ]

Ho et al. 2020 (arXiv 2006.11239), eq. 14, where w = 1 and the target is eps. L_hybrid = L_simple + 0.001 L_vlb, where
the bound trains only the variance: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 16.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.bound import Levels, bound_term, levels, variances
from ldm.denoiser import Denoised, Network, split
from ldm.errors import UserError
from ldm.kinds import LossKind, ObjectiveKind, Target, VarianceKind
from ldm.parameterization import check_target, error_ratio, target_of, to_x0
from ldm.schedule import Schedule
from ldm.timesteps import Timesteps, uniform

_HYBRID = 1e-3  # weight of the bound in the hybrid objective
Weighting = Callable[[Tensor], Tensor]
"""Weighting: SNR → weight of the squared error of x0, of the same shape."""


def min_snr(gamma: float = 5.0) -> Weighting:
    """Weigh by min(SNR, gamma): Hang et al. 2023 (arXiv 2303.09556); on eps it is min(1, gamma / SNR)."""
    return lambda snr: snr.clamp(max=gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """Weigh by SNR / (k + SNR)^gamma: Choi et al. 2022 (arXiv 2204.00227), eq. 8; on eps it is 1 / (k + SNR)^gamma."""
    return lambda snr: snr / (k + snr) ** gamma


def edm(sigma_data: float = 1.0) -> Weighting:
    """Weigh by SNR + 1 / sigma_data^2: Karras et al. 2022 (arXiv 2206.00364), table 1.

    With sigma_data 1 the weights are 1 on v, on a variance-preserving path.
    """
    return lambda snr: snr + sigma_data**-2


def level_weight(weighting: Weighting | None, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the weight of the target's squared error at each level: 1 without a weighting; finite for pure noise too.

    The weights are derived for squared errors; other losses use the same weights.
    """
    if weighting is None:
        return torch.ones_like(alpha)
    if target == "eps":
        alpha = alpha.clamp(min=1e-10)  # the limit of two vanishing weights
    return weighting((alpha / sigma) ** 2) / error_ratio(target, alpha, sigma)


def pointwise(kind: LossKind, output: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each element; huber is l2 for errors below 1 and linear above."""
    match kind:
        case "l2":
            return F.mse_loss(output, target, reduction="none")
        case "l1":
            return F.l1_loss(output, target, reduction="none")
        case "huber":
            return 2 * F.huber_loss(output, target, reduction="none")
        case _:
            assert_never(kind)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The network's output for a batch, with the coefficients of the batch's levels."""

    target: Target
    t: Levels
    s: Levels
    small: Tensor
    large: Tensor
    weight: Tensor
    x_t: Tensor
    output: Tensor
    """Prediction of the target, (b, c, h, w)."""
    fraction: Tensor | None

    @property
    def denoised(self) -> Denoised:
        """Estimate of x0, and of the learned variance, from the output."""
        return Denoised(to_x0(self.target, self.output, self.x_t, *self.t), self.fraction)


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of a batch, one number per example, (b,). Training minimises `weighted.mean()`."""

    weighted: Tensor
    unweighted: Tensor
    """The loss of the target, or the bound's term (kind vlb)."""
    index: Tensor
    uncorrected: Tensor
    """`weighted` without the correction for the distribution of timesteps. Importance sampling learns from it."""
    prediction: Prediction
    """The network's prediction, for further losses."""


@dataclass(frozen=True)
class Objective:
    """The loss as a function of a network and a batch. All randomness comes with the batch.

    It is computed in float32 (float64 for float64 data), whatever the network's dtype, and never waits for a device.
    Raises UserError if its parts don't fit together.
    """

    schedule: Schedule
    target: Target = "eps"
    weighting: Weighting | None = None
    loss: LossKind = "l2"
    kind: ObjectiveKind = "simple"
    variance: VarianceKind = "fixed_small"
    timesteps: Timesteps = uniform
    _tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_target(self.target, self.schedule)
        if self.variance == "learned" and self.kind == "simple":
            raise UserError("variance learned with the objective simple, which never teaches it: take hybrid or vlb")
        if self.variance != "learned" and self.kind == "hybrid":
            raise UserError(
                f"objective hybrid with variance {self.variance}: it adds to a learned one only; take simple"
            )
        if self.kind == "vlb" and (self.weighting is not None or self.loss != "l2"):
            raise UserError("objective vlb with a weighting or another loss than l2: it has its own; leave them out")

    def __call__(self, network: Network, x0: Tensor, u: Tensor, noise: Tensor, condition: Tensor) -> Losses:
        """Return the losses of a batch with x0 and noise (b, c, h, w), u (b,) in [0, 1) and the network's condition."""
        T = self.schedule.T
        drawn = self.timesteps(u.to(x0.device), T)
        index, correction = drawn.index, drawn.weight
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        made = self._predict(network, x0, index, noise, condition)
        if self.kind == "vlb":
            term = self._term(made, x0, index)
            return Losses(correction * T * term, term, index, T * term, made)
        target = target_of(self.target, x0, noise.to(x0.dtype), *made.t)
        error = pointwise(self.loss, made.output, target).flatten(1).mean(1)
        loss = made.weight.flatten() * error
        if self.kind == "hybrid":
            loss = loss + _HYBRID * T * self._term(replace(made, output=made.output.detach()), x0, index)
        return Losses(correction * loss, error, index, loss, made)

    def bound(self, network: Network, x0: Tensor, index: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Return the variational bound's terms at given indices (b,), in bits per dimension, (b,)."""
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        return self._term(self._predict(network, x0, index, noise, condition), x0, index)

    def _predict(self, network: Network, x0: Tensor, index: Tensor, noise: Tensor, condition: Tensor) -> Prediction:
        table, times = self._on(x0.device, x0.dtype)
        rows = (row.view(-1, *[1] * (x0.ndim - 1)) for row in table[:, index])  # (b, 1, 1, 1) each
        alpha, sigma, s_alpha, s_sigma, small, large, weight = rows
        x_t = alpha * x0 + sigma * noise.to(x0.dtype)
        output = network(x_t, times[index], condition).to(x0.dtype)
        expected = x0.shape[1] * (2 if self.variance == "learned" else 1)
        if output.shape[1] != expected:
            raise UserError(
                f"a network of {output.shape[1]} output channels for {x0.shape[1]} of latents with variance {self.variance}: "
                f"it needs {expected}"
            )
        output, fraction = split(output, x0.shape[1])
        t, s = Levels(alpha, sigma), Levels(s_alpha, s_sigma)
        return Prediction(self.target, t, s, small, large, weight, x_t, output, fraction)

    def _term(self, made: Prediction, x0: Tensor, index: Tensor) -> Tensor:
        return bound_term(x0, made.x_t, made.denoised, index, made.t, made.s, made.small, made.large, self.variance)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return coefficients by index (7, T) and the network's times (T,), cached on each device."""
        if (device, dtype) not in self._tables:
            t, s = levels(self.schedule)
            weight = level_weight(self.weighting, self.target, *t)
            rows = torch.stack([*t, *s, *variances(self.schedule), weight])
            times = self.schedule.model_times
            self._tables[device, dtype] = (
                rows.to(device, dtype),
                times.to(device, torch.float32 if times.is_floating_point() else times.dtype),
            )
        return self._tables[device, dtype]
