"""Latents that rotate and scale with their images, after EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509).

In a share of the steps, the latent is transformed by τ before decoding, and the decoder must reconstruct the image
transformed by τ. This prevents latents whose meaning depends on their position or on fine noise, which the diffusion
would have to learn. τ is a rotation by 0 to 3 quarter turns and an independent reduction of each side, with an
anti-aliasing filter. The authors' code reduces both sides equally, without a filter, and also shrinks images in the
other steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Transform(NamedTuple):
    """The transform τ of a batch."""

    height: int
    """Height of the latent before the rotation."""
    width: int
    """Width of the latent before the rotation."""
    turns: int
    """Quarter turns, counter-clockwise."""

    def __call__(self, x: Tensor, factor: int = 1) -> Tensor:
        """Transform latents (b, c, h, w), or images whose sides are `factor` times as long."""
        size = (self.height * factor, self.width * factor)
        if x.shape[-2:] != size:
            x = F.interpolate(x.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        return torch.rot90(x, self.turns, (-2, -1))


def draw(uniforms: tuple[float, float, float], side: int, smallest: float) -> Transform:
    """Map three numbers in [0, 1) to a transform of latents whose side is `side`.

    The first two set the new height and width, between smallest · side and side; the third sets 0 to 3 quarter turns.
    """
    height, width = (max(1, round(side * (smallest + (1 - smallest) * u))) for u in uniforms[:2])
    return Transform(height, width, int(4 * uniforms[2]))
