"""Objectives of distillation: a student that needs one evaluation per step (guidance), or few steps (consistency).

Guidance: Meng et al. 2023 (arXiv 2210.03142), stage one: the student reads the guidance scale and learns the guided
prediction. Consistency: Song et al. 2023 (arXiv 2303.01469), algorithm 2, in latents and with guidance as in Luo et al.
2023 (arXiv 2310.04378), algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.consistency import boundary, solver_indices
from ldm.denoiser import Network
from ldm.parameterization import Target, to_eps, to_x0
from ldm.schedule import Schedule
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
class DistillationLosses:
    """The losses of a batch, one number per example, (b,). Training minimises `weighted.mean()`."""

    weighted: Tensor
    """The objective."""
    unweighted: Tensor
    """Squared error."""


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
    """The squared error of the student's prediction from the teacher's guided one, at all levels."""

    def __init__(self, schedule: Schedule) -> None:
        self.T, self.path = schedule.T, _Path(schedule)

    def __call__(
        self,
        student: Student,
        average: Student,
        teacher: Student,
        x0: Tensor,
        u: Tensor,
        noise: Tensor,
        condition: Tensor,
        scale: Tensor,
    ) -> DistillationLosses:
        """Return the losses of latents and noise (b, c, h, w), u (b,) in [0, 1), and guidance scales (b,).

        average: not used.
        """
        alpha, sigma, time = self.path.at(uniform(u.to(x0.device), self.T).index, x0)
        x_t = alpha * x0 + sigma * noise
        with torch.no_grad():
            expected = teacher(x_t, time, condition, scale).to(x0.dtype)
        error = ((student(x_t, time, condition, scale).to(x0.dtype) - expected) ** 2).flatten(1).mean(1)
        return DistillationLosses(error, error)


class ConsistencyDistillation:
    """The distance between the student's f at both ends of a step of the teacher's ODE, which DDIM solves.

    A step starts at one of the solver's levels, and ends at the next lower one; the lowest ends at t = 0, where f is
    the state itself. The distance is pseudo-Huber, sqrt(d^2 + c^2) - c (Song & Dhariwal 2023, arXiv 2310.14189), of
    each element, as in Luo et al.
    """

    def __init__(self, schedule: Schedule, target: Target, solver_steps: int, huber: float) -> None:
        """huber: the constant c. Raises UserError if the steps don't fit the schedule."""
        self.target, self.huber, self.path = target, huber, _Path(schedule)
        self.indices = torch.tensor([-1, *solver_indices(schedule.T, solver_steps)])

    def __call__(
        self,
        student: Student,
        average: Student,
        teacher: Student,
        x0: Tensor,
        u: Tensor,
        noise: Tensor,
        condition: Tensor,
        scale: Tensor,
    ) -> DistillationLosses:
        """Return the losses of latents and noise (b, c, h, w), u (b,) in [0, 1), and guidance scales (b,).

        average: the student with averaged weights, which evaluates f at the step's end.
        """
        self.indices = self.indices.to(x0.device)
        place = 1 + uniform(u.to(x0.device), len(self.indices) - 1).index
        start, end = self.indices[place], self.indices[place - 1]
        alpha, sigma, time = self.path.at(start, x0)
        x_t = alpha * x0 + sigma * noise
        with torch.no_grad():
            output = teacher(x_t, time, condition, scale).to(x0.dtype)
            end_alpha, end_sigma, _ = self.path.at(end, x0)
            x_s = end_alpha * to_x0(self.target, output, x_t, alpha, sigma)
            x_s = x_s + end_sigma * to_eps(self.target, output, x_t, alpha, sigma)
            there = torch.where(_column(end) < 0, x_s, self._f(average, x_s, end.clamp(min=0), condition, scale))
        distance = self._f(student, x_t, start, condition, scale) - there
        losses = (distance**2 + self.huber**2).sqrt() - self.huber
        return DistillationLosses(losses.flatten(1).mean(1), (distance.detach() ** 2).flatten(1).mean(1))

    def _f(self, student: Student, x: Tensor, index: Tensor, condition: Tensor, scale: Tensor) -> Tensor:
        alpha, sigma, time = self.path.at(index, x)
        skip, out = boundary(_column(index.to(x)))
        output = student(x, time, condition, scale).to(x.dtype)
        return skip * x + out * to_x0(self.target, output, x, alpha, sigma)


def _column(values: Tensor) -> Tensor:
    """Return values (b,) as (b, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
