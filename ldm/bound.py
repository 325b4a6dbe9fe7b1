"""The variational bound on -log p(x0), in bits per dimension: Ho et al. 2020 (arXiv 2006.11239), eq. 5.

    L = KL(q(x_{T-1} | x0) || N(0, I)) + sum_{i > 0} KL(q(x_{i-1} | x_i, x0) || p(x_{i-1} | x_i)) - log p(x0 | x_0)

x_i is the state at index i, and x_0 the state with the least noise; x0 is the data. Latents are real numbers, not 8-bit
integers, so p is a density and the bound may be negative.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Denoised
from ldm.process import Gaussian, Point, VarianceKind, marginal, posterior, reverse_variance, step_variance
from ldm.schedule import Schedule

_NATS_PER_BIT = math.log(2)


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """Return KL(q || p) in bits per dimension, (b,)."""
    q_variance, p_variance = (torch.as_tensor(g.variance, dtype=g.mean.dtype) for g in (q, p))
    kl = ((p_variance / q_variance).log() + (q_variance + (q.mean - p.mean) ** 2) / p_variance - 1) / 2
    return kl.flatten(1).mean(1) / _NATS_PER_BIT


def negative_log_likelihood(x: Tensor, p: Gaussian) -> Tensor:
    """Return -log p(x) in bits per dimension, (b,)."""
    variance = torch.as_tensor(p.variance, dtype=x.dtype)
    nll = ((x - p.mean) ** 2 / variance + (2 * math.pi * variance).log()) / 2
    return nll.flatten(1).mean(1) / _NATS_PER_BIT


def prior_term(x0: Tensor, last: Point) -> Tensor:
    """Return KL(q(x_{T-1} | x0) || N(0, I)), (b,), in bits per dimension.

    It is the information about the data that remains at the last level.
    """
    return gaussian_kl(marginal(x0, last), Gaussian(torch.zeros_like(x0), 1.0))


class Levels(NamedTuple):
    """alpha and sigma of several levels: tables by index (T,), or one level per example (b, 1, 1, 1)."""

    alpha: Tensor
    sigma: Tensor


def levels(schedule: Schedule) -> tuple[Levels, Levels]:
    """Return the levels by index, and for each index the level one below it; below index 0 is the clean end."""
    t = Levels(schedule.alpha, schedule.sigma)
    clean = t.alpha.new_ones(1)
    return t, Levels(torch.cat([clean, t.alpha[:-1]]), torch.cat([0 * clean, t.sigma[:-1]]))


def variances(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest variance of p(x_{i-1} | x_i) by index, each (T,).

    At index 0 the smallest variance would be 0; index 1's is used instead (as in Nichol & Dhariwal 2021's code).
    """
    t, s = levels(schedule)
    large = torch.as_tensor(step_variance(s, t))
    small = large * (s.sigma / t.sigma) ** 2
    return torch.cat([small[1:2], small[1:]]), large


def bound_term(
    x0: Tensor,
    x_t: Tensor,
    denoised: Denoised,
    index: Tensor,
    t: Point,
    s: Point,
    small: Tensor,
    large: Tensor,
    kind: VarianceKind,
) -> Tensor:
    """Return the bound's term at each example's index, (b,), in bits per dimension.

    x0 and x_t are (b, c, h, w), and `denoised` is the denoiser's output for x_t. index is (b,). t is the level at the
    index and s the level below it; small and large are the variances there. All four are (b, 1, 1, 1).
    """
    q = Gaussian(posterior(x_t, x0, t, s).mean, small)
    variance = reverse_variance(kind, small, large, denoised.variance_fraction)
    p = Gaussian(posterior(x_t, denoised.x0, t, s).mean, variance)
    return torch.where(index > 0, gaussian_kl(q, p), negative_log_likelihood(x0, p))
