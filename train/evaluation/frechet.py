"""The Fréchet distance of features (Heusel et al. 2017, arXiv 1706.08500), also extrapolated to infinitely many images.

The distance of n images is too large by about c / n, where c depends on the model (Chong & Forsyth 2020, arXiv
1911.07023). So values of different numbers of images can't be compared, unless they are extrapolated to 1 / n = 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.errors import UserError
from ldm.float64 import double, float64_device

Reduce = Callable[[Tensor], Tensor]
_BLOCKS = 10


class FrechetSums:
    """Count, sum and outer products of features f, kept as one matrix: `Σ [1, f][1, f]ᵀ`, (1 + d, 1 + d)."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(1 + dim, 1 + dim, dtype=torch.float64, device=float64_device(device))

    def add(self, features: Tensor) -> None:
        """Add features (n, d)."""
        rows = F.pad(double(features).to(self.sums.device), (1, 0), value=1.0)
        self.sums += rows.T @ rows

    def reduce(self, reduce: Reduce) -> None:
        self.sums = reduce(self.sums)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Return the features' mean (d,) and unbiased covariance (d, d). Raises UserError for fewer than two images.

        The subtraction Σ f fᵀ − n μ μᵀ loses digits. float64 has enough of them if the mean is below 10⁵ standard
        deviations.
        """
        n = self.sums[0, 0]
        if n < 2:
            raise UserError(f"a Fréchet distance needs at least 2 images, but there are {int(n)}: give more images")
        mean = self.sums[0, 1:] / n
        return mean, (self.sums[1:, 1:] - n * torch.outer(mean, mean)) / (n - 1)


def frechet(a: FrechetSums, b: FrechetSums) -> float:
    """Return the squared Fréchet distance of two Gaussians: ‖μ₁ − μ₂‖² + tr(S₁ + S₂ − 2 (S₁ S₂)^½).

    tr (S₁ S₂)^½ is computed as the sum of the singular values of S₁^½ S₂^½. A root of the product would magnify
    rounding errors if a covariance doesn't have full rank (fewer images than features). Returns nan if a feature isn't
    finite.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.gaussian(), b.gaussian()
    if not (cov_a + cov_b).isfinite().all():
        return math.nan
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance (d, d)."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet_distances(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Return the Fréchet distance of features (n, d) and (m, d), its extrapolation, and the extrapolation's error.

    The jackknife extrapolates along the line in 1 / n: with each of g blocks of both sides left out in turn, distances
    F₋ⱼ of (1 − 1 / g) n images have their mean on that line, so g F − (g − 1) mean F₋ⱼ is its value at 1 / n = 0. The
    spread of F₋ⱼ gives the standard error. The line is a good approximation for n of a few times d. The last two are
    nan if there are fewer than two images in a block.
    """
    parts_a, parts_b = _parts(a), _parts(b)
    whole = frechet(_total(parts_a), _total(parts_b))
    if min(len(a), len(b)) < 2 * _BLOCKS:
        return whole, math.nan, math.nan
    g = _BLOCKS
    left = torch.tensor(
        [frechet(_total(parts_a[:j] + parts_a[j + 1 :]), _total(parts_b[:j] + parts_b[j + 1 :])) for j in range(g)],
        dtype=torch.float64,
    )
    mean = float(left.mean())
    error = math.sqrt((g - 1) / g * float((left - mean).square().sum()))
    return whole, g * whole - (g - 1) * mean, error


def _parts(features: Tensor) -> list[FrechetSums]:
    """Return the sums of blocks of features; block j has images j, j + g, …"""
    parts = []
    for j in range(_BLOCKS):
        part = FrechetSums(features.shape[1])
        part.add(features[j::_BLOCKS].cpu())
        parts.append(part)
    return parts


def _total(parts: Sequence[FrechetSums]) -> FrechetSums:
    total = FrechetSums(parts[0].sums.shape[0] - 1)
    total.sums = torch.stack([part.sums for part in parts]).sum(0)
    return total
