"""Samplers: one loop over the legs of a plan; a sampler is a step that walks one leg, and the plan it wants.

DDPM      Ho et al. 2020, arXiv 2006.11239, eq. 7
DDIM      Song et al. 2021, arXiv 2010.02502, eq. 12 and 16
Euler     Karras et al. 2022, arXiv 2206.00364, algorithm 1, lines 4 and 5; it is DDIM's step with eta 0
DPM++ 2M  Lu et al. 2022, arXiv 2211.01095, algorithm 2; it is DDIM's step with eta 0 and x̂0 extrapolated

The state is x_t = alpha x0 + sigma eps for every sampler. Coefficients are floats of the host, made from
two levels: nothing in the loop waits for a device. Plans and steps are diffusers' to rounding.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol, assert_never

from torch import Tensor

from ldm.denoiser import Denoise
from ldm.errors import UserError
from ldm.schedule import Level, Schedule, Spacing, timesteps

SamplerKind = Literal["ddpm", "ddim", "euler", "dpmpp_2m"]
Noise = Callable[[], Tensor]
"""Gives a fresh standard normal tensor of the state's shape; called exactly where diffusers draws."""


class Leg(NamedTuple):
    """One step: the network is evaluated at `now`, the state goes on to `next`."""

    now: Level
    next: Level


@dataclass(frozen=True, slots=True)
class Plan:
    """The legs from noise to data, and the standard deviation of the Gaussian to begin with.

    To begin part of the way (image to image), walk `legs[k:]` from alpha x0 + sigma eps at `legs[k].now`.
    """

    legs: tuple[Leg, ...]
    start_std: float

    def start(self, noise: Tensor) -> Tensor:
        """The first state, of standard normal noise."""
        return self.start_std * noise


class Step(Protocol):
    """Walks a leg. Multistep ones remember: one object per trajectory."""

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor: ...


def sample(
    denoise: Denoise,
    x: Tensor,
    legs: Iterable[Leg],
    step: Step,
    noise: Noise,
    callback: Callable[[int, Leg, Tensor], object] | None = None,
) -> Tensor:
    """Walk the legs from state x (b, c, h, w); `callback(k, leg, x)` sees the state at the end of leg k."""
    for k, leg in enumerate(legs):
        x = step(denoise, x, leg.now, leg.next, noise)
        if callback is not None:
            callback(k, leg, x)
    return x


def plan(
    schedule: Schedule,
    kind: SamplerKind,
    n: int,
    spacing: Spacing,
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
) -> Plan:
    """The legs that diffusers' scheduler of that kind walks, made `from_config` of such a DDIMScheduler.

    All end at t = 0 except ddim, which ends at index 0 unless `set_alpha_to_one`.
    Raises UserError where n steps don't fit the schedule.
    """
    T = schedule.T
    match kind:
        case "ddim":
            # diffusers' DDIM goes down by T // n from every index. With leading that is where the next leg
            # begins; with trailing it can miss by an index where n doesn't divide T; with linspace it falls
            # short, and noise is left in the picture (huggingface/diffusers#12633).
            down, end = T // n, -1 if set_alpha_to_one else 0
            indices = timesteps(n, T, spacing, steps_offset).tolist()
            ends = ((i, i - down if i >= down else end) for i in indices)
            return Plan(tuple(Leg(schedule.level(i), schedule.level(j)) for i, j in ends), 1.0)
        case "ddpm":
            indices = timesteps(n, T, spacing, steps_offset)
        case "euler":
            indices = timesteps(n, T, spacing, steps_offset, whole=False)
        case "dpmpp_2m":
            indices = timesteps(n, T, spacing, steps_offset, spare=True)
        case _:
            assert_never(kind)
    levels = [schedule.level(i) for i in [*indices.tolist(), -1]]
    # Where its spacing reaches T - 1, diffusers' Euler begins from sigma eps, not from the variance of x_t.
    start_std = levels[0].sigma if kind == "euler" and spacing != "leading" else 1.0
    return Plan(tuple(Leg(*ends) for ends in pairwise(levels)), start_std)


def make_step(kind: SamplerKind, eta: float = 0.0) -> Step:
    """A fresh step of that kind; eta (0 to 1) is ddim's share of noise."""
    if eta and kind != "ddim":
        raise UserError(f"eta {eta} with {kind}: only ddim has an eta")
    match kind:
        case "ddpm":
            return ddpm
        case "ddim":
            return DDIM(eta)
        case "euler":
            return DDIM()
        case "dpmpp_2m":
            return DPMpp2M()
        case _:
            assert_never(kind)


def ddpm(denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
    """A draw from q(x_s | x_t, x̂0), Ho et al. 2020, eq. 7 (variance "fixed small"), for any two levels."""
    x0 = denoise(x, now)
    alpha_ts = now.alpha / next.alpha
    beta_ts = 1 - alpha_ts**2  # variance of q(x_t | x_s)
    shrink = next.sigma**2 / now.sigma**2
    x = (alpha_ts * shrink) * x + (next.alpha * beta_ts / now.sigma**2) * x0
    return x + math.sqrt(shrink * beta_ts) * noise() if now.index > 0 else x


@dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, eq. 12, with the variance of eq. 16: eta 0 solves the ODE, eta 1 is DDPM's step.

    With eta 0 it is also Euler's step on Karras' ODE: for y = x / alpha and s = sigma / alpha,
    y + (s_next - s) (y - x̂0) / s is a state whose eps, (y - x̂0) / s, is the old one.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta {self.eta}: give 0 (no noise) to 1 (as much as DDPM)")

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        x0 = denoise(x, now)
        std = self.eta * next.sigma / now.sigma * math.sqrt(max(0.0, 1 - (now.alpha / next.alpha) ** 2))
        x = move(x, x0, now, next, math.sqrt(max(0.0, next.sigma**2 - std**2)))
        return x + std * noise() if self.eta > 0 else x


@dataclass
class DPMpp2M:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, midpoint; of first order at the start and into t = 0.

    As e^{-h} = (sigma_next / alpha_next) / (sigma / alpha), the update is DDIM's with D in place of x̂0.
    """

    previous: tuple[Tensor, Level] | None = None

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        x0 = d = denoise(x, now)
        if self.previous is not None and next.sigma > 0:
            last_x0, last = self.previous
            r = (half_log_snr(now) - half_log_snr(last)) / (half_log_snr(next) - half_log_snr(now))
            d = x0 + (x0 - last_x0) / (2 * r)
        self.previous = (x0, now) if next.sigma > 0 else None
        return move(x, d, now, next, next.sigma)


def move(x: Tensor, x0: Tensor, now: Level, next: Level, sigma: float) -> Tensor:
    """alpha_next x0 + sigma eps, for the eps that x and x0 imply at `now`."""
    kept = sigma / now.sigma
    return kept * x + (next.alpha - kept * now.alpha) * x0


def half_log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma)."""
    return math.log(level.alpha / level.sigma)
