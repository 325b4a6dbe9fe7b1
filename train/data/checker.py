"""Reads a picture of the Shapes set back into words, without any learning, and scores it against its prompt.

The renderer is known, so a picture is read by undoing it: near the line from the background's colour to an object's
colour, a pixel's place along the line is how much of it the object covers. The covered area and its centroid give each
shape its radius and centre in closed form, and the renderer's own mask that fits best names the shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from train.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIAMETERS,
    SHAPES,
    Background,
    Box,
    Placed,
    Relation,
    Scene,
    Shape,
    coverage,
)

LARGEST_READ = 64  # a larger picture is first averaged down to this side
SMALLEST_AREA = 0.012  # of the picture; the smallest object covers 0.026
LARGEST_MISFIT = 0.3  # beyond this share of its area, an object has no shape
_PALETTE = COLOURS | BACKGROUNDS
_NAMES = tuple(_PALETTE)
_RGB = np.array(list(_PALETTE.values()), dtype=np.float32)  # (names, 3), object colours first
_SIZE_BOUNDS = {  # in ratio as far down from the small diameter, and up from the large, as to where they part
    "small": (DIAMETERS["small"] ** 1.5 / DIAMETERS["large"] ** 0.5, (DIAMETERS["small"] * DIAMETERS["large"]) ** 0.5),
    "large": ((DIAMETERS["small"] * DIAMETERS["large"]) ** 0.5, DIAMETERS["large"] ** 1.5 / DIAMETERS["small"] ** 0.5),
}


@dataclass(frozen=True, slots=True)
class Found:
    """An object as read. A colour may be a background's; None is a shape or size that fits none.

    x, y (centroid, y downwards) and diameter are in fractions of the side; misfit is the absolute difference to the
    shape's mask, as a share of its area.
    """

    shape: str | None
    colour: str
    size: str | None
    x: float
    y: float
    diameter: float
    misfit: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows. The background may have an object's colour, which no prompt asks for."""

    background: str
    objects: tuple[Found, ...]


def read_scene(picture: NDArray[np.uint8]) -> Reading:
    """Read a square picture, (side, side, 3) uint8 with side at least 32; ValueError for any other."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[0] != picture.shape[1] or picture.shape[2] != 3:
        raise ValueError(f"picture of {picture.dtype} {picture.shape}: accepted is uint8 (side, side, 3)")
    if len(picture) > LARGEST_READ:
        picture = np.asarray(Image.fromarray(picture).resize((LARGEST_READ, LARGEST_READ), Image.Resampling.BOX))
    pixels = picture.astype(np.float32)
    ring = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    names = _nearest(ring)
    background = np.bincount(names).argmax()
    ground = np.median(ring[names == background], axis=0)
    cover, masks = _segment(pixels - ground, _RGB - ground)
    found = []
    for colour, mask in masks:
        others = np.zeros_like(mask)
        for _, other in masks:
            if other is not mask:
                others |= other
        found.append(_identify(pixels, cover[..., colour], mask, others))
    return Reading(_NAMES[background], tuple(found))


def _nearest(pixels: NDArray[np.floating]) -> NDArray[np.intp]:
    """The place in the palette of each pixel's nearest colour. (..., 3) → (...)"""
    return np.square(pixels[..., None, :] - _RGB).sum(-1).argmin(-1)
