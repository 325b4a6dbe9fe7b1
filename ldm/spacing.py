"""The noise levels that a sampler visits, from noise to data. They equal those of diffusers' schedulers.

leading, trailing, linspace: Lin et al. 2024 (arXiv 2305.08891), table 2; karras: Karras et al. 2022 (arXiv 2206.00364),
eq. 5 with rho 7, from the schedule's highest noise level to its lowest.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple, assert_never

import numpy as np
from torch import Tensor

from ldm.consistency import SOLVER_STEPS, solver_indices
from ldm.errors import UserError
from ldm.kinds import Spacing
from ldm.schedule import BetaSchedule, Level, Schedule

_RHO = 7


class LevelPair(NamedTuple):
    """The two levels of one step: it evaluates the network at `now` and leads to `next`."""

    now: Level
    next: Level


@dataclass(frozen=True, slots=True)
class Plan:
    """The levels of all steps from noise to data, and the standard deviation of the first state.

    Image to image takes only the steps `pairs[k:]`, and starts from alpha x0 + sigma eps at the level `pairs[k].now`.
    """

    pairs: tuple[LevelPair, ...]
    start_std: float

    def start(self, noise: Tensor) -> Tensor:
        """Return the first state, computed from standard normal noise."""
        return self.start_std * noise


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rules for a sampler's levels on a beta schedule and for its first state, as in its diffusers scheduler."""

    rounded: tuple[Spacing, ...] = ("linspace",)
    """Spacings whose times are rounded to timesteps. The times of leading and trailing always are timesteps."""
    extra_level: bool = False
    """Whether leading and linspace divide the range into n + 1 levels and leave out the lowest."""
    fixed_stride: bool = False
    """Whether every step ends T // n below its start, even if the next step starts at another level."""
    consistency: bool = False
    """Whether the levels are those of a consistency model's solver, with every spacing."""
    karras: bool = True
    """Whether karras spacing is possible."""
    starts_at_sigma: tuple[Spacing, ...] = ()
    """Spacings for which the first state is sigma eps; for the others it is eps, which has the variance of x_t."""


@lru_cache(maxsize=64)  # a plan takes milliseconds, as long as a step of a small network
def make_plan(
    schedule: Schedule,
    grid: Grid,
    n: int,
    spacing: Spacing,
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
    solver_steps: int = SOLVER_STEPS,
) -> Plan:
    """Return the plan of a sampler's n steps. It equals that of its diffusers scheduler, made by `from_config`.

    The last step ends at t = 0; on a beta schedule with `fixed_stride`, it ends at index 0 unless `set_alpha_to_one`.
    solver_steps: number of levels from which a grid for consistency models takes its n levels.
    On a flow, times aren't rounded, and the first state has the standard deviation of x_t for data of variance 1.
    Raises UserError if n steps don't fit the schedule, or if the spacing doesn't fit the sampler or the path.
    """
    T = schedule.T
    if not 1 <= n <= T:
        raise UserError(f"{n} sampling steps: must be 1 to {T}, the model's number of timesteps")
    if grid.consistency:
        return _consecutive([*_consistency_levels(schedule, n, solver_steps), schedule.level(-1)], 1.0)
    if not isinstance(schedule, BetaSchedule):
        levels = [schedule.level(i) for i in _flow_indices(n, T, spacing, steps_offset)]
        return _consecutive([*levels, schedule.level(-1)], math.hypot(levels[0].alpha, levels[0].sigma))
    if spacing == "karras":
        levels = _karras_levels(schedule, grid, n)
    else:
        levels = [schedule.level(i) for i in _indices(n, T, spacing, steps_offset, grid).tolist()]
    if grid.fixed_stride:
        # A step of diffusers' DDIM ends T // n below its start. With leading, the next step starts there. With
        # trailing, the two can differ by one index if n doesn't divide T. With linspace, the steps are too short
        # and noise remains in the image. We do the same, so that our images equal diffusers'.
        stride, end = T // n, -1 if set_alpha_to_one else 0
        ends = (level.model_time - stride if level.model_time >= stride else end for level in levels)
        return Plan(tuple(LevelPair(level, schedule.level(j)) for level, j in zip(levels, ends, strict=True)), 1.0)
    return _consecutive([*levels, schedule.level(-1)], levels[0].sigma if spacing in grid.starts_at_sigma else 1.0)


def _indices(n: int, T: int, spacing: Spacing, steps_offset: int, grid: Grid) -> np.ndarray:
    """Return the n decreasing indices (n,) at which steps start, out of T. Raises UserError if they don't fit."""
    divisions = n + 1 if grid.extra_level else n
    indices: np.ndarray
    match spacing:
        case "leading":
            if n == 1:
                raise UserError(
                    "1 step with leading spacing would start at almost no noise: choose trailing, or more steps"
                )
            indices = (np.arange(divisions) * (T // divisions))[::-1][:n] + steps_offset
        case "trailing":  # a float arange can have one element too many, below index 0
            indices = np.round(np.arange(T, 0, -T / n))[:n] - 1
        case "linspace":
            indices = np.linspace(0, T - 1, divisions)[::-1][:n] if divisions > 1 else np.array([T - 1])
        case "karras":
            raise UserError("karras spacing: it spaces noise levels, not timesteps; choose another spacing")
        case _:
            assert_never(spacing)
    if spacing in grid.rounded:
        indices = indices.round()
    if indices[0] > T - 1 or indices[-1] < 0 or (np.diff(indices) >= 0).any():
        raise UserError(
            f"{n} steps with {spacing} spacing (steps_offset {steps_offset}) don't fit {T} timesteps: "
            "choose fewer steps, or trailing spacing"
        )
    return indices


def _consecutive(levels: list[Level], start_std: float) -> Plan:
    """Return a plan in which every step starts where the one before it ends."""
    return Plan(tuple(LevelPair(*ends) for ends in pairwise(levels)), start_std)


def _karras_levels(schedule: BetaSchedule, grid: Grid, n: int) -> list[Level]:
    if not grid.karras:
        raise UserError(
            "karras spacing: can't be used with a sampler that needs whole timesteps, such as ddim; choose another "
            "spacing, or euler, which takes the same steps as ddim"
        )
    if schedule.zero_terminal_snr:
        raise UserError(
            "karras spacing: needs a finite highest noise level, but this model's is infinite (zero terminal SNR); "
            "choose trailing"
        )
    highest, lowest = (schedule.level(i).noise ** (1 / _RHO) for i in (schedule.T - 1, 0))
    levels = [schedule.at_noise(float(noise)) for noise in np.linspace(highest, lowest, n) ** _RHO]
    if "karras" in grid.rounded:
        return [replace(level, model_time=round(level.model_time)) for level in levels]
    return levels


def _consistency_levels(schedule: Schedule, n: int, solver_steps: int) -> list[Level]:
    """Return n of the solver's levels, about evenly spaced and with the highest, as LCMScheduler does."""
    if not isinstance(schedule, BetaSchedule):
        raise UserError("sampler lcm: needs a beta schedule, but this model's is a flow; choose another sampler")
    indices = solver_indices(schedule.T, solver_steps)[::-1]
    if n > solver_steps:
        raise UserError(f"{n} steps of sampler lcm: this model has {solver_steps} levels for it; choose fewer steps")
    return [schedule.level(indices[k * solver_steps // n]) for k in range(n)]


def _flow_indices(n: int, T: int, spacing: Spacing, steps_offset: int) -> list[float]:
    if spacing == "karras":
        raise UserError("karras spacing: needs a finite highest noise level, but a flow's is infinite; choose trailing")
    if spacing == "trailing":
        return [T - k * T / n - 1 for k in range(n)]
    return _indices(n, T, spacing, steps_offset, Grid(rounded=())).tolist()
