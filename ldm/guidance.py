"""Guidance: wrappers round a denoiser that give `(x_t, level) → x0_hat`, all a sampler ever sees.

Classifier-free guidance: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, with s = 1 + w for that paper's w,
so that scale 1 is the conditional prediction: x̂ = x̂_neg + s (x̂_cond - x̂_neg). It is written on x0 here,
on eps or v elsewhere, and these are the same: at a given x_t and level each prediction is an affine
function a y + b of any other, and the weights 1 - s and s sum to 1, so that b passes through unchanged and
the factor a moves out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.denoiser import Denoiser
from ldm.schedule import Level


@dataclass(frozen=True)
class Conditioned:
    """The conditional prediction: condition (b, …)."""

    denoiser: Denoiser
    condition: Tensor

    def __call__(self, x_t: Tensor, level: Level) -> Tensor:
        return self.denoiser(x_t, level, self.condition)


class ClassifierFree:
    """Away from `negative` (the null condition, or a negative prompt's), towards `condition`; both (b, …).

    One evaluation of 2b pictures, in diffusers' order [negative, condition]; at scale 1, of b: the condition.
    """

    def __init__(self, denoiser: Denoiser, condition: Tensor, negative: Tensor, scale: float) -> None:
        self.denoiser, self.scale = denoiser, scale
        self.condition = condition if scale == 1 else torch.cat([negative.expand_as(condition), condition])

    def __call__(self, x_t: Tensor, level: Level) -> Tensor:
        if self.scale == 1:
            return self.denoiser(x_t, level, self.condition)
        negative, positive = self.denoiser(torch.cat([x_t, x_t]), level, self.condition).chunk(2)
        return negative + self.scale * (positive - negative)
