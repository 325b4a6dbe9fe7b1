"""Nearest neighbours in feature space, in blocks: precision, recall, density, coverage, and the nearest image."""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 512  # rows of a distance matrix that are computed at once


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return ‖a − b‖² for all rows of a (n, d) and b (m, d), as (n, m), not negative.

    In float32 the error is about 10⁻⁷ of the largest ‖a‖² and ‖b‖², so subtract a common mean first.
    """
    products = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return products.add_(a.square().sum(1, keepdim=True)).clamp_min_(0)


class Manifold(NamedTuple):
    """Agreement of two sets of features, by balls that reach to the k-th nearest neighbour in the same set."""

    precision: float
    """Share of generated images in a ball of a real image."""
    recall: float
    """Share of real images in a ball of a generated image."""
    density: float
    """Average number of real images' balls that contain a generated image, divided by k; 1 if the sets agree."""
    coverage: float
    """Share of real images whose ball contains a generated image."""


def manifold(real: Tensor, made: Tensor, *, k: int = 3, k_coverage: int = 5) -> Manifold:
    """Return precision and recall with k neighbours, density and coverage with k_coverage neighbours.

    Features are (n, d) and (m, d). Precision and recall: Kynkäänniemi et al. 2019, arXiv 1904.06991, k = 3. Density and
    coverage: Naeem et al. 2020, arXiv 2002.09797, k = 5. With too few images, k is their number minus one.
    """
    centre = real.mean(0)
    real, made = real - centre, made - centre
    radii = _radii(real, (k, k_coverage))  # (2, n)
    made_radii = _radii(made, (k,))[0]  # (m,)
    precise, balls = 0, 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    nearest = torch.full((len(real),), torch.inf, device=real.device)
    for rows, rows_radii in zip(made.split(BLOCK), made_radii.split(BLOCK), strict=True):
        d = squared_distances(rows, real)  # (block, n)
        precise += int((d <= radii[0]).any(1).sum())
        balls += int((d <= radii[1]).sum())
        recalled |= (d <= rows_radii[:, None]).any(0)
        nearest = torch.minimum(nearest, d.amin(0))
    return Manifold(
        precision=precise / len(made),
        recall=float(recalled.double().mean()),
        density=balls / (min(k_coverage, len(real) - 1) * len(made)),
        coverage=float((nearest <= radii[1]).double().mean()),
    )


def _radii(x: Tensor, ks: tuple[int, ...]) -> Tensor:
    """Return the squared distance of each row of x (n, d) to its k-th nearest other row, for each k, (len(ks), n)."""
    ks = tuple(min(k, len(x) - 1) for k in ks)
    found = []
    for first, rows in zip(range(0, len(x), BLOCK), x.split(BLOCK), strict=True):
        d = squared_distances(rows, x)
        d[torch.arange(len(rows)), torch.arange(first, first + len(rows))] = torch.inf
        found.append(d.topk(max(ks), dim=1, largest=False).values[:, [k - 1 for k in ks]])
    return torch.cat(found).T


class NearestSearch:
    """Search of the nearest of many images, given in blocks, for each query (n, d)."""

    def __init__(self, queries: Tensor) -> None:
        self.centre = queries.mean(0)
        self.queries = queries - self.centre
        self.squared = torch.full((len(queries),), torch.inf, device=queries.device)
        self.index = torch.full((len(queries),), -1, device=queries.device)

    def add(self, features: Tensor, indices: Tensor) -> None:
        """Compare the queries with a block of features (b, d) of images with these indices (b,)."""
        features = features - self.centre
        for first, rows in zip(range(0, len(self.queries), BLOCK), self.queries.split(BLOCK), strict=True):
            part = slice(first, first + len(rows))
            best, column = squared_distances(rows, features).min(1)
            nearer = best < self.squared[part]
            self.squared[part] = torch.where(nearer, best, self.squared[part])
            self.index[part] = torch.where(nearer, indices[column], self.index[part])

    @property
    def distance(self) -> Tensor:
        """Distance to the nearest image, (n,)."""
        return self.squared.sqrt()
