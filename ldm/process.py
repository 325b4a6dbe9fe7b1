"""The forward process and its reverse, between any two levels of any path x_t = alpha x0 + sigma eps.

Discrete: Ho et al. 2020 (arXiv 2006.11239), eq. 2, 4, 6 and 7, in the form of Kingma et al. 2021 (arXiv 2107.00630),
appendix A, which needs no betas. Continuous: Song et al. 2021 (arXiv 2011.13456), eq. 5, 6 and 13. Below, s is the
level with less noise and t the level with more.

alpha and sigma of a point are Python floats, or tensors that broadcast against the images.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, assert_never

import torch
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.float64 import double
from ldm.kinds import VarianceKind
from ldm.parameterization import Number
from ldm.schedule import Level, Schedule

MIN_VARIANCE = 1e-20  # keeps the logarithm finite if s is the clean end


class Point(Protocol):
    """alpha and sigma of a level: a `Level`, or values for each example of a batch."""

    @property
    def alpha(self) -> Number: ...
    @property
    def sigma(self) -> Number: ...


class Gaussian(NamedTuple):
    """N(mean, variance I): mean (b, c, h, w), variance a number or (b, 1, 1, 1)."""

    mean: Tensor
    variance: Number


def marginal(x0: Tensor, t: Point) -> Gaussian:
    """Return q(x_t | x0), Ho et al. 2020, eq. 4."""
    return Gaussian(t.alpha * x0, t.sigma**2)


def transition(x_s: Tensor, s: Point, t: Point) -> Gaussian:
    """Return q(x_t | x_s): Ho et al. 2020, eq. 2, where t is the index after s."""
    return Gaussian(t.alpha / s.alpha * x_s, step_variance(s, t))


def step_variance(s: Point, t: Point) -> Number:
    """Return the variance of q(x_t | x_s), which is beta_t between neighbouring indices."""
    return t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2


def posterior(x_t: Tensor, x0: Tensor, t: Point, s: Point) -> Gaussian:
    """Return q(x_s | x_t, x0), Ho et al. 2020, eq. 6 and 7."""
    ratio, added = (s.sigma / t.sigma) ** 2, step_variance(s, t)
    mean = (t.alpha / s.alpha * ratio) * x_t + (s.alpha * added / t.sigma**2) * x0
    return Gaussian(mean, ratio * added)


def reverse_variance(kind: VarianceKind, small: Number, large: Number, fraction: Tensor | None = None) -> Number:
    """Return the variance of the model's p(x_s | x_t): `small`, `large`, or a learned value between them.

    `small` is the posterior's variance and `large` the forward step's. On a variance-preserving path, `small` is
    optimal for data at a single point and `large` for data from N(0, 1) (Ho et al. 2020, section 3.2). A learned
    variance is interpolated between their logarithms by the network's `fraction`, 0 to 1 (Nichol & Dhariwal 2021, arXiv
    2102.09672, eq. 15). On a flow, near the data, the optimum may be larger than both.
    """
    match kind:
        case "fixed_small":
            return small
        case "fixed_large":
            return large
        case "learned":
            assert fraction is not None, "variance learned needs a network that predicts the variance"
            logs = (torch.as_tensor(v, dtype=fraction.dtype).clamp(min=MIN_VARIANCE).log() for v in (small, large))
            log_small, log_large = logs
            return (fraction * log_large + (1 - fraction) * log_small).exp()
        case _:
            assert_never(kind)


def score(x_t: Tensor, x0: Tensor, t: Point) -> Tensor:
    """Return the gradient of log p(x_t) with respect to x_t, -eps / sigma, from a denoiser's x0 (Tweedie's formula)."""
    return (t.alpha * x0 - x_t) / t.sigma**2


def drift_and_diffusion(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return f and g^2 of the SDE dx = f(t) x dt + g(t) dw that has the schedule's marginals, each of t's shape.

    f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2, from the equations of the moments. On a
    variance-preserving path f = -g^2 / 2, which is the VP-SDE of Song et al. 2021, eq. 11, with beta(t) = g^2.
    """
    with torch.enable_grad():
        t = double(t.detach()).requires_grad_()
        alpha, sigma = schedule(t)
        (d_alpha,) = torch.autograd.grad(alpha.sum(), t, retain_graph=True)
        (d_noise,) = torch.autograd.grad((sigma / alpha).sum(), t)
    return (d_alpha / alpha).detach(), (2 * sigma * alpha * d_noise).detach()


def probability_flow(denoise: Denoise, schedule: Schedule) -> Callable[[Tensor, float], Tensor]:
    """Return dx / dt of the ODE with the SDE's marginals, as a function of x (b, c, h, w) and t in (0, 1).

    Song et al. 2021, eq. 13.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        level: Level = schedule.level(t * schedule.T - 1)
        f, g2 = (v.item() for v in drift_and_diffusion(schedule, torch.tensor(t, dtype=torch.float64)))
        return f * x - g2 / 2 * score(x, denoise(x, level).x0, level)

    return velocity
