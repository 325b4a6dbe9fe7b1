"""The steps of the samplers, and the sampling loop that takes them.

DDPM       Ho et al. 2020, arXiv 2006.11239, eq. 7
DDIM       Song et al. 2021, arXiv 2010.02502, eq. 12 and 16
Euler      Karras et al. 2022, arXiv 2206.00364, algorithm 1, lines 4 and 5: DDIM's step with eta 0, which is also
           Euler's on the straight path; ancestral: DDIM's step with eta 1
Heun       Karras et al. 2022, algorithm 1
DPM++ 2M   Lu et al. 2022, arXiv 2211.01095, algorithm 2: DDIM's step with x̂0 extrapolated; its SDE form, with eta 1
UniPC      Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2, of order 2 with B(h) = e^h - 1
predictor–corrector  Song et al. 2021, arXiv 2011.13456, algorithms 2 and 3

For every sampler and path, the state is x_t = alpha x0 + sigma eps. Apart from its scale, everything depends only on
sigma / alpha. Coefficients are Python floats, computed from two levels, so nothing in the loop waits for a device.
Plans and steps equal diffusers' to rounding, except for the differences listed in docs/adr/0007.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from ldm.denoiser import Denoise
from ldm.errors import UserError
from ldm.parameterization import to_eps
from ldm.process import VarianceKind, posterior, reverse_variance, score, step_variance
from ldm.schedule import Level, Schedule
from ldm.spacing import Grid, LevelPair

Noise = Callable[[], Tensor]
"""Source of noise: each call returns standard normal noise of the state's shape. Steps draw in diffusers' order."""


class Step(Protocol):
    """A function from the state x at level `now` to the state at level `next`, both (b, c, h, w).

    Multistep methods keep earlier outputs, so each trajectory needs its own object.
    """

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """Everything that distinguishes one sampler from another."""

    make_step: Callable[[Schedule, VarianceKind], Step]
    """Constructor of the step for one trajectory: (the model's schedule, the model's variance) → step."""
    grid: Grid
    """Rules for the visited levels and the first state."""
    draws_noise: bool
    """Whether the steps add noise, so that the same first state can lead to different images."""
    uses_learned_variance: bool = False
    """Whether the steps use the learned variance of a network that has one."""

    def step(self, schedule: Schedule, variance: VarianceKind = "fixed_small") -> Step:
        """Make the step for one trajectory. Without `draws_noise`, the step raises RuntimeError if it draws noise."""
        step = self.make_step(schedule, variance)
        return step if self.draws_noise else _WithoutNoise(step)


@dataclass(frozen=True)
class _WithoutNoise:
    """A step whose source of noise raises RuntimeError."""

    step: Step

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        return self.step(denoise, x, now, next, self._refuse)

    def _refuse(self) -> Tensor:
        raise RuntimeError(f"{self.step} draws noise, but its sampler has draws_noise=False: set it to True")


def sample(
    denoise: Denoise,
    x: Tensor,
    pairs: Iterable[LevelPair],
    step: Step,
    noise: Noise,
    callback: Callable[[int, LevelPair, Tensor], Tensor] | None = None,
) -> Tensor:
    """Take one step for each pair of levels, from the state x (b, c, h, w), and return the last state.

    `callback(k, pair, x)` gets the state after step k and returns the same or a changed one.
    """
    for k, pair in enumerate(pairs):
        x = step(denoise, x, pair.now, pair.next, noise)
        if callback is not None:
            x = callback(k, pair, x)
    return x


def invert(denoise: Denoise, x: Tensor, pairs: Sequence[LevelPair], refinements: int = 0) -> Tensor:
    """Return the noise (b, c, h, w) that DDIM (eta 0) maps to the data x (b, c, h, w), by its steps in reverse order.

    The eps of a step belongs to the state at its start, which isn't known yet. It is first evaluated at the known
    state, at the step's end (Dhariwal & Nichol 2021, arXiv 2105.05233, appendix F), then `refinements` times at the
    state that results (a fixed-point iteration: Pan et al. 2023, arXiv 2309.04907).
    """
    for now, next in reversed(pairs):
        estimate, level = x, now if next.is_last else next
        for _ in range(refinements + 1):
            eps = to_eps("x0", denoise(estimate, level).x0, estimate, level.alpha, level.sigma)
            estimate, level = now.alpha / next.alpha * (x - next.sigma * eps) + now.sigma * eps, now
        x = estimate
    return x


@dataclass(frozen=True)
class DDPM:
    """Ancestral sampling: a draw from p(x_s | x_t) for any two levels, Ho et al. 2020, eq. 7 with x̂0.

    The step to t = 0, where the posterior's variance is 0, returns the mean.
    """

    variance: VarianceKind = "fixed_small"

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        denoised = denoise(x, now)
        mean, small = posterior(x, denoised.x0, now, next)
        if now.model_time <= 0:
            return mean
        z = noise()
        if next.is_last:
            return mean
        variance = reverse_variance(self.variance, small, step_variance(next, now), denoised.variance_fraction)
        return mean + variance**0.5 * z


@dataclass
class Multistep:
    """The DDIM family: alpha x̂ + sigma eps at the next level, where a share `eta` of the eps is new noise.

    Song et al. 2021, eq. 12 and 16: eta 0 solves the ODE, eta 1 is DDPM's step. Order 1 uses x̂ = x̂0, which is Euler's
    step on Karras' ODE: for y = x / alpha and s = sigma / alpha, y + (s_next - s) (y - x̂0) / s has the same eps,
    (y - x̂0) / s. Order 2 extrapolates x̂ from the previous step (Lu et al. 2022, algorithm 2, midpoint), except in the
    step to t = 0. Raises UserError for an eta outside [0, 1].
    """

    order: Literal[1, 2] = 1
    eta: float = 0.0
    previous: tuple[Tensor, Level] | None = None
    """x̂0 and level at the start of the previous step, if order 2 needs them."""

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta {self.eta}: must be 0 (no noise) to 1 (as much as DDPM)")

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        x0 = denoise(x, now).x0
        target = x0 + _half_step_change(x0, self.previous, now, next)
        self.previous = (x0, now) if self.order == 2 and not next.is_last else None
        std = self.eta * next.sigma * math.sqrt(max(0.0, 1 - (next.noise / now.noise) ** 2))
        x = move(x, target, now, next, math.sqrt(next.sigma**2 - std**2))
        return x + std * noise() if self.eta > 0 else x


@dataclass
class UniPC:
    """DPM++ 2M's step, which the next step corrects with the network's output at its end. One evaluation per step."""

    last: tuple[Tensor, Tensor, Level] | None = None
    """State, x̂0 and level at the start of the last step."""
    second_last: tuple[Tensor, Level] | None = None
    """x̂0 and level at the start of the step before the last."""

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        x0 = denoise(x, now).x0
        previous = None
        if self.last is not None:
            x, previous = self._correct(*self.last, x0, now), self.last[1:]
        self.second_last, self.last = previous, (x, x0, now)
        if next.is_last:
            self.second_last = self.last = None
        return move(x, x0 + _half_step_change(x0, previous, now, next), now, next, next.sigma)

    def _correct(self, x: Tensor, x0: Tensor, start: Level, x0_end: Tensor, end: Level) -> Tensor:
        """Repeat the last step, now that x̂0 at its end is known: Zhao et al. 2023, algorithm 1."""
        h = start.half_log_snr - end.half_log_snr  # their -h, since x̂0 is integrated
        phi = math.expm1(h)
        first = (phi / h - 1) / phi
        if self.second_last is None:
            correction = (x0_end - x0) / 2
        else:
            second = 2 * ((phi / h - 1) / h - 0.5) / phi
            x0_before, before = self.second_last
            r = (start.half_log_snr - before.half_log_snr) / h  # negative, in units of this step
            weight = (second - first) / (r - 1)
            correction = weight / r * (x0_before - x0) + (first - weight) * (x0_end - x0)
        return move(x, x0 + correction, start, end, end.sigma)


@dataclass(frozen=True)
class Heun:
    """Heun's step, Karras et al. 2022, algorithm 1: Euler's step, repeated with the mean of the slopes at both ends.

    The ODE is dy = x̂0 da + eps db for the state y, scaled so that a = 1 (Karras' ODE) or, if `straight`, so that
    a + b = 1 (the flow's ODE, which can start from pure noise).
    """

    straight: bool = False

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        x0 = denoise(x, now).x0
        end = move(x, x0, now, next, next.sigma)
        if next.is_last:
            return end
        x0_end = denoise(end, next).x0
        eps = to_eps("x0", x0, x, now.alpha, now.sigma)
        eps_end = to_eps("x0", x0_end, end, next.alpha, next.sigma)
        (a, b, scale), (a_end, b_end, scale_end) = self._scaled(now), self._scaled(next)
        slope = (a_end - a) * (x0 + x0_end) / 2 + (b_end - b) * (eps + eps_end) / 2
        return (x / scale + slope) * scale_end

    def _scaled(self, level: Level) -> tuple[float, float, float]:
        scale = level.alpha + level.sigma if self.straight else level.alpha
        return level.alpha / scale, level.sigma / scale, scale


@dataclass(frozen=True)
class PredictorCorrector:
    """DDPM's step, then a step of Langevin dynamics at its end. Two evaluations per step.

    The Langevin step's size is 2 (snr sigma)^2: Song et al. 2021, algorithm 4. They measure the ratio of the norms of
    noise and score; here it is replaced by its expectation, sigma. Their algorithm 5 has another factor, which depends
    on the path's scale.
    """

    predictor: Step = DDPM()
    snr: float = 0.16

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        x = self.predictor(denoise, x, now, next, noise)
        if next.is_last:
            return x
        size = 2 * (self.snr * next.sigma) ** 2
        return x + size * score(x, denoise(x, next).x0, next) + math.sqrt(2 * size) * noise()


def move(x: Tensor, x0: Tensor, now: Level, next: Level, sigma: float) -> Tensor:
    """Return alpha_next x0 + sigma eps, with the eps that follows from x and x0 at `now`."""
    ratio = sigma / now.sigma
    return ratio * x + (next.alpha - ratio * now.alpha) * x0


def _half_step_change(x0: Tensor, previous: tuple[Tensor, Level] | None, now: Level, next: Level) -> Tensor | float:
    """Return the change of x̂0 over half the step, from its slope in lambda over the previous step.

    It is 0 without a previous step, and for the step to t = 0.
    """
    if previous is None or next.is_last:
        return 0.0
    x0_before, before = previous
    ratio = (next.half_log_snr - now.half_log_snr) / (now.half_log_snr - before.half_log_snr)
    return ratio / 2 * (x0 - x0_before)
