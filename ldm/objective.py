"""The training objective: the network's error on its target, weighted by noise level, or the variational bound.

    L_simple = E_{x0, eps, i} [ w(i) loss(target, network(x_i, i, condition)) ]

This is eq. 14 of Ho et al. 2020 (arXiv 2006.11239), where w = 1 and the target is eps. L_hybrid = L_simple + 0.001
L_vlb, where the bound trains only the variance: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 16.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.bound import Levels, bound_term, levels, variances
from ldm.denoiser import Denoised, Network, split_output
from ldm.errors import UserError
from ldm.kinds import LossKind, ObjectiveKind, Target, VarianceKind
from ldm.parameterization import check_target, error_ratio, target_of, to_x0
from ldm.schedule import Schedule
from ldm.timesteps import Timesteps, uniform

_HYBRID_WEIGHT = 1e-3  # weight of the bound in the hybrid objective
Weighting = Callable[[Tensor], Tensor]
"""Weighting: SNR → weight of the squared error of x0, in the same shape."""


def min_snr(gamma: float = 5.0) -> Weighting:
    """Return the weighting min(SNR, gamma): Hang et al. 2023 (arXiv 2303.09556); on eps it is min(1, gamma / SNR)."""
    return lambda snr: snr.clamp(max=gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """Return the weighting SNR / (k + SNR)^gamma: Choi et al. 2022 (arXiv 2204.00227), eq. 8.

    On eps it is 1 / (k + SNR)^gamma.
    """
    return lambda snr: snr / (k + snr) ** gamma


def edm(sigma_data: float = 1.0) -> Weighting:
    """Return the weighting SNR + 1 / sigma_data^2: Karras et al. 2022 (arXiv 2206.00364), table 1.

    With sigma_data 1 the weights are 1 on v, on a variance-preserving path.
    """
    return lambda snr: snr + sigma_data**-2


def level_weight(weighting: Weighting | None, target: Target, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the weight of the target's error at each level, in alpha's shape: 1 without a weighting.

    It is finite for pure noise too. The weights are derived for squared errors; other losses use the same weights.
    """
    if weighting is None:
        return torch.ones_like(alpha)
    if target == "eps":
        alpha = alpha.clamp(min=1e-10)  # else 0 / 0 for pure noise
    return weighting((alpha / sigma) ** 2) / error_ratio(target, alpha, sigma)


def pointwise(kind: LossKind, output: Tensor, target: Tensor) -> Tensor:
    """Return the loss of each element, in the inputs' shape; huber is l2 for errors below 1 and linear above."""
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
    """The network's output for a batch, with the coefficients of the batch's levels, (b, 1, 1, 1) each."""

    target: Target
    t: Levels
    """Level of each example."""
    s: Levels
    """Level one index below it."""
    small: Tensor
    """Smallest variance of p(x_s | x_t)."""
    large: Tensor
    """Largest variance of p(x_s | x_t)."""
    weight: Tensor
    """Weight of the loss."""
    x_t: Tensor
    """State, (b, c, h, w)."""
    output: Tensor
    """Prediction of the target, (b, c, h, w)."""
    fraction: Tensor | None
    """Position of the learned variance between `small` and `large`, (b, c, h, w); None: it isn't learned."""

    @property
    def denoised(self) -> Denoised:
        """Prediction of x0, and the learned variance's fraction."""
        return Denoised(to_x0(self.target, self.output, self.x_t, *self.t), self.fraction)


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of a batch, one number per example, (b,). Training minimises `weighted.mean()`."""

    weighted: Tensor
    """The objective: the loss with the weighting and the importance weights."""
    unweighted: Tensor
    """Loss of the target, or the bound's term (kind vlb)."""
    index: Tensor
    """Index of each example's timestep, (b,)."""
    uncorrected: Tensor
    """The loss with the weighting but without the importance weights. Importance sampling adapts to it."""
    prediction: Prediction
    """The network's prediction, for further losses."""


@dataclass(frozen=True)
class Objective:
    """The loss as a function of a network and a batch. All random numbers are given with the batch.

    It is computed in float32 (float64 for float64 data), whatever the network's dtype, and never waits for a device.
    Raises UserError if its settings don't fit together.
    """

    schedule: Schedule
    target: Target = "eps"
    weighting: Weighting | None = None
    loss: LossKind = "l2"
    kind: ObjectiveKind = "simple"
    variance: VarianceKind = "fixed_small"
    timesteps: Timesteps = uniform
    _cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_target(self.target, self.schedule)
        if self.variance == "learned" and self.kind == "simple":
            raise UserError("variance learned: isn't trained by objective simple; choose objective hybrid or vlb")
        if self.variance != "learned" and self.kind == "hybrid":
            raise UserError(
                f"objective hybrid: needs variance learned, not {self.variance}; choose objective simple, or variance "
                "learned"
            )
        if self.kind == "vlb" and (self.weighting is not None or self.loss != "l2"):
            raise UserError("objective vlb: can't be used with a weighting or a loss other than l2; leave them out")

    def __call__(self, network: Network, x0: Tensor, u: Tensor, noise: Tensor, condition: Tensor) -> Losses:
        """Return the losses of a batch with x0 and noise (b, c, h, w), u (b,) in [0, 1) and the network's condition."""
        T = self.schedule.T
        sampled = self.timesteps(u.to(x0.device), T)
        index, correction = sampled.index, sampled.weight
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        prediction = self._predict(network, x0, index, noise, condition)
        if self.kind == "vlb":
            term = self._bound_term(prediction, x0, index)
            return Losses(correction * T * term, term, index, T * term, prediction)
        target = target_of(self.target, x0, noise.to(x0.dtype), *prediction.t)
        error = pointwise(self.loss, prediction.output, target).flatten(1).mean(1)
        loss = prediction.weight.flatten() * error
        if self.kind == "hybrid":
            detached = replace(prediction, output=prediction.output.detach())  # the bound trains only the variance
            loss = loss + _HYBRID_WEIGHT * T * self._bound_term(detached, x0, index)
        return Losses(correction * loss, error, index, loss, prediction)

    def bound(self, network: Network, x0: Tensor, index: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Return the variational bound's terms at given indices (b,), in bits per dimension, (b,)."""
        x0 = x0.to(torch.promote_types(x0.dtype, torch.float32))
        return self._bound_term(self._predict(network, x0, index, noise, condition), x0, index)

    def _predict(self, network: Network, x0: Tensor, index: Tensor, noise: Tensor, condition: Tensor) -> Prediction:
        table, times = self._coefficients(x0.device, x0.dtype)
        rows = (row.view(-1, *[1] * (x0.ndim - 1)) for row in table[:, index])  # (b, 1, 1, 1) each
        alpha, sigma, s_alpha, s_sigma, small, large, weight = rows
        x_t = alpha * x0 + sigma * noise.to(x0.dtype)
        output = network(x_t, times[index], condition).to(x0.dtype)
        expected = x0.shape[1] * (2 if self.variance == "learned" else 1)
        if output.shape[1] != expected:
            raise UserError(
                f"the network has {output.shape[1]} output channels: latents of {x0.shape[1]} channels with variance "
                f"{self.variance} need {expected}"
            )
        output, fraction = split_output(output, x0.shape[1])
        t, s = Levels(alpha, sigma), Levels(s_alpha, s_sigma)
        return Prediction(self.target, t, s, small, large, weight, x_t, output, fraction)

    def _bound_term(self, p: Prediction, x0: Tensor, index: Tensor) -> Tensor:
        return bound_term(x0, p.x_t, p.denoised, index, p.t, p.s, p.small, p.large, self.variance)

    def _coefficients(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the coefficients by index, (7, T), and the network's times, (T,); they are cached for each device."""
        if (device, dtype) not in self._cache:
            t, s = levels(self.schedule)
            weight = level_weight(self.weighting, self.target, *t)
            rows = torch.stack([*t, *s, *variances(self.schedule), weight])
            times = self.schedule.model_times
            self._cache[device, dtype] = (
                rows.to(device, dtype),
                times.to(device, torch.float32 if times.is_floating_point() else times.dtype),
            )
        return self._cache[device, dtype]
