"""Scores of generated images whose right images exist: is the right one nearer than other images?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import UserError
from train.data.order.rng import Purpose, generator
from train.data.synthetic.emoji_styles import ABOUT
from train.evaluation.neighbours import BLOCK, squared_distances

_OTHERS = 99  # other images of the same style


class Labels(NamedTuple):
    """Labels of all images of a dataset, each (n,)."""

    emoji: NDArray[np.int64]
    style: NDArray[np.int64]
    training: NDArray[np.bool_]


@dataclass(frozen=True)
class Scores:
    """Shares of correct images, see the top of styles.py."""

    concept_100: float
    concept_all: float
    style: float | None
    """None if no concept has several styles."""


def retrieval(made: Tensor, right: Sequence[int], features: Tensor, labels: Labels, seed: int) -> Scores:
    """Return the scores of images with features `made` (m, d), whose right images are `right` (m,) of all (n, d).

    An image counts as correct only if the right one is nearer than each of the others, so that equal features are
    errors. The 99 others are drawn by seed and right image, so they are the same for all models.
    """
    centre = features.mean(0)
    made, features = made - centre, features - centre
    hundred, everything, styles = [], [], []
    for first in range(0, len(made), BLOCK):
        distances = squared_distances(made[first : first + BLOCK], features).numpy()
        for row, index in zip(distances, right[first : first + BLOCK], strict=True):
            nearer = row <= row[index]
            nearer[index] = False
            hundred.append(not nearer[_others(index, labels, seed)].any())
            everything.append(not nearer.any())
            same = labels.emoji == labels.emoji[index]
            if same.sum() > 1:
                styles.append(not nearer[same].any())
    return Scores(float(np.mean(hundred)), float(np.mean(everything)), float(np.mean(styles)) if styles else None)


def chance(right: Sequence[int], labels: Labels) -> Scores:
    """Return the scores of an image that is equally near to all."""
    sizes = [(labels.emoji == labels.emoji[index]).sum() for index in right]
    hundreds = [min(int((labels.style == labels.style[index]).sum()), _OTHERS + 1) for index in right]
    several = [1 / size for size in sizes if size > 1]
    return Scores(
        float(np.mean([1 / n for n in hundreds])), 1 / len(labels.emoji), float(np.mean(several)) if several else None
    )


def _others(index: int, labels: Labels, seed: int) -> NDArray[np.int64]:
    """Return the other images of the same style with which an image is compared."""
    candidates = np.flatnonzero(labels.style == labels.style[index])
    candidates = candidates[candidates != index]
    random = generator(seed, Purpose.VALIDATION, index)
    return candidates[random.permutation(len(candidates))[:_OTHERS]]


def copies(right: Sequence[int], features: Tensor, labels: Labels) -> list[int]:
    """Return for each image the training image that shows the same concept in another style and is nearest to it.

    If there is none, it is the nearest training image of the same style.
    """
    found = []
    for index in right:
        same = labels.training & (labels.emoji == labels.emoji[index])
        same[index] = False
        if not same.any():
            same = labels.training & (labels.style == labels.style[index])
            same[index] = False
        candidates = torch.from_numpy(np.flatnonzero(same))
        if not len(candidates):
            raise UserError(f"{ABOUT}: the dataset has no training images of a style: make it again")
        distances = (features[candidates] - features[index]).square().sum(1)
        found.append(int(candidates[distances.argmin()]))
    return found
