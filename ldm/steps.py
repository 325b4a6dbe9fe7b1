"""The steps of the samplers, and the sampling loop that takes them.

DDPM       Ho et al. 2020, arXiv 2006.11239, eq. 7
DDIM       Song et al. 2021, arXiv 2010.02502, eq. 12 and 16
Euler      Karras et al. 2022, arXiv 2206.00364, algorithm 1, lines 4 and 5: DDIM's step with eta 0, which is also
           Euler's on the straight path; ancestral: DDIM's step with eta 1
Heun       Karras et al. 2022, algorithm 1
DPM++ 2M   Lu et al. 2022, arXiv 2211.01095, algorithm 2: DDIM's step with x̂0 extrapolated; its SDE form, with eta 1
UniPC      Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2, of order 2 or 3
predictor–corrector  Song et al. 2021, arXiv 2011.13456, algorithms 2 and 3
LCM        Luo et al. 2023, arXiv 2310.04378, algorithm 3, for consistency models

For every sampler and path, the state is x_t = alpha x0 + sigma eps. Apart from its scale, everything depends only on
sigma / alpha. Coefficients are Python floats, computed from two levels, so nothing in the loop waits for a device.
Plans and steps equal diffusers' to rounding, except for the differences listed in docs/adr/0007.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from ldm.consistency import boundary
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

    make_step: Callable[[Schedule, VarianceKind, int | None], Step]
    """Constructor of the step for one trajectory: (the model's schedule, its variance, number of steps) → step."""
    grid: Grid
    """Rules for the visited levels and the first state."""
    draws_noise: bool
    """Whether the steps add noise, so that the same first state can lead to different images."""
    uses_learned_variance: bool = False
    """Whether the steps use the learned variance of a network that has one."""

    def step(self, schedule: Schedule, variance: VarianceKind = "fixed_small", steps: int | None = None) -> Step:
        """Make the step for one trajectory. Without `draws_noise`, the step raises RuntimeError if it draws noise.

        steps: the number of steps; None: unknown.
        """
        step = self.make_step(schedule, variance, steps)
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
    """UniPC: a multistep predictor, whose step the next step corrects with x̂0 at its end. One evaluation per step.

    Each step uses up to `order` estimates x̂0. The first steps have fewer, and the last two are of order 2 and 1, as in
    diffusers. Zhao et al. 2023, algorithms 1 and 2: their condition of order is R a B(h) = phi for the weights a. The
    function B(h) cancels if this is solved. But if there is only one weight, they set it to 1/2, and B(h), which is h
    or e^h - 1, makes a difference.
    """

    order: Literal[2, 3] = 2
    b: Literal["h", "expm1"] = "expm1"
    """B(h): h is their B1, e^h - 1 is their B2."""
    steps: int | None = None
    """Number of steps of the trajectory; None: unknown, and only the step to t = 0 has a lower order."""
    start: Tensor | None = None
    """State at the start of the last step."""
    outputs: tuple[tuple[Tensor, Level], ...] = ()
    """x̂0 and level at the starts of the last steps, the newest first."""
    used: int = 0
    """Order of the last step."""
    taken: int = 0
    """Number of steps taken."""

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        output = denoise(x, now).x0, now
        if self.start is not None:
            x = self._step(self.start, (*self.outputs[: self.used], output), now)
        self.start, self.outputs = x, (output, *self.outputs)[: self.order]
        remaining = self.order if self.steps is None else self.steps - self.taken
        self.taken, self.used = self.taken + 1, 1 if next.is_last else min(len(self.outputs), remaining)
        used = self.outputs[: self.used]
        if next.is_last:
            self.start, self.outputs, self.taken = None, (), 0
        return self._step(x, used, next)

    def _step(self, x: Tensor, outputs: Sequence[tuple[Tensor, Level]], end: Level) -> Tensor:
        """Step from the state x to the level `end`. outputs: the one at the start of the step, then the others."""
        (x0, start), *others = outputs
        h = end.half_log_snr - start.half_log_snr
        places = [1.0 if level is end else (level.half_log_snr - start.half_log_snr) / h for _, level in others]
        weights = self._weights(places, h)
        change = sum(w * (other - x0) for w, (other, _) in zip(weights, others, strict=True))
        return move(x, x0 + change, start, end, end.sigma)

    def _weights(self, places: list[float], h: float) -> list[float]:
        """Return the weights of the differences of x̂0 at these places: 0 is the step's start, 1 is its end.

        They make the step exact if x̂0 is a polynomial in lambda whose degree is the number of places: the weighted sum
        of places^i is i! phi_{i+1} / phi_1, for every i up to that degree.
        """
        if len(places) == 1:
            scale = 1.0 if self.b == "expm1" or math.isinf(h) else 1 / _phi(1, -h)
            return [scale / 2 / places[0]]
        finite = [r for r in places if math.isfinite(r)]  # pure noise is infinitely far away, and has weight 0
        degrees = range(1, len(finite) + 1)
        sums = [math.factorial(i) * _phi(i + 1, -h) / _phi(1, -h) for i in degrees]
        weights = iter(np.linalg.solve([[r**i for r in finite] for i in degrees], sums).tolist() if finite else [])
        return [next(weights) if math.isfinite(r) else 0.0 for r in places]


def _phi(k: int, h: float) -> float:
    """Return phi_k(h) = Σ_j h^j / (j + k)!, so that phi_0 is e^h and phi_k = (phi_{k-1} - 1/(k-1)!) / h."""
    if abs(h) < 1:  # the recursion would lose digits
        return sum(h**j / math.factorial(j + k) for j in range(18))
    value = math.exp(h)
    for i in range(k):
        value = (value - 1 / math.factorial(i)) / h
    return value


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


@dataclass(frozen=True)
class Consistency:
    """A consistency model's jump to t = 0, and new noise up to the next level: Song et al. 2023, algorithm 1."""

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        skip, out = boundary(now.model_time)
        end = skip * x + out * denoise(x, now).x0
        return end if next.is_last else next.alpha * end + next.sigma * noise()


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
