"""The noise levels that a sampler visits, as legs from noise to data. diffusers' schedulers choose the same ones.

leading, trailing, linspace: Lin et al. 2024 (arXiv 2305.08891), table 2; karras: Karras et al. 2022 (arXiv 2206.00364),
eq. 5 with rho 7, from the schedule's highest noise level to its lowest.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple, assert_never

import numpy as np
from torch import Tensor

from ldm.errors import UserError
from ldm.kinds import Spacing
from ldm.schedule import BetaSchedule, Level, Schedule

_RHO = 7


class Leg(NamedTuple):
    """One step from level `now`, where the network is evaluated, to level `next`."""

    now: Level
    next: Level


@dataclass(frozen=True, slots=True)
class Plan:
    """The legs from noise to data, and the standard deviation of the first state.

    For image to image, start at a later leg k: walk `legs[k:]` from alpha x0 + sigma eps at `legs[k].now`.
    """

    legs: tuple[Leg, ...]
    start_std: float

    def start(self, noise: Tensor) -> Tensor:
        """Return the first state, computed from standard normal noise."""
        return self.start_std * noise


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rules for a sampler's levels on a grid of betas and for its first state, equal to its diffusers scheduler's."""

    rounded: tuple[Spacing, ...] = ("linspace",)
    """Spacings whose times are rounded to timesteps (those of leading and trailing always are timesteps)."""
    spare: bool = False
    """Whether leading and linspace divide the range into n + 1 levels and leave out the lowest."""
    strides: bool = False
    """Whether every leg goes down by T // n, wherever the next leg begins. The model sets where the last leg ends."""
    karras: bool = True
    """Whether karras spacing is possible."""
    starts_bare: tuple[Spacing, ...] = ()
    """Spacings for which the first state is sigma eps; for others it has the variance of x_t."""


def plan(
    schedule: Schedule, grid: Grid, n: int, spacing: Spacing, steps_offset: int = 1, set_alpha_to_one: bool = False
) -> Plan:
    """Return a sampler's n legs, equal to those of its diffusers scheduler made `from_config` of a DDIMScheduler.

    The last leg ends at t = 0; on a grid of betas with strides, it ends at index 0 unless `set_alpha_to_one`. On a
    flow, times aren't rounded, and the first state has the standard deviation of x_t for data of variance 1. Raises
    UserError if n steps don't fit the schedule, or if the spacing doesn't fit the sampler or the path.
    """
    T = schedule.T
    if not 1 <= n <= T:
        raise UserError(f"{n} sampling steps: give 1 to {T}, the model's timesteps")
    if not isinstance(schedule, BetaSchedule):
        levels = [schedule.level(i) for i in _flow_indices(n, T, spacing, steps_offset)]
        return _through([*levels, schedule.level(-1)], math.hypot(levels[0].alpha, levels[0].sigma))
    if spacing == "karras":
        levels = _karras_levels(schedule, grid, n)
    else:
        levels = [schedule.level(i) for i in _indices(n, T, spacing, steps_offset, grid).tolist()]
    if grid.strides:
        # diffusers' DDIM goes down by T // n from every index. With leading, the next leg begins there. With
        # trailing, the two can differ by an index if n doesn't divide T. With linspace, the steps are too short
        # and noise remains in the image. This is kept, so that our images equal diffusers'.
        down, end = T // n, -1 if set_alpha_to_one else 0
        ends = (level.model_time - down if level.model_time >= down else end for level in levels)
        return Plan(tuple(Leg(level, schedule.level(j)) for level, j in zip(levels, ends, strict=True)), 1.0)
    return _through([*levels, schedule.level(-1)], levels[0].sigma if spacing in grid.starts_bare else 1.0)


def _indices(n: int, T: int, spacing: Spacing, steps_offset: int, grid: Grid) -> np.ndarray:
    """Return the n falling indices (n,) that a sampler visits on a grid of T. Raises UserError if they don't fit."""
    divisions = n + 1 if grid.spare else n
    indices: np.ndarray
    match spacing:
        case "leading":
            if n == 1:
                raise UserError("1 step with leading spacing begins and ends next to the data: take trailing")
            indices = (np.arange(divisions) * (T // divisions))[::-1][:n] + steps_offset
        case "trailing":  # the float arange can have one element too many, below index 0
            indices = np.round(np.arange(T, 0, -T / n))[:n] - 1
        case "linspace":
            indices = np.linspace(0, T - 1, divisions)[::-1][:n] if divisions > 1 else np.array([T - 1])
        case "karras":
            raise UserError("karras spacing is one of noise levels, not of timesteps")
        case _:
            assert_never(spacing)
    if spacing in grid.rounded:
        indices = indices.round()
    if indices[0] > T - 1 or indices[-1] < 0 or (np.diff(indices) >= 0).any():
        raise UserError(
            f"{n} steps with {spacing} spacing (steps_offset {steps_offset}) don't fit {T} timesteps: "
            "take fewer steps, or trailing spacing"
        )
    return indices


def _through(levels: list[Level], start_std: float) -> Plan:
    return Plan(tuple(Leg(*ends) for ends in pairwise(levels)), start_std)


def _karras_levels(schedule: BetaSchedule, grid: Grid, n: int) -> list[Level]:
    if not grid.karras:
        raise UserError(
            "karras spacing with a sampler that walks whole timesteps: take another spacing or sampler (euler is ddim's step)"
        )
    if schedule.zero_terminal_snr:
        raise UserError("karras spacing begins at a finite noise level, which zero terminal SNR has not: take trailing")
    most, least = (schedule.level(i).noise ** (1 / _RHO) for i in (schedule.T - 1, 0))
    levels = [schedule.at_noise(float(noise)) for noise in np.linspace(most, least, n) ** _RHO]
    if "karras" in grid.rounded:
        return [replace(level, model_time=round(level.model_time)) for level in levels]
    return levels


def _flow_indices(n: int, T: int, spacing: Spacing, steps_offset: int) -> list[float]:
    if spacing == "karras":
        raise UserError("karras spacing on a flow, whose noise levels reach infinity: take trailing (and a shift)")
    if spacing == "trailing":
        return [T - k * T / n - 1 for k in range(n)]
    return _indices(n, T, spacing, steps_offset, Grid(rounded=())).tolist()
