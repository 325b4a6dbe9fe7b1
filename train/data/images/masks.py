"""Masks for inpainting: the area to paint in a training image, drawn as a function of (seed, position).

Masks resemble those made by hand: brush strokes, boxes, and the whole image. Masks of the whole image keep an
inpainting network able to paint from text alone.
"""

import math

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from train.data.images.crop import Size
from train.data.order.rng import Positions, Purpose, generator

WHOLE, BOXES = 0.15, 0.5
"""Shares of whole masks and boxes; the rest are brush strokes. Changing them changes continued inpainting runs."""
_STROKES, _JOINTS = 4, 8  # most strokes per brush mask, and most joints per stroke


def draw_masks(seed: int, at: Positions, size: Size) -> Tensor:
    """Draw masks, (b, 1, h, w) float32, 1 where to paint, else 0; none is empty. size: width and height in pixels."""
    return torch.from_numpy(np.stack([_draw(generator(seed, Purpose.MASK, int(p)), size) for p in at])[:, None])


def _draw(random: Generator, size: Size) -> NDArray[np.float32]:
    kind = random.random()
    canvas = Image.new("1", size, kind < WHOLE)
    if WHOLE <= kind < WHOLE + BOXES:
        _box(ImageDraw.Draw(canvas), random, size)
    elif kind >= WHOLE:
        _brush(ImageDraw.Draw(canvas), random, size)
    return np.asarray(canvas, np.float32)


def _box(draw: ImageDraw.ImageDraw, random: Generator, size: Size) -> None:
    """Draw a box of any position and proportion, with sides from 1/8 of the image's to all of it."""
    sides = [max(1, round(side * random.uniform(1 / 8, 1))) for side in size]
    first = [int(random.integers(0, whole - part + 1)) for whole, part in zip(size, sides, strict=True)]
    last = [begin + part - 1 for begin, part in zip(first, sides, strict=True)]  # PIL includes both corners in the box
    draw.rectangle((*first, *last), 1)


def _brush(draw: ImageDraw.ImageDraw, random: Generator, size: Size) -> None:
    """Draw wandering lines with round ends, 1/32 to 1/4 of the shorter side wide."""
    short = min(size)
    for _ in range(int(random.integers(1, _STROKES + 1))):
        width = max(1, round(short * math.exp(random.uniform(math.log(1 / 32), math.log(1 / 4)))))
        place = random.uniform(0, 1, 2) * size
        heading = random.uniform(0, 2 * math.pi)
        for _ in range(int(random.integers(1, _JOINTS + 1))):
            heading += random.normal(0, 0.8)
            step = short * random.uniform(0.05, 0.3) * np.array([math.cos(heading), math.sin(heading)])
            end = np.clip(place + step, 0, np.array(size) - 1)
            draw.line((*place, *end), 1, width)
            for x, y in (place, end):
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 1)
            place = end
