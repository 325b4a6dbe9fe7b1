"""Objectives of distillation: a student that needs one evaluation per step (guidance), or few steps (consistency).

Guidance: Meng et al. 2023 (arXiv 2210.03142), stage one: the student reads the guidance scale and learns the guided
prediction. Consistency: Song et al. 2023 (arXiv 2303.01469), algorithm 2, in latents and with guidance as in Luo et al.
2023 (arXiv 2310.04378), algorithm 1. Trajectories: the ends of the teacher's trajectories are learned from pure noise,
as in Luhman & Luhman 2021 (arXiv 2101.02388), and here also from the states on the way. On-policy: the student's own
states are learned too, with the teacher's trajectories from there, as in DAgger (Ross et al. 2011, arXiv 1011.0686) and
Imagine Flash (Kohler et al. 2024, arXiv 2405.05224).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from ldm.consistency import boundary, solver_indices
from ldm.denoiser import Denoised, Network
from ldm.parameterization import Target, to_eps, to_x0
from ldm.samplers import make_sampler
from ldm.schedule import Level, Schedule
from ldm.spacing import make_plan
from ldm.timesteps import uniform

Student = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Network that reads its guidance scale: (x_t (b, c, h, w), time (b,), condition (b, …), scale (b,)) → target."""


def guided(teacher: Network, null: Tensor) -> Student:
    """Return the teacher with classifier-free guidance, two evaluations in one batch: what a student should predict.

    null: the null condition, (1, …). The formula is eq. 6 of Ho & Salimans 2022, in the teacher's own target.
    """

    def call(x: Tensor, time: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        both = torch.cat([null.expand_as(condition), condition])
        without, with_caption = teacher(x.repeat(2, 1, 1, 1), time.repeat(2), both).chunk(2)
        return torch.lerp(without, with_caption, _column(scale).to(without))

    return call


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of distillation."""

    student: Student
    average: Student
    """The student with averaged weights."""
    teacher: Student
    """The guided teacher."""


NetworksOf = Callable[[Tensor | None], Networks]
"""Function that returns the networks for examples with this context, (b, k, h, w); None: the networks have none."""


@dataclass(frozen=True, slots=True)
class Examples:
    """A batch of examples."""

    x0: Tensor
    """Latents, (b, c, h, w)."""
    u: Tensor
    """Random numbers that determine the levels, (b,), uniform in [0, 1)."""
    noise: Tensor
    """Noise, (b, c, h, w)."""
    condition: Tensor
    """Text features, (b, …)."""
    scale: Tensor
    """Guidance scales, (b,)."""
    context: Tensor | None = None
    """Context channels, (b, k, h, w), for networks that inpaint."""
    renoise: Tensor | None = None
    """Noise for the student's own states, (b, c, h, w)."""

    def select(self, places: Tensor) -> Self:
        """Return some of the examples."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        chosen: dict[str, Any] = {name: None if part is None else part[places] for name, part in parts.items()}
        return replace(self, **chosen)


@dataclass(frozen=True, slots=True)
class DistillationLosses:
    """The losses of a batch, one number per example, (b,). Training minimises `weighted.mean()`."""

    weighted: Tensor
    """The objective."""
    unweighted: Tensor
    """Squared error."""
    ends: Tensor | None = None
    """The student's predictions of clean latents from all states, (n, c, h, w), if it predicts them; with gradients."""


@dataclass(frozen=True)
class _Path:
    """A schedule's coefficients, cached for each device."""

    schedule: Schedule
    _cache: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def at(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return alpha and sigma (b, 1, 1, 1) and the network's times (b,); index -1 is t = 0, with time 0."""
        key = like.device, like.dtype
        if key not in self._cache:
            table = torch.stack([self.schedule.alpha, self.schedule.sigma]).to(*key)
            times = self.schedule.model_times
            times = times.float() if times.is_floating_point() else times
            clean = table.new_tensor([[1.0], [0.0]])
            self._cache[key] = torch.cat([clean, table], 1), torch.cat([times[:1] * 0, times]).to(like.device)
        table, times = self._cache[key]
        alpha, sigma = table[:, index + 1]
        return _column(alpha), _column(sigma), times[index + 1]


class GuidanceDistillation:
    """The squared error of the student's prediction from the teacher's guided one, at all levels.

    With `weighted`, it is multiplied by max(sigma / alpha, 1) and divided by the mean of this over all levels, because
    errors of a prediction of eps change the images more at high noise. Salimans & Ho 2022 (arXiv 2202.00512, section 4)
    and Meng et al. weight by its square, the truncated SNR.
    """

    def __init__(self, schedule: Schedule, *, weighted: bool = False) -> None:
        self.T, self.path = schedule.T, _Path(schedule)
        noise = (schedule.sigma / schedule.alpha).double().clamp(min=1)
        self.mean_weight = noise.mean().item() if weighted else None

    def __call__(self, networks_of: NetworksOf, batch: Examples) -> DistillationLosses:
        """Return the losses of the examples. The average isn't used."""
        x0, networks = batch.x0, networks_of(batch.context)
        alpha, sigma, time = self.path.at(uniform(batch.u.to(x0.device), self.T).index, x0)
        x_t = alpha * x0 + sigma * batch.noise
        with torch.no_grad():
            expected = networks.teacher(x_t, time, batch.condition, batch.scale).to(x0.dtype)
        output = networks.student(x_t, time, batch.condition, batch.scale).to(x0.dtype)
        error = ((output - expected) ** 2).flatten(1).mean(1)
        if self.mean_weight is None:
            return DistillationLosses(error, error)
        return DistillationLosses((sigma / alpha).flatten().clamp(min=1) / self.mean_weight * error, error)


@dataclass(frozen=True)
class _Jump:
    """A consistency model's jump from a state to the end of its trajectory, and the distance of two ends."""

    target: Target
    path: _Path
    huber: float
    """Constant c of the pseudo-Huber distance of each element, sqrt(d^2 + c^2) - c (Song & Dhariwal 2023, arXiv
    2310.14189), as in Luo et al."""

    def __call__(self, student: Student, x: Tensor, index: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        """Return f(x, t) for states (b, c, h, w) at indices (b,)."""
        alpha, sigma, time = self.path.at(index, x)
        skip, out = boundary(_column(index.to(x)))
        output = student(x, time, condition, scale).to(x.dtype)
        return skip * x + out * to_x0(self.target, output, x, alpha, sigma)

    def distance(self, d: Tensor) -> Tensor:
        """Return the distance of each example, (b,), from the difference of two ends (b, c, h, w)."""
        return ((d**2 + self.huber**2).sqrt() - self.huber).flatten(1).mean(1)


class ConsistencyDistillation:
    """The distance between the student's f at both ends of a step of the teacher's ODE, which DDIM solves.

    A step starts at one of the solver's levels, and ends at the next lower one; the lowest ends at t = 0, where f is
    the state itself. The averaged student evaluates f at the step's end.
    """

    def __init__(self, schedule: Schedule, target: Target, solver_steps: int, huber: float) -> None:
        """huber: the constant of the distance. Raises UserError if the steps don't fit the schedule."""
        self.target, self.path = target, _Path(schedule)
        self.jump = _Jump(target, self.path, huber)
        self.indices = torch.tensor([-1, *solver_indices(schedule.T, solver_steps)])

    def __call__(self, networks_of: NetworksOf, batch: Examples) -> DistillationLosses:
        """Return the losses of the examples."""
        x0, given, networks = batch.x0, (batch.condition, batch.scale), networks_of(batch.context)
        self.indices = self.indices.to(x0.device)
        place = 1 + uniform(batch.u.to(x0.device), len(self.indices) - 1).index
        start, end = self.indices[place], self.indices[place - 1]
        alpha, sigma, time = self.path.at(start, x0)
        x_t = alpha * x0 + sigma * batch.noise
        with torch.no_grad():
            output = networks.teacher(x_t, time, *given).to(x0.dtype)
            end_alpha, end_sigma, _ = self.path.at(end, x0)
            x_s = end_alpha * to_x0(self.target, output, x_t, alpha, sigma)
            x_s = x_s + end_sigma * to_eps(self.target, output, x_t, alpha, sigma)
            there = torch.where(_column(end) < 0, x_s, self.jump(networks.average, x_s, end.clamp(min=0), *given))
        here = self.jump(networks.student, x_t, start, *given)
        d = here - there
        return DistillationLosses(self.jump.distance(d), (d.detach() ** 2).flatten(1).mean(1), here)


class TrajectoryDistillation:
    """The distance between the student's f at some levels of a trajectory of the teacher, and the trajectory's end.

    The trajectory starts from the example's noise, and DPM-Solver++ 2M solves it at the levels of sampler lcm. Each
    example trains the levels at which lcm with fewer steps evaluates the network. The latents aren't used.

    For a network that predicts eps, the distance is weighted by sqrt(alpha / sigma): an error in eps is sigma / alpha
    times as large in x̂0, so the highest levels would otherwise dominate.

    A share `on_policy` of the examples start where `lcm` with two steps gets instead: at the averaged student's
    prediction from pure noise, with new noise of the middle level. There the student learns what the teacher makes of
    its errors.
    """

    def __init__(
        self,
        schedule: Schedule,
        target: Target,
        solver_steps: int,
        huber: float,
        steps: int,
        levels: int,
        on_policy: float = 0.0,
    ) -> None:
        """steps: steps of the trajectory. levels: steps of lcm at whose levels the student is trained; divides `steps`,
        and is even with `on_policy`.

        Raises UserError if the steps don't fit the schedule.
        """
        self.target, self.schedule, self.stride, self.on_policy = target, schedule, steps // levels, on_policy
        self.jump = _Jump(target, _Path(schedule), huber)
        self.plan = make_plan(schedule, make_sampler("lcm").grid, steps, "trailing", solver_steps=solver_steps)
        self.sampler = make_sampler("dpmpp_2m")
        self.levels = levels * (1 - on_policy) + levels / 2 * on_policy  # mean number of an example

    def __call__(self, networks_of: NetworksOf, batch: Examples) -> DistillationLosses:
        """Return the losses of the examples: sums over their levels, over the mean number of levels."""
        own, middle = batch.u.to(batch.noise.device) < self.on_policy, len(self.plan.pairs) // 2
        found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for place, first in ((~own).nonzero().flatten(), 0), (own.nonzero().flatten(), middle):
            if len(place):
                part = batch.select(place)
                networks = networks_of(part.context)
                start = self.plan.start(part.noise) if first == 0 else self._reached(networks, part, first)
                states, end = self.trajectory(networks.teacher, part, start, first)
                levels = [pair.now.model_time for pair in self.plan.pairs[first :: self.stride]]
                learned = zip(levels, states[:: self.stride], strict=True)
                found += [(place, torch.full_like(place, level), state, end) for level, state in learned]
        place, index, x, end = (torch.cat(parts) for parts in zip(*found, strict=True))  # of each state
        chosen = batch.select(place)
        ends = self.jump(networks_of(chosen.context).student, x, index, chosen.condition, chosen.scale)
        d = ends - end
        distance, squared = self.jump.distance(d), (d.detach() ** 2).flatten(1).mean(1)
        if self.target == "eps":
            alpha, sigma, _ = self.jump.path.at(index, x)
            distance = (alpha / sigma).sqrt().flatten() * distance
        weighted, unweighted = (
            distance.new_zeros(len(own)).index_add(0, place, v) / self.levels for v in (distance, squared)
        )
        return DistillationLosses(weighted, unweighted, ends)

    @torch.no_grad()
    def trajectory(
        self, teacher: Student, batch: Examples, start: Tensor, first: int = 0
    ) -> tuple[list[Tensor], Tensor]:
        """Return the states at the plan's levels, from `start` at level `first`, and the end; all are (b, c, h, w)."""

        def denoise(x: Tensor, level: Level) -> Denoised:
            time = torch.full((len(x),), level.model_time, device=x.device)
            output = teacher(x, time, batch.condition, batch.scale).to(x.dtype)
            return Denoised(to_x0(self.target, output, x, level.alpha, level.sigma))

        states, step = [start], self.sampler.step(self.schedule)
        for now, next in self.plan.pairs[first:]:
            states.append(step(denoise, states[-1], now, next, _no_noise))
        return states[:-1], states[-1]

    @torch.no_grad()
    def _reached(self, networks: Networks, batch: Examples, place: int) -> Tensor:
        """Return the state that the averaged student reaches in one step of lcm from pure noise to a level."""
        assert batch.renoise is not None
        top, level = self.plan.pairs[0].now, self.plan.pairs[place].now
        index = torch.full((len(batch.noise),), top.model_time, device=batch.noise.device)
        start = self.plan.start(batch.noise)
        end = self.jump(networks.average, start, index, batch.condition, batch.scale)
        return level.alpha * end + level.sigma * batch.renoise


Objective = GuidanceDistillation | ConsistencyDistillation | TrajectoryDistillation
"""A loss (networks of a context, examples) → losses of the examples."""


def _no_noise() -> Tensor:
    raise AssertionError("the solver is deterministic")


def _column(values: Tensor) -> Tensor:
    """Return values (b,) as (b, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
