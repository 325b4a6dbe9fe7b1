"""Random numbers of a batch besides its images, such as noise and masks, as functions of seed and positions."""

from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.data.batches.records import DrawnMasks, DrawnNoise
from train.data.images.crop import Size
from train.data.images.masks import draw_masks
from train.data.order.rng import Purpose, normal, uniform

Drawn_co = TypeVar("Drawn_co", covariant=True)


class Draws(Protocol[Drawn_co]):
    """Source of a batch's random numbers besides its images, such as noise and masks."""

    def __call__(self, seed: int, positions: NDArray[np.int64], size: Size, /) -> Drawn_co:
        """Return the random numbers for positions (b,) and images of this size."""
        ...


class PosteriorNoise(NamedTuple):
    """Source of the noise with which a posterior is sampled, (b, c, h, w)."""

    channels: int
    factor: int
    """Side of an image divided by the side of its latent."""

    def __call__(self, seed: int, positions: NDArray[np.int64], size: Size) -> Tensor:
        shape = (self.channels, size[1] // self.factor, size[0] // self.factor)
        return torch.from_numpy(normal(seed, Purpose.POSTERIOR, positions, shape))


class Noising(NamedTuple):
    """Settings of the random numbers of diffusion training, the same with and without caches."""

    dropout: float = 0.0
    """Share of examples whose condition is the null condition."""
    strata: int = 1
    """Number of equal parts of [0, 1); that many consecutive positions draw their timesteps from different parts."""
    offset: float = 0.0
    """Scale of the offset noise: one normal number per channel, added to the channel's noise. It teaches the network to
    shift an image's mean (Guttenberg 2023, "Diffusion with offset noise")."""
    scales: tuple[float, float] | None = None
    """Smallest and largest guidance scale, for a network that reads one; None: none are drawn."""
    renoise: bool = False
    """Whether noise for a second start of a trajectory is drawn."""

    def draw(
        self, seed: int, positions: NDArray[np.int64], shape: tuple[int, ...], masks: DrawnMasks | None = None
    ) -> DrawnNoise:
        """Return the random numbers for positions (b,) and latents of shape (c, h, w)."""
        noise = normal(seed, Purpose.NOISE, positions, shape)
        if self.offset:
            noise += self.offset * normal(seed, Purpose.OFFSET, positions, (shape[0], 1, 1))
        return DrawnNoise(
            timestep=_below_one((positions % self.strata + uniform(seed, Purpose.TIMESTEP, positions)) / self.strata),
            noise=torch.from_numpy(noise),
            posterior_noise=torch.from_numpy(normal(seed, Purpose.POSTERIOR, positions, shape)),
            dropped=torch.from_numpy(uniform(seed, Purpose.DROPOUT, positions) < self.dropout),
            masks=masks,
            scale=None if self.scales is None else self._scale(seed, positions, *self.scales),
            renoise=torch.from_numpy(normal(seed, Purpose.RENOISE, positions, shape)) if self.renoise else None,
        )

    @staticmethod
    def _scale(seed: int, positions: NDArray[np.int64], low: float, high: float) -> Tensor:
        return torch.from_numpy((low + (high - low) * uniform(seed, Purpose.GUIDANCE, positions)).astype(np.float32))


DEFAULT_NOISING = Noising()


class LatentNoise(NamedTuple):
    """Source of the random numbers of diffusion training, if images are encoded during training."""

    noising: Noising
    channels: int
    factor: int
    masks: bool = False
    """Whether masks for inpainting are drawn."""

    def __call__(self, seed: int, positions: NDArray[np.int64], size: Size) -> DrawnNoise:
        shape = (self.channels, size[1] // self.factor, size[0] // self.factor)
        masks = draw_masking(seed, positions, size, shape) if self.masks else None
        return self.noising.draw(seed, positions, shape, masks)


def draw_masking(seed: int, positions: NDArray[np.int64], size: Size, shape: tuple[int, ...]) -> DrawnMasks:
    """Draw masks for images of this size, and noise for latents of shape (c, h, w)."""
    noise = normal(seed, Purpose.MASKED, positions, shape)
    return DrawnMasks(draw_masks(seed, positions, size), torch.from_numpy(noise))


def _below_one(u: NDArray[np.float64]) -> Tensor:
    """Convert numbers in [0, 1) to float32; those that would round to 1 become the largest float32 below 1."""
    return torch.from_numpy(np.minimum(u.astype(np.float32), np.float32(1 - 2**-24)))
