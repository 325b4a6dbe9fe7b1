"""Memorisation: whether generated images are nearer to training images than new images of the same kind are.

Held-out images are new to the model. If the model generalises, images that it generates from their captions are as far
from the training images as they are. So the distances of held-out images, after a pass through the autoencoder, are
the scale for those of generated images.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from train.evaluation.features import Features
from train.evaluation.measures import described
from train.evaluation.neighbours import NearestSearch
from train.evaluation.results import Measure

_LEVEL = 0.01  # share of held-out images that count as near copies


class CopyTest(NamedTuple):
    """Comparison of the distances to the nearest training image, of generated and of held-out images."""

    threshold: float
    """Distance below which an image is a near copy: only a share of `level` of new images is expected there."""
    level: float
    share: float
    """Share of generated images that are near copies."""
    share_error: float
    closer: float
    """Probability that a generated image is nearer to the training images than a held-out one is; 0.5 if it is new."""
    closer_error: float
    """Standard error of `closer` if the images are new."""


def copy_test(made: Tensor, held_out: Tensor) -> CopyTest:
    """Compare distances to the nearest training image, of generated (n,) and of held-out images (m,).

    The threshold is the k-th smallest distance of held-out images, k = 1% of m + 1, at least 1. For a new image of the
    same kind, each rank among the m + 1 distances is equally probable, so it is below the threshold with probability
    k / (m + 1). `closer` is the statistic of Mann and Whitney; Meehan et al. 2020, arXiv 2004.05675, use it for this.
    """
    n, m = len(made), len(held_out)
    ordered = held_out.sort().values
    k = max(1, math.floor(_LEVEL * (m + 1)))
    share = float((made < ordered[k - 1]).double().mean())
    below, up_to = (torch.searchsorted(ordered, made, right=right) for right in (False, True))
    closer = float((m - (below + up_to) / 2).mean()) / m  # an equal distance counts half
    return CopyTest(
        threshold=float(ordered[k - 1]),
        level=k / (m + 1),
        share=share,
        share_error=math.sqrt(share * (1 - share) / n),
        closer=closer,
        closer_error=math.sqrt((n + m + 1) / (12 * n * m)),
    )


class Nearest(NamedTuple):
    """The nearest training images in one feature space."""

    network: Features
    made: NearestSearch
    held_out: NearestSearch


def search(
    networks: Sequence[Features],
    made: Sequence[Tensor],
    held_out: Sequence[Tensor],
    training: Iterable[tuple[Tensor, Tensor]],
) -> list[Nearest]:
    """Find the nearest training image of each generated and held-out image, in the features of each network.

    made, held_out: features of the images by each network. training: batches of images (b, 3, h, w) in [−1, 1], on the
    networks' device, and their indices (b,).
    """
    searches = [
        Nearest(network, NearestSearch(a), NearestSearch(b))
        for network, a, b in zip(networks, made, held_out, strict=True)
    ]
    for pixels, indices in training:
        for network, *both in searches:
            features = network(pixels).cpu()
            for each in both:
                each.add(features, indices)
    return searches


def memorisation_measures(nearest: Nearest, searched: int) -> list[Measure]:
    """Return the report's measures of copies. searched: number of training images."""
    test = copy_test(nearest.made.distance, nearest.held_out.distance)
    features, samples = described(nearest.network), len(nearest.made.distance)
    return [
        Measure(
            name="near_copies",
            title="Near copies of training images",
            value=test.share,
            error=test.share_error,
            baseline=test.level,
            note=f"Share of generated images whose nearest training image is nearer than {test.threshold:.4g}; of "
            f"{len(nearest.held_out.distance):,} held-out images, {test.level:.2g} are.",
            features=features,
            samples=samples,
            reference=searched,
        ),
        Measure(
            name="nearer_than_held_out",
            title="Nearer to training images than held-out images are",
            value=test.closer,
            error=test.closer_error,
            baseline=0.5,
            better="baseline",
            note="Probability for a random generated and a random held-out image; 0.5: the model doesn't recite.",
            features=features,
            samples=samples,
            reference=searched,
        ),
    ]
