"""Masks for inpainting: the masked area of a training image, as a function of (seed, position).

Masks resemble those drawn by hand: brush strokes, boxes, and the full image. Masks of the full image preserve an
inpainting network's ability to generate from text only.
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

FULL_SHARE, BOX_SHARE = 0.15, 0.5
"""Shares of full masks and of boxes; the rest are brush strokes. Changing them changes resumed inpainting runs."""
_MOST_STROKES, _MOST_SEGMENTS = 4, 8  # per brush mask, and per stroke


def draw_masks(seed: int, positions: Positions, size: Size) -> Tensor:
    """Draw masks, (b, 1, h, w) float32, 1 in the masked area, else 0; none is empty. size: width, height in pixels."""
    return torch.from_numpy(np.stack([_draw(generator(seed, Purpose.MASK, int(p)), size) for p in positions])[:, None])


def _draw(random: Generator, size: Size) -> NDArray[np.float32]:
    kind = random.random()
    canvas = Image.new("1", size, kind < FULL_SHARE)
    if FULL_SHARE <= kind < FULL_SHARE + BOX_SHARE:
        _box(ImageDraw.Draw(canvas), random, size)
    elif kind >= FULL_SHARE:
        _brush(ImageDraw.Draw(canvas), random, size)
    return np.asarray(canvas, np.float32)


def _box(draw: ImageDraw.ImageDraw, random: Generator, size: Size) -> None:
    """Draw a box of any position and proportion, with sides from 1/8 of the image's to all of it."""
    sides = [max(1, round(side * random.uniform(1 / 8, 1))) for side in size]
    first = [int(random.integers(0, length - part + 1)) for length, part in zip(size, sides, strict=True)]
    last = [start + part - 1 for start, part in zip(first, sides, strict=True)]  # PIL includes both corners in the box
    draw.rectangle((*first, *last), 1)


def _brush(draw: ImageDraw.ImageDraw, random: Generator, size: Size) -> None:
    """Draw wandering lines with round ends, 1/32 to 1/4 of the shorter side wide."""
    short = min(size)
    for _ in range(int(random.integers(1, _MOST_STROKES + 1))):
        width = max(1, round(short * math.exp(random.uniform(math.log(1 / 32), math.log(1 / 4)))))
        start = random.uniform(0, 1, 2) * size
        heading = random.uniform(0, 2 * math.pi)
        for _ in range(int(random.integers(1, _MOST_SEGMENTS + 1))):
            heading += random.normal(0, 0.8)
            step = short * random.uniform(0.05, 0.3) * np.array([math.cos(heading), math.sin(heading)])
            end = np.clip(start + step, 0, np.array(size) - 1)
            draw.line((*start, *end), 1, width)
            for x, y in (start, end):
                draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 1)
            start = end
