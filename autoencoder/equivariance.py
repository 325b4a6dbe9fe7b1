"""Latents that turn and shrink with their pictures, after EQ-VAE (Kouzelis et al. 2025, arXiv 2502.09509).

In a share of the steps, the latent is transformed by τ before it is decoded, and the decoder has to make the picture
transformed by τ. That rules out latents whose meaning depends on their place or on fine noise, which a diffusion would
have to learn. τ is a rotation by 0 to 3 quarter turns and a reduction of each side on its own, filtered against aliasing;
the authors' code reduces both sides alike, without a filter, and also shrinks pictures in the other steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Transform(NamedTuple):
    """τ, for a batch."""

    height: int
    """Size of the latent before it is turned."""
    width: int
    turns: int
    """Quarter turns, counter-clockwise."""

    def __call__(self, x: Tensor, factor: int = 1) -> Tensor:
        """Latents (b, c, h, w), or pictures whose sides are `factor` times as long."""
        size = (self.height * factor, self.width * factor)
        if x.shape[-2:] != size:
            x = F.interpolate(x.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
        return torch.rot90(x, self.turns, (-2, -1))


def draw(uniforms: tuple[float, float, float], side: int, smallest: float) -> Transform:
    """Map three numbers in [0, 1) to a transform: sides of `smallest` to 1 times the latent's, and 0 to 3 quarter turns."""
    height, width = (max(1, round(side * (smallest + (1 - smallest) * u))) for u in uniforms[:2])
    return Transform(height, width, int(4 * uniforms[2]))
