"""Small random images."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]


def smooth_images(count: int, size: Size = (32, 32), seed: int = 0) -> list[Image.Image]:
    """Return images of 4 × 4 random colours, interpolated to `size`."""
    made = []
    for k in range(count):
        coarse = np.random.default_rng(seed + k).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        made.append(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    return made


def smooth_pixels(count: int, side: int = 32, seed: int = 0) -> Tensor:
    """Return a batch of images of 4 × 4 random colours, interpolated, with values from -1 to 1."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bilinear")  # (count, 3, side, side)


def box_mask(size: Size = (32, 32), box: tuple[int, int, int, int] = (8, 4, 23, 19)) -> Image.Image:
    """Return a mask that is white inside `box`, whose right and lower ends are inside."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle(box, 255)
    return mask
