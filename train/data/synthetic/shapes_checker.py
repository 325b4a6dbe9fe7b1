"""Checker of the Shapes dataset: it describes an image in words with fixed rules, without learning, and scores it.

The rules invert the known renderer. A pixel near the line from the background's colour to an object's colour is partly
covered by the object, and its position along the line is the covered share. The covered area and its centroid give each
shape's radius and centre in closed form, and the best-fitting mask of the renderer gives the shape's name.
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

from train.data.synthetic.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIAMETERS,
    SHAPES,
    Box,
    Placed,
    Relation,
    Scene,
    Shape,
    Size,
    coverage,
)

LARGEST_READ = 64  # a larger image is first averaged down to this side
SMALLEST_AREA = 0.012  # share of the image; the smallest object covers 0.026
LARGEST_MISFIT = 0.25  # share of an object's area; with a larger misfit, its shape is unknown
BLURS = (0, 0.5 / 32, 1 / 32)  # shares of the side: tried widths of the blur that an autoencoder causes
NO_SIZE_PENALTY = 0.05  # added to the misfit of a shape that has neither size
VISIBLE = 45  # smallest visible colour difference, in levels; well above noise, well below the palette's smallest (89)
ATTRIBUTES = ("colour", "shape", "size")
_SQUARE = np.ones((3, 3), dtype=bool)
_PALETTE = COLOURS | BACKGROUNDS
_NAMES = tuple(_PALETTE)
_RGB = np.array(list(_PALETTE.values()), dtype=np.float32)  # (names, 3), object colours first


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object found in an image. The colour may be a background's; shape and size are None if none fits.

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
    """Content of an image. The background may have an object's colour, although no prompt requests this."""

    background: str
    objects: tuple[FoundObject, ...]


def read_scene(image: NDArray[np.uint8]) -> Reading:
    """Read a square image, (side, side, 3) uint8 with side at least 32. Raises ValueError for other shapes or types."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"image of type {image.dtype} and shape {image.shape}: must be uint8 (side, side, 3)")
    if len(image) > LARGEST_READ:
        image = np.asarray(Image.fromarray(image).resize((LARGEST_READ, LARGEST_READ), Image.Resampling.BOX))
    pixels = image.astype(np.float32)
    ring = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    names = _nearest(ring)
    background = np.bincount(names).argmax()
    ground = np.median(ring[names == background], axis=0)
    masks = _segment(pixels - ground, _RGB[: len(COLOURS)] - ground)
    taken = np.sum(masks, axis=0, dtype=int)
    found = [_identify(pixels - ground, ground, mask, taken > mask) for mask in masks]
    return Reading(_NAMES[background], tuple(found))


def _nearest(pixels: NDArray[np.floating]) -> NDArray[np.intp]:
    """Return the index of each pixel's nearest colour in the palette, (..., 3) → (...)."""
    return np.square(pixels[..., None, :] - _RGB).sum(-1).argmin(-1)


def _segment(offset: NDArray[np.floating], rays: NDArray[np.floating]) -> list[NDArray[np.bool_]]:
    """Return one mask per object.

    offset: (h, w, 3), pixels minus the background. rays: (colours, 3), object colours minus the background."""
    along = np.clip(offset @ (rays / np.maximum(np.square(rays).sum(-1, keepdims=True), 1)).T, 0, 1)  # (h, w, colours)
    residual = np.square(offset[..., None, :] - along[..., None] * rays).sum(-1)
    residual[..., np.square(rays).sum(-1) < VISIBLE**2] = np.inf  # the background itself has this colour
    colour = residual.argmin(-1)
    solid = np.take_along_axis(along, colour[..., None], -1)[..., 0] >= 0.5
    # Pixels with neither an object's colour nor the background's, away from the soft edges of objects.
    solid |= (np.square(offset).sum(-1) > VISIBLE**2) & ~ndimage.binary_dilation(solid, _SQUARE, iterations=2)
    least = SMALLEST_AREA * solid.size
    masks = []
    for part in _parts(solid, least):
        # Colours that fill an area; a mixed edge may resemble a third colour, but has no interior.
        bulk = [k for k in np.unique(colour[part]) if _is_bulk(part & (colour == k), least)]
        if len(bulk) < 2:
            masks.append(part)
            continue
        owner = np.array(bulk)[residual[..., bulk].argmin(-1)]
        masks += [mask for k in bulk for mask in _parts(part & (owner == k), least)]
    return masks


def _parts(mask: NDArray[np.bool_], least: float) -> list[NDArray[np.bool_]]:
    """Return the connected parts of at least `least` pixels."""
    labels, _ = ndimage.label(mask, _SQUARE)
    areas = np.bincount(labels.ravel())
    return [labels == k for k in range(1, len(areas)) if areas[k] >= least]


def _is_bulk(mask: NDArray[np.bool_], least: float) -> bool:
    return bool(mask.sum() >= least and ndimage.binary_erosion(mask).sum() >= least / 6)


def _identify(
    offset: NDArray[np.floating], ground: NDArray[np.floating], mask: NDArray[np.bool_], others: NDArray[np.bool_]
) -> FoundObject:
    """Identify the object of a mask. offset: (h, w, 3) difference to the background's colour; masks: (h, w)."""
    side = len(mask)
    interior = ndimage.binary_erosion(mask)
    ray = np.median(offset[interior if interior.sum() >= 4 else mask], axis=0)
    colour = _NAMES[_nearest(ground + ray)]
    near = mask | (ndimage.binary_dilation(mask, _SQUARE, iterations=2) & ~ndimage.binary_dilation(others))
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    box = Box(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    window = np.s_[box.top : box.bottom, box.left : box.right]
    cover = np.where(near[window], offset[window] @ (ray / max(ray @ ray, 1)), 0)  # (h, w) of the box
    area = max(float(cover.sum()), 1.0)
    x = float(cover.sum(0) @ (np.arange(box.left, box.right) + 0.5)) / area
    y = float(cover.sum(1) @ (np.arange(box.top, box.bottom) + 0.5)) / area
    moments = [_moments(shape) for shape in SHAPES]
    radii = [float(np.sqrt(area / unit)) for unit, _ in moments]
    templates = np.stack(
        [
            coverage(shape, Placed(x, y - below * radius, radius), box, samples=3)
            for shape, radius, (_, below) in zip(SHAPES, radii, moments, strict=True)
        ]
    )  # (shapes, h, w)
    sizes = [_size(2 * radius / side) for radius in radii]
    fits = []
    for blur in BLURS:
        soft = ndimage.gaussian_filter(templates, (0, blur * side, blur * side)) if blur else templates
        misfits = np.abs(cover - soft).sum((1, 2)) / area
        fits += [(m + NO_SIZE_PENALTY * (sizes[k] is None), float(m), k) for k, m in enumerate(misfits)]
    _, misfit, k = min(fits)
    shape, size = (SHAPES[k], sizes[k]) if misfit <= LARGEST_MISFIT else (None, None)
    return FoundObject(shape, colour, size, x / side, y / side, 2 * radii[k] / side, misfit)


def _size(diameter: float) -> Size | None:
    """Return the size nearest to a diameter (a share of the side), or None if both are too far away.

    The largest accepted ratio between diameter and size is the square root of large / small.
    """
    half = (DIAMETERS["large"] / DIAMETERS["small"]) ** 0.5
    return next((name for name, middle in DIAMETERS.items() if middle / half <= diameter < middle * half), None)


@cache
def _moments(shape: Shape) -> tuple[float, float]:
    """Return the area of the shape of radius 1, and the distance of its centroid below the origin."""
    mask = coverage(shape, Placed(150, 150, 128), Box(0, 0, 300, 300))
    return float(mask.sum() / 128**2), float((mask.sum(1) @ (np.arange(300) + 0.5 - 150)) / mask.sum() / 128)


def _read_relation(first: FoundObject, second: FoundObject) -> Relation:
    """Return the relation of the first object to the second, along the axis on which they are farther apart."""
    right, down = first.x - second.x, first.y - second.y
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def score(reading: Reading, scene: Scene) -> dict[str, Any]:
    """Score an image's content against a scene.

    background: bool; colour, shape, size: a bool for each object of the scene; relation: bool, or None for a scene of
    one object; all: bool, true if all of these are right and there is no other object. Objects are matched so that the
    fewest attributes differ and, among equal matches, so that the relation is right. A missing object is all wrong.
    """
    misses = np.array(
        [
            [sum(getattr(f, a) != getattr(thing, a) for a in ATTRIBUTES) for f in reading.objects]
            for thing in scene.objects
        ],
        dtype=float,
    ).reshape(len(scene.objects), len(reading.objects))
    if scene.relation is not None:
        # Weighs less than any attribute; smallest if the first object is farthest in its direction.
        right, down = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}[scene.relation]
        misses += [[side * 0.1 * (right * f.x + down * f.y) for f in reading.objects] for side in (-1, 1)]
    pairs = dict(zip(*linear_sum_assignment(misses), strict=True))
    matched = [reading.objects[pairs[k]] if k in pairs else None for k in range(len(scene.objects))]
    result: dict[str, Any] = {"background": reading.background == scene.background}
    for name in ATTRIBUTES:
        result[name] = tuple(
            getattr(f, name, None) == getattr(thing, name) for f, thing in zip(matched, scene.objects, strict=True)
        )
    result["relation"] = None
    if scene.relation is not None:
        present = [f for f in matched if f is not None]
        result["relation"] = len(present) == 2 and _read_relation(*present) == scene.relation
    right_all = (
        all(all(result[name]) for name in ATTRIBUTES) and result["background"] and result["relation"] is not False
    )
    result["all"] = right_all and len(reading.objects) == len(scene.objects)
    return result


def score_images(
    images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], scenes: Sequence[Scene]
) -> dict[str, float | None]:
    """Return the shares that are right in images (n, side, side, 3) generated for scenes.

    The keys are "background", "colour", "shape", "size", "relation" and "all". The shares of colour, shape and size are
    over the scenes' objects, that of relation is over the scenes of two objects, and the others are over images. A
    share is None if there is nothing to count. Raises ValueError if the numbers of images and scenes differ.
    """
    if len(images) != len(scenes):
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes: must be one image per scene")
    scores = [score(read_scene(image), scene) for image, scene in zip(images, scenes, strict=True)]
    shares: dict[str, float | None] = {}
    for name in ("background", *ATTRIBUTES, "relation", "all"):
        right = np.hstack([result[name] for result in scores if result[name] is not None] or [[]])
        shares[name] = float(right.mean()) if right.size else None
    return shares
