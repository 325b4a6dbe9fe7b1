"""Noise schedules: x_t = alpha_t x0 + sigma_t eps, where (alpha_t, sigma_t) is a function of t in [0, 1].

Index i = 0 … T-1 (0 has the least noise) is at t = (i + 1) / T; t = 0 is clean, and t = 1 has the most noise. There are
two kinds of path:

- variance-preserving, alpha^2 + sigma^2 = 1, defined by T betas (Ho et al. 2020, arXiv 2006.11239, eq. 2 and 4).
  Between the T points the noise level sigma / alpha of Karras et al. (2022, arXiv 2206.00364) is linear in t,
  from 0 at t = 0, as in diffusers' schedulers with fractional timesteps.
- rectified flow, alpha + sigma = 1 (Liu et al. 2022, arXiv 2209.03003; Esser et al. 2024, arXiv 2403.03206).

Any path is a scaled version of any other: apart from a factor, alpha x0 + sigma eps depends only on sigma / alpha.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from ldm.errors import UserError, one_line
from ldm.kinds import BetaKind, ScheduleKind

MOST_TIMESTEPS = 1_000_000
_UNSUPPORTED = (
    "use_flow_sigmas",
    "use_dynamic_shifting",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_lu_lambdas",
    "thresholding",
    "timestep_type",
    "shift_terminal",
    "invert_sigmas",
    "final_sigmas_type",
    "interpolation_type",
)
"""Keys of diffusers' schedulers that change the process or the levels if they are set, and that aren't supported."""


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level, in Python numbers, so that coefficients computed from them never wait for a device."""

    alpha: float
    sigma: float
    model_time: int | float
    """Time input of the network: an int at a timestep of a beta schedule, else a float."""

    @property
    def is_last(self) -> bool:
        """Whether this is the clean end, t = 0, where the network isn't evaluated."""
        return self.sigma == 0

    @property
    def noise(self) -> float:
        """sigma / alpha, the noise level of Karras et al. 2022; infinite for pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma)."""
        return -math.log(self.noise) if 0 < self.noise < math.inf else math.copysign(math.inf, 1 - self.noise)


class Schedule(ABC):
    """A path of alpha_t and sigma_t in float64: `schedule(t)`, `schedule.level(index)`, or tables by index.

    Attributes: `T`; `alpha`, `sigma` and `model_times` (the network's time inputs), each (T,).
    """

    T: int
    alpha: Tensor
    sigma: Tensor
    model_times: Tensor

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t, each of t's shape, at float64 times t in [0, 1].

        They are differentiable between the T points.
        """

    @abstractmethod
    def level(self, index: int | float) -> Level:
        """Return the level at an index, which may be fractional; -1 is the clean end, t = 0."""

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 by index, (T,); it decreases."""
        return (self.alpha / self.sigma) ** 2

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last level is pure noise."""
        return self.alpha[-1].item() == 0

    def _alpha_and_sigma(self, index: int | float) -> tuple[float, float]:
        if not -1 <= index <= self.T - 1:
            raise ValueError(f"index {index}: must be from -1 (clean) to {self.T - 1} for this schedule")
        alpha, sigma = self(self.alpha.new_tensor((index + 1) / self.T))
        return alpha.item(), sigma.item()

    @staticmethod
    def build(
        kind: ScheduleKind,
        T: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
        shift: float = 1.0,
    ) -> "Schedule":
        """Build the schedule of the given kind.

        beta_start and beta_end (Stable Diffusion's by default) aren't used by `cosine` and `flow`; only `flow` uses
        shift. Raises UserError for options that don't fit the kind.
        """
        if kind == "flow":
            if zero_terminal_snr:
                raise UserError(
                    "zero_terminal_snr: can't be set with schedule flow, which always ends in pure noise; leave it out"
                )
            return RectifiedFlow(T, shift)
        if shift != 1:
            raise UserError(f"shift {shift}: can't be used with schedule {kind}; leave it out, or choose schedule flow")
        betas = make_betas(kind, T, beta_start, beta_end)
        return BetaSchedule(rescale_to_zero_terminal_snr(betas) if zero_terminal_snr else betas)

    @staticmethod
    def from_diffusers(config: Mapping[str, Any]) -> "Schedule":
        """Read the schedule from any scheduler's scheduler_config.json. Raises UserError for unsupported keys."""
        for key in _UNSUPPORTED:
            if config.get(key) not in (None, False, "discrete", "zero", "linear"):
                raise UserError(
                    f"scheduler config: {key} {config[key]!r} is not supported; use a configuration without it"
                )
        T = config.get("num_train_timesteps", 1000)
        if not isinstance(T, int) or isinstance(T, bool) or not 1 <= T <= MOST_TIMESTEPS:
            raise UserError(
                f"scheduler config: num_train_timesteps {one_line(repr(T), 40)}: must be a whole number from 1 to "
                f"{MOST_TIMESTEPS:,}"
            )
        if str(config.get("_class_name", "")).startswith("FlowMatch"):
            return RectifiedFlow(T, config.get("shift", 1.0))
        if config.get("trained_betas") is not None:
            betas = _as_betas(config["trained_betas"])
            if len(betas) != T:
                raise UserError(
                    f"scheduler config: trained_betas has {len(betas)} values, num_train_timesteps is {T}: they must "
                    "be equal"
                )
        else:
            names: dict[str, BetaKind] = {
                "linear": "linear",
                "scaled_linear": "scaled_linear",
                "squaredcos_cap_v2": "cosine",
                "sigmoid": "sigmoid",
            }
            kind, start, end = (config.get(key) for key in ("beta_schedule", "beta_start", "beta_end"))
            if not isinstance(kind, str) or kind not in names:
                raise UserError(
                    f"scheduler config: beta_schedule {kind!r}: choose {', '.join(names)}, or give trained_betas"
                )
            if kind != "squaredcos_cap_v2" and not all(isinstance(end, int | float) for end in (start, end)):
                raise UserError(f"scheduler config: beta_start {start!r}, beta_end {end!r}: both must be numbers")
            betas = make_betas(names[kind], T, start or 0.5, end or 0.5)
        rescale = config.get("rescale_betas_zero_snr") and betas[-1] < 1  # trained_betas may have been rescaled before
        return BetaSchedule(rescale_to_zero_terminal_snr(betas) if rescale else betas)


class BetaSchedule(Schedule):
    """The variance-preserving path of T betas (T,), with the additional table `alpha_bar`, (T,).

    Raises UserError if a beta is not strictly between 0 and 1 (the last may be 1: zero terminal SNR).
    """

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        self.betas = _as_betas(betas)
        self.T = len(self.betas)
        log_alpha_bar = torch.log1p(-self.betas).cumsum(0)
        self.alpha_bar = log_alpha_bar.exp()
        self.alpha, self.sigma = self.alpha_bar.sqrt(), (-torch.expm1(log_alpha_bar)).sqrt()
        self.model_times = torch.arange(self.T)
        self._noise = torch.cat([self.sigma.new_zeros(1), self.sigma / self.alpha])  # (T + 1,), index t T

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table, position = self._noise.to(t.device), t * self.T
        below = position.long().clamp(0, self.T - 1)
        low, high, fraction = table[below], table[below + 1], position - below
        # In the last interval before pure noise, whose sigma / alpha is infinite, alpha / sigma is linear instead.
        infinite = torch.isinf(high)
        noise = torch.where(infinite, low / (1 - fraction), torch.lerp(low, torch.where(infinite, low, high), fraction))
        return (1 + noise**2).rsqrt(), (1 + noise**-2).rsqrt()

    def level(self, index: int | float) -> Level:
        return Level(*self._alpha_and_sigma(index), int(index) if index == int(index) else index)

    def at_noise(self, noise: float) -> Level:
        """Return the level whose sigma / alpha is `noise`; its time is interpolated in log(noise) as in k-diffusion."""
        logs = self._noise[1:].log()
        low = int((logs <= math.log(noise)).sum().clamp(1, self.T - 1)) - 1
        fraction = (math.log(noise) - logs[low].item()) / (logs[low + 1] - logs[low]).item()
        alpha = 1 / math.hypot(1, noise)
        return Level(alpha, alpha * noise, low + min(max(fraction, 0.0), 1.0))


class RectifiedFlow(Schedule):
    """The straight path from data to noise: alpha = 1 - s, sigma = s with s = shift t / (1 + (shift - 1) t).

    With a shift of sqrt(m / n), images of m elements have the same uncertainty as images of n elements without a shift
    (Esser et al. 2024, eq. 23). The network's time is s T, as for diffusers' flow models. Raises UserError for a shift
    that isn't a positive number.
    """

    def __init__(self, T: int = 1000, shift: float = 1.0) -> None:
        if not (isinstance(shift, int | float) and 0 < shift < math.inf):
            raise UserError(f"shift {shift!r}: must be a positive number; 1 is no shift")
        self.T, self.shift = T, shift
        self.alpha, self.sigma = self(torch.arange(1, T + 1, dtype=torch.float64) / T)
        self.model_times = self.sigma * T

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        divisor = 1 + (self.shift - 1) * t
        return (1 - t) / divisor, self.shift * t / divisor

    def level(self, index: int | float) -> Level:
        alpha, sigma = self._alpha_and_sigma(index)
        return Level(alpha, sigma, sigma * self.T)


def make_betas(kind: BetaKind, T: int, start: float, end: float) -> Tensor:
    """Return T betas from `start` to `end`, (T,) float64; `cosine` ignores both."""
    if kind != "cosine" and not 0 < start <= end < 1:
        raise UserError(f"beta_start {start}, beta_end {end}: must satisfy 0 < beta_start <= beta_end < 1")
    match kind:
        case "linear":  # Ho et al. 2020, section 4
            return torch.linspace(start, end, T, dtype=torch.float64)
        case "scaled_linear" | "quadratic":  # one formula, two names: Rombach et al. 2022, Song et al. 2021's code
            return torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2
        case "cosine":  # Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17
            ends = torch.arange(T + 1, dtype=torch.float64) / T
            f = torch.cos((ends + 0.008) / 1.008 * math.pi / 2) ** 2
            return (1 - f[1:] / f[:-1]).clamp(max=0.999)
        case "sigmoid":  # Xu et al. 2022 (GeoDiff, arXiv 2203.02923), their code
            return start + (end - start) * torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()
        case _:
            assert_never(kind)


def rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that its last value is 0 and its first stays; return the resulting betas.

    Lin et al. 2024, arXiv 2305.08891, algorithm 1.
    """
    alpha = torch.log1p(-betas).cumsum(0).div(2).exp()
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return 1 - torch.cat([alpha[:1], alpha[1:] / alpha[:-1]]) ** 2


def _as_betas(betas: Tensor | Sequence[float]) -> Tensor:
    try:
        betas = torch.as_tensor(betas, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise UserError("betas: must be a list of numbers") from None
    if betas.ndim != 1 or len(betas) < 2:
        raise UserError(f"betas of shape {tuple(betas.shape)}: must be a list of at least 2 numbers")
    last = torch.arange(len(betas)) == len(betas) - 1
    invalid = betas[~((betas > 0) & (betas < 1) | last & (betas == 1))]
    if len(invalid):
        raise UserError(f"beta {invalid[0].item()}: must be greater than 0 and less than 1 (the last may be 1)")
    return betas
