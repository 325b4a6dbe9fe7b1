"""The random numbers that go with pictures, as functions of seed and positions."""

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
    """Random numbers that go with pictures."""

    def __call__(self, seed: int, at: NDArray[np.int64], size: Size, /) -> Drawn_co:
        """Draw for positions (b,) and pictures of this size."""
        ...


class PosteriorNoise(NamedTuple):
    """`Draws` of what a posterior is sampled with, (b, c, h, w)."""

    channels: int
    factor: int
    """Sides of pictures over sides of latents."""

    def __call__(self, seed: int, at: NDArray[np.int64], size: Size) -> Tensor:
        shape = (self.channels, size[1] // self.factor, size[0] // self.factor)
        return torch.from_numpy(normal(seed, Purpose.POSTERIOR, at, shape))


class Noising(NamedTuple):
    """How the random numbers of diffusion's training are drawn, for pictures and for caches alike."""

    dropout: float = 0.0
    """Share of examples whose condition is the null condition."""
    strata: int = 1
    """Of so many positions in a row, each has its timestep in another of so many equal parts of [0, 1)."""
    offset: float = 0.0
    """Times a normal number that a whole channel shares, added to the noise: it teaches the network to move a picture's
    mean (Guttenberg 2023, "Diffusion with offset noise")."""

    def draw(
        self, seed: int, at: NDArray[np.int64], shape: tuple[int, ...], masks: DrawnMasks | None = None
    ) -> DrawnNoise:
        """Draw for latents of this shape, (c, h, w)."""
        noise = normal(seed, Purpose.NOISE, at, shape)
        if self.offset:
            noise += self.offset * normal(seed, Purpose.OFFSET, at, (shape[0], 1, 1))
        return DrawnNoise(
            timestep=_below_one((at % self.strata + uniform(seed, Purpose.TIMESTEP, at)) / self.strata),
            noise=torch.from_numpy(noise),
            posterior_noise=torch.from_numpy(normal(seed, Purpose.POSTERIOR, at, shape)),
            dropped=torch.from_numpy(uniform(seed, Purpose.DROPOUT, at) < self.dropout),
            masks=masks,
        )


PLAIN = Noising()


class LatentNoise(NamedTuple):
    """`Draws` of diffusion's training on pictures that are encoded as they are read."""

    noising: Noising
    channels: int
    factor: int
    masks: bool = False
    """Whether the pictures are to be inpainted."""

    def __call__(self, seed: int, at: NDArray[np.int64], size: Size) -> DrawnNoise:
        shape = (self.channels, size[1] // self.factor, size[0] // self.factor)
        return self.noising.draw(seed, at, shape, masking(seed, at, size, shape) if self.masks else None)


def masking(seed: int, at: NDArray[np.int64], size: Size, shape: tuple[int, ...]) -> DrawnMasks:
    """Draw masks of pictures of this size, whose latents have this shape, (c, h, w)."""
    return DrawnMasks(draw_masks(seed, at, size), torch.from_numpy(normal(seed, Purpose.MASKED, at, shape)))


def _below_one(u: NDArray[np.float64]) -> Tensor:
    """float32, still in [0, 1): rounding must not reach 1."""
    return torch.from_numpy(np.minimum(u.astype(np.float32), np.float32(1 - 2**-24)))
