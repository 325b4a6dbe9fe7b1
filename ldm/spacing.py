"""Which levels a sampler visits: the legs from noise to data, as diffusers' schedulers choose them.

leading, trailing, linspace: Lin et al. 2024 (arXiv 2305.08891), table 2; karras: Karras et al. 2022 (arXiv 2206.00364),
eq. 5 with rho 7, from the schedule's greatest noise level to its least.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple, assert_never

import numpy as np
from torch import Tensor

from ldm.errors import UserError
from ldm.schedule import BetaSchedule, Level, Schedule

Spacing = Literal["leading", "trailing", "linspace", "karras"]
SamplerKind = Literal[
    "ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "predictor_corrector"
]
_RHO = 7


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


def plan(
    schedule: Schedule, kind: SamplerKind, n: int, spacing: Spacing, steps_offset: int = 1, set_alpha_to_one: bool = False
) -> Plan:  # fmt: skip
    """The legs that diffusers' scheduler of that kind walks, made `from_config` of such a DDIMScheduler.

    All end at t = 0 except ddim on a grid of betas, which ends at index 0 unless `set_alpha_to_one`. On a flow, indices
    aren't rounded, and the start has the standard deviation of x_t for data of variance 1. Raises UserError where n
    steps don't fit the schedule, or the spacing the sampler or the path.
    """
    T = schedule.T
    if not 1 <= n <= T:
        raise UserError(f"{n} sampling steps: give 1 to {T}, the model's timesteps")
    if not isinstance(schedule, BetaSchedule):
        levels = [schedule.level(i) for i in _flow_indices(n, T, spacing, steps_offset)]
        return _through([*levels, schedule.level(-1)], math.hypot(levels[0].alpha, levels[0].sigma))
    if spacing == "karras":
        return _karras(schedule, kind, n)
    match kind:
        case "ddim":
            # diffusers' DDIM goes down by T // n from every index. With leading that is where the next leg
            # begins; with trailing it can miss by an index where n doesn't divide T; with linspace it falls
            # short, and noise is left in the picture. Ours paints the same pictures.
            down, end = T // n, -1 if set_alpha_to_one else 0
            indices = visited(n, T, spacing, steps_offset).tolist()
            ends = ((i, i - down if i >= down else end) for i in indices)
            return Plan(tuple(Leg(schedule.level(i), schedule.level(j)) for i, j in ends), 1.0)
        case "ddpm" | "predictor_corrector":
            indices = visited(n, T, spacing, steps_offset)
        case "euler" | "euler_ancestral" | "heun":
            indices = visited(n, T, spacing, steps_offset, whole=False)
        case "dpmpp_2m" | "dpmpp_2m_sde" | "unipc":
            indices = visited(n, T, spacing, steps_offset, spare=True)
        case _:
            assert_never(kind)
    # Where its spacing reaches T - 1, diffusers' Euler begins from sigma eps, not from the variance of x_t.
    levels = [schedule.level(i) for i in [*indices.tolist(), -1]]
    bare = kind in ("euler", "euler_ancestral", "heun") and spacing != "leading"
    return _through(levels, levels[0].sigma if bare else 1.0)


def visited(
    n: int, T: int, spacing: Spacing, steps_offset: int = 0, spare: bool = False, whole: bool = True
) -> np.ndarray:
    """The n indices (n,) that a sampler visits on a grid of T, falling.

    `spare` has leading and linspace divide the range in n + 1 and drops the lowest (diffusers' DPM-Solver); `whole=False`
    leaves linspace unrounded (its Euler). Raises UserError where n indices don't fit.
    """
    if not 1 <= n <= T:
        raise UserError(f"{n} sampling steps: give 1 to {T}, the model's timesteps")
    divisions = n + 1 if spare else n
    indices: np.ndarray
    match spacing:
        case "leading":
            if n == 1:
                raise UserError("1 step with leading spacing begins and ends next to the data: take trailing")
            indices = (np.arange(divisions) * (T // divisions))[::-1][:n] + steps_offset
        case "trailing":  # the float arange may hold one element too many, which would stand below index 0
            indices = np.round(np.arange(T, 0, -T / n))[:n] - 1
        case "linspace":
            indices = np.linspace(0, T - 1, divisions)[::-1][:n] if divisions > 1 else np.array([T - 1])
        case "karras":
            raise UserError("karras spacing is one of noise levels, not of timesteps")
        case _:
            assert_never(spacing)
    indices = indices.round().astype(np.int64) if whole else indices.astype(np.float64)
    if indices[0] > T - 1 or indices[-1] < 0 or (np.diff(indices) >= 0).any():
        raise UserError(
            f"{n} steps with {spacing} spacing (steps_offset {steps_offset}) don't fit {T} timesteps: "
            "take fewer steps, or trailing spacing"
        )
    return indices


def _through(levels: list[Level], start_std: float) -> Plan:
    return Plan(tuple(Leg(*ends) for ends in pairwise(levels)), start_std)


def _karras(schedule: BetaSchedule, kind: SamplerKind, n: int) -> Plan:
    if kind in ("ddim", "ddpm"):
        raise UserError(
            f"karras spacing with {kind}, which walks whole timesteps: take euler, which is ddim's step, or another spacing"
        )
    if schedule.zero_terminal_snr:
        raise UserError("karras spacing begins at a finite noise level, which zero terminal SNR has not: take trailing")
    most, least = (schedule.level(i).noise ** (1 / _RHO) for i in (schedule.T - 1, 0))
    levels = [schedule.at_noise(float(noise)) for noise in np.linspace(most, least, n) ** _RHO]
    whole = kind in ("dpmpp_2m", "dpmpp_2m_sde", "unipc")  # what their networks are given is rounded
    if whole:
        levels = [replace(level, model_time=round(level.model_time)) for level in levels]
    return _through([*levels, schedule.level(-1)], 1.0 if whole else levels[0].sigma)


def _flow_indices(n: int, T: int, spacing: Spacing, steps_offset: int) -> list[float]:
    if spacing == "karras":
        raise UserError("karras spacing on a flow, whose noise levels reach infinity: take trailing (and a shift)")
    if spacing == "trailing":
        return [T - k * T / n - 1 for k in range(n)]
    return visited(n, T, spacing, steps_offset, whole=False).tolist()
