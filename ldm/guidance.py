"""Guidance: wrappers around a denoiser. Each has the interface `(x_t, level) → Denoised` that samplers use.

The formulas here are in x0; other authors write them in eps or v. The results are equal: at a given x_t and level, each
prediction is an affine function a y + b of any other. If the weights sum to 1, b doesn't change and a factors out.

A wrapper doesn't evaluate a network whose output it doesn't need.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ldm.denoiser import Denoise, Denoised, Denoiser
from ldm.errors import UserError
from ldm.parameterization import target_of, to_eps, to_x0
from ldm.schedule import Level

LogProbability = Callable[[Tensor, Level], Tensor]
"""Differentiable classifier of noisy latents: (x_t (b, c, h, w), level) → log p(y | x_t) of each image, (b,)."""


@dataclass(frozen=True)
class Conditioned:
    """The prediction for one condition (b, …), without guidance."""

    denoiser: Denoiser
    condition: Tensor

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        return self.denoiser(x_t, level, self.condition)


class ClassifierFree:
    """Classifier-free guidance away from `negative` (the null condition or a negative prompt) and towards each prompt.

    x̂ = x̂_neg + sum_k s_k (x̂_k - x̂_neg). For one prompt this is Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, where
    s = 1 + w for that paper's w, so that scale 1 is the conditional prediction. For several prompts it is their
    conjunction, Liu et al. 2022 (arXiv 2206.01714), eq. 11. `rescale` (phi, 0 to 1) brings the standard deviation of
    the guided prediction back to that of the conditional one, Lin et al. 2024 (arXiv 2305.08891), eq. 14 to 16. With
    several prompts, the conditional prediction is the mean over prompts, weighted by the scales above 0.

    Conditions are (b, …) and evaluated in one batch, in diffusers' order [negative, prompts]. Conditions of weight 0
    are left out. Raises UserError for a rescale outside [0, 1].
    """

    def __init__(
        self, denoiser: Denoiser, negative: Tensor, prompts: Sequence[tuple[Tensor, float]], rescale: float = 0.0
    ) -> None:
        if not 0 <= rescale <= 1:
            raise UserError(f"guidance rescale {rescale}: must be 0 (no rescaling) to 1 (full rescaling)")
        self.denoiser, self.rescale = denoiser, rescale
        scales = [scale for _, scale in prompts]
        positive = [max(scale, 0.0) for scale in scales] if max(scales, default=0) > 0 else [1.0] * len(scales)
        rest = 1 - sum(scales)
        rows = [(negative, 0.0 if abs(rest) < 1e-9 else rest, 0.0)]  # condition, weight, share of the conditional mean
        rows += [(condition, scale, p / sum(positive)) for (condition, scale), p in zip(prompts, positive, strict=True)]
        rows = [row for row in rows if row[1] != 0]
        self.weights = [weight for _, weight, _ in rows]
        self.shares = [share for *_, share in rows]
        shape = np.broadcast_shapes(negative.shape, *(condition.shape for condition, _ in prompts))
        self.condition = torch.cat([condition.expand(shape) for condition, *_ in rows])

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        if len(self.weights) == 1:
            return self.denoiser(x_t, level, self.condition)
        denoised = self.denoiser(x_t.repeat(len(self.weights), *[1] * (x_t.ndim - 1)), level, self.condition)
        guided = denoised.map(partial(_weighted_sum, self.weights))
        if self.rescale == 0:
            return guided
        return replace(guided, x0=self._rescaled(guided.x0, _weighted_sum(self.shares, denoised.x0), x_t, level))

    def _rescaled(self, guided: Tensor, conditional: Tensor, x_t: Tensor, level: Level) -> Tensor:
        """Return the guided x0 after `rescale`.

        x0 is converted to the network's target first, because rescaling gives another result in each target.
        """
        kind, alpha, sigma = self.denoiser.target, level.alpha, level.sigma
        output, reference = (
            target_of(kind, x0, to_eps("x0", x0, x_t, alpha, sigma), alpha, sigma) for x0 in (guided, conditional)
        )
        dims = tuple(range(1, output.ndim))
        factor = reference.std(dims, keepdim=True) / output.std(dims, keepdim=True)
        return to_x0(kind, output * (1 + self.rescale * (factor - 1)), x_t, alpha, sigma)


def _weighted_sum(weights: Sequence[float], parts: Tensor) -> Tensor:
    """Return the weighted sum (b, …) of the n parts of a tensor (n b, …)."""
    return sum(weight * part for weight, part in zip(weights, parts.chunk(len(weights)), strict=True))  # type: ignore[return-value]


@dataclass(frozen=True)
class Interval:
    """Guidance only in an interval of noise levels sigma / alpha: Kynkäänniemi et al. 2024 (arXiv 2404.07724).

    The prediction is `inside` at levels with low < level <= high. At all other levels it is `outside`, which is cheaper
    because it has no guidance. Raises UserError unless 0 <= low < high.
    """

    inside: Denoise
    outside: Denoise
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"guidance interval {self.low} to {self.high}: must be two noise levels, 0 <= low < high")

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        return (self.inside if self.low < level.noise <= self.high else self.outside)(x_t, level)


@dataclass(frozen=True)
class Autoguided:
    """Autoguidance away from a weaker model: Karras et al. 2024 (arXiv 2406.02507), eq. 3. Scale 1 is no guidance."""

    main: Denoise
    weak: Denoise
    scale: float

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        if self.scale in (0, 1):
            return (self.main if self.scale else self.weak)(x_t, level)
        weak, main = self.weak(x_t, level), self.main(x_t, level)
        return replace(main, x0=torch.lerp(weak.x0, main.x0, self.scale))


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding against oversaturation by a large guidance scale: Saharia et al. 2022 (arXiv 2205.11487).

    If the quantile `share` of an image's |x̂0| is above `limit`, x̂0 is clipped there, and scaled so that the quantile
    becomes `limit` (their section 2.3). limit: the largest usual value of data, 1 for pixels in [-1, 1], as in the
    paper; latents have variance 1 and no bounds, and need more. Raises UserError unless 0 < share <= 1 and limit > 0.
    """

    denoise: Denoise
    share: float
    limit: float

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.limit < math.inf):
            raise UserError(
                f"dynamic threshold {self.share} {self.limit}: must be a share of the values, above 0 and at most 1, "
                "and a limit above 0"
            )

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        denoised = self.denoise(x_t, level)
        x0 = denoised.x0
        bound = x0.abs().flatten(1).quantile(self.share, 1).clamp_min(self.limit)  # (b,)
        bound = bound.view(-1, *[1] * (x0.ndim - 1))
        return replace(denoised, x0=x0.clamp(-bound, bound) * (self.limit / bound))


@dataclass(frozen=True)
class ClassifierGuided:
    """Guidance by a classifier of noisy latents: Dhariwal & Nichol 2021 (arXiv 2105.05233), algorithm 2.

    Their eps - sigma s grad log p(y | x_t) equals x̂0 + s (sigma^2 / alpha) grad log p(y | x_t) here. With weight 1 and
    an exact classifier, the score is that of p(x_t | y).
    """

    denoise: Denoise
    log_probability: LogProbability
    weight: float = 1.0

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        denoised = self.denoise(x_t, level)
        if self.weight == 0 or level.alpha == 0:  # pure noise contains no information about the class
            return denoised
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_probability(x, level).sum(), x)
        return replace(denoised, x0=denoised.x0 + self.weight * level.sigma * level.noise * gradient)
