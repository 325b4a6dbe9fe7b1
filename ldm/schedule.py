"""Noise schedules: x_t = alpha_t x0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1, a function of t in [0, 1].

A schedule is made of T betas (Ho et al. 2020, arXiv 2006.11239, eq. 2 and 4). The discrete index i = 0 …
T-1, which the network is given (0 = least noise), stands at t = (i + 1) / T; t = 0 is clean. Between those
points sigma / alpha, the noise level of Karras et al. (2022, arXiv 2206.00364), is linear in t, beginning
with 0 at t = 0: the same that samplers with fractional timesteps assume (k-diffusion, diffusers'
EulerDiscreteScheduler).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, assert_never

import numpy as np
import torch
from torch import Tensor

from ldm.errors import UserError

ScheduleKind = Literal["linear", "scaled_linear", "cosine"]
Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level, in numbers of the host: coefficients computed from it never wait for a device."""

    t: float
    alpha: float
    sigma: float
    index: int | float
    """What the network is given: int on the schedule's grid; -1 at t = 0, where no network is evaluated."""


class Schedule:
    """alpha_t and sigma_t of T betas, in float64: `schedule(t)`, `schedule.level(index)`, or as tables.

    Attributes: `T`; `betas`, `alpha_bar` and `snr`, each (T,) by index.
    Raises UserError where a beta is not strictly between 0 and 1.
    """

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        try:
            self.betas = torch.as_tensor(betas, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise UserError("betas: give a list of T numbers") from None
        if self.betas.ndim != 1 or len(self.betas) == 0:
            raise UserError(f"betas of shape {tuple(self.betas.shape)}: give a list of T numbers")
        outside = self.betas[~((self.betas > 0) & (self.betas < 1))]
        if len(outside):
            raise UserError(f"beta {outside[0].item()}: every beta must lie strictly between 0 and 1")
        self.T = len(self.betas)
        log_alpha_bar = torch.log1p(-self.betas).cumsum(0)
        self.alpha_bar = log_alpha_bar.exp()
        self.snr = 1 / torch.expm1(-log_alpha_bar)
        self._ratio = torch.cat([self.snr.new_zeros(1), self.snr.rsqrt()])  # (T + 1,), sigma / alpha by t T

    @classmethod
    def build(cls, kind: ScheduleKind, T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Self:
        """The schedule of that kind; `cosine` has no use for the ends. Defaults are Stable Diffusion's."""
        if kind != "cosine" and not (0 < beta_start < 1 and 0 < beta_end < 1):
            raise UserError(f"betas from {beta_start} to {beta_end}: both must lie strictly between 0 and 1")
        match kind:
            case "linear":  # Ho et al. 2020, section 4
                betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
            case "scaled_linear":  # Rombach et al. 2022 (arXiv 2112.10752), their code
                betas = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2
            case "cosine":  # Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17
                ends = torch.arange(T + 1, dtype=torch.float64) / T
                f = torch.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2
                betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
            case _:
                assert_never(kind)
        return cls(betas)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """The schedule of a scheduler_config.json, whatever scheduler's; UserError for what isn't known."""
        for key in ("rescale_betas_zero_snr", "use_flow_sigmas"):
            if config.get(key):
                raise UserError(f"scheduler config: {key} is not supported; give a config without it")
        T = config.get("num_train_timesteps", 1000)
        if not isinstance(T, int) or T < 1:
            raise UserError(f"scheduler config: num_train_timesteps {T!r}: give a whole number from 1")
        if config.get("trained_betas") is not None:
            schedule = cls(config["trained_betas"])
            if schedule.T != T:
                raise UserError(f"scheduler config: {schedule.T} trained_betas for {T} num_train_timesteps")
            return schedule
        match config.get("beta_schedule"):
            case "linear" | "scaled_linear" as kind:
                start, end = config.get("beta_start"), config.get("beta_end")
                if not (isinstance(start, int | float) and isinstance(end, int | float)):
                    raise UserError(f"scheduler config: beta_start {start!r}, beta_end {end!r}: give two numbers")
                return cls.build(kind, T, start, end)
            case "squaredcos_cap_v2":
                return cls.build("cosine", T)
            case other:
                raise UserError(
                    f"scheduler config: beta_schedule {other!r} is not known; give trained_betas, or one of "
                    "linear, scaled_linear, squaredcos_cap_v2"
                )

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, of the shape of t (float64, in [0, 1])."""
        ratio, place = self._ratio.to(t.device), t * self.T
        below = place.long().clamp(0, self.T - 1)
        ratio = torch.lerp(ratio[below], ratio[below + 1], place - below)
        alpha = (1 + ratio**2).rsqrt()
        return alpha, alpha * ratio

    def index(self, t: float) -> float:
        """The (fractional) index that stands at time t."""
        return t * self.T - 1

    def level(self, index: int | float) -> Level:
        """The level at an index of the grid or between two of them; -1 is the clean end, t = 0."""
        if not -1 <= index <= self.T - 1:
            raise ValueError(f"index {index}: this schedule has -1 (clean) to {self.T - 1}")
        t = (index + 1) / self.T
        alpha, sigma = self(self.betas.new_tensor(t))
        return Level(t, alpha.item(), sigma.item(), int(index) if index == int(index) else index)


def timesteps(
    n: int, T: int, spacing: Spacing, steps_offset: int = 0, spare: bool = False, whole: bool = True
) -> np.ndarray:
    """The n indices (n,) that a sampler visits, falling, as diffusers chooses them.

    Spacings: Lin et al. 2024, arXiv 2305.08891, table 2. `spare` has leading and linspace divide the range
    in n + 1 and drops the lowest (diffusers' DPM-Solver); `whole=False` leaves linspace unrounded (its
    Euler). Raises UserError where n indices don't fit.
    """
    if not 1 <= n <= T:
        raise UserError(f"{n} sampling steps: give 1 to {T}")
    divisions = n + 1 if spare else n
    indices: np.ndarray
    match spacing:
        case "leading":
            indices = (np.arange(divisions) * (T // divisions))[::-1][:n] + steps_offset
        case "trailing":  # the float arange may hold one element too many, which would stand below index 0
            indices = np.round(np.arange(T, 0, -T / n))[:n] - 1
        case "linspace":
            indices = np.linspace(0, T - 1, divisions)[::-1][:n]
        case _:
            assert_never(spacing)
    indices = indices.round().astype(np.int64) if whole else indices.astype(np.float64)
    if indices[0] > T - 1 or indices[-1] < 0 or (np.diff(indices) >= 0).any():
        raise UserError(
            f"{n} steps with {spacing} spacing (steps_offset {steps_offset}) don't fit {T} timesteps: "
            "take fewer steps, or trailing spacing"
        )
    return indices
