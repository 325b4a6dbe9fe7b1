"""Kernel distances between two sets of features: KID and CMMD, both squared maximum mean discrepancies.

MMD² = E k(x, x′) + E k(y, y′) − 2 E k(x, y)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from train.evaluation.neighbours import BLOCK, squared_distances

_SUBSETS = 100
_SUBSET_SIZE = 1000
_SIGMA, _SCALE = 10.0, 1000.0  # of CMMD


def kid(real: Tensor, made: Tensor, *, subsets: int = _SUBSETS, size: int = 0, seed: int = 0) -> tuple[float, float]:
    """Return the KID (Bińkowski et al. 2018, arXiv 1801.01401) of features (n, d) and (m, d), and its spread.

    The kernel is (x·y / d + 1)³. The value is the mean of the unbiased estimate over random subsets of `size` images;
    the spread is their standard deviation. size: 0 for 1,000 or, with fewer images, half of them.
    """
    n = min(len(real), len(made))
    size = size or min(_SUBSET_SIZE, n // 2)
    if not 2 <= size <= n:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x, y = (f[torch.randperm(len(f), generator=generator)[:size]] for f in (real, made))
        found.append(_unbiased(x, y))
    estimates = torch.stack(found)
    return float(estimates.mean()), float(estimates.std(correction=0))


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of MMD² with the polynomial kernel, for as many x as y, float64."""
    n = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ b.T).double() / a.shape[1] + 1) ** 3

    xx, yy = kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
    return within - 2 * kernel(x, y).mean()


def cmmd(real: Tensor, made: Tensor) -> float:
    """Return CMMD (Jayasumana et al. 2024, arXiv 2401.09603) of CLIP features (n, d) and (m, d).

    It is 1,000 MMD² with the kernel exp(−‖x − y‖² / (2 · 10²)) of features of unit length. As in its authors' code,
    each image is also compared with itself. This adds about 1,000 (1 − E k) (1/n + 1/m), so only values of equal
    numbers of images can be compared.
    """
    x, y = (torch.nn.functional.normalize(f.float(), dim=1) for f in (real, made))

    def mean(a: Tensor, b: Tensor) -> float:
        """Return E k − 1, which keeps the digits of kernels near 1."""
        total = sum(float(torch.expm1(d.double() / (-2 * _SIGMA**2)).sum()) for d in _blocks(a, b))
        return total / (len(a) * len(b))

    return _SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def _blocks(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    yield from (squared_distances(rows, b) for rows in a.split(BLOCK))
