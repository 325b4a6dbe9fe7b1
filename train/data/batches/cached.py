"""Batches from the caches: latents and text features by position, and the original images for inpainting."""

import copy
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import RunError
from train.data.batches.buckets import Buckets
from train.data.batches.draws import DEFAULT_NOISING, Noising, draw_masking
from train.data.batches.images import ATTEMPTS
from train.data.batches.latent_cache import LatentCache, stored_place
from train.data.batches.records import CachedBatch
from train.data.batches.text_cache import TextCache
from train.data.images.crop import Framing
from train.data.images.decode import DamagedImage
from train.data.order.permutation import Order, Shifted, shuffled
from train.data.order.rng import Positions, Purpose, uniform
from train.data.sources.splits import Source


class NoLongerReadable(Exception):
    """An image that was readable when its latent was computed, but no longer is."""

    def __init__(self, index: int, name: str, reason: str) -> None:
        self.index, self.name, self.reason = index, name, reason


@dataclass(frozen=True)
class Originals:
    """Original images of a cache's latents, which are decoded again."""

    source: Source
    framing: Framing
    buckets: Buckets | None = None

    def gather(self, indices: NDArray[np.int64], crop: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        """Return the pixels, (b, 3, h, w) in [−1, 1], of the crops whose latents `LatentCache.gather` returns.

        Raises NoLongerReadable.
        """
        size = self.buckets.size(int(indices[0])) if self.buckets else self.framing.square
        pixels = []
        for index, k, flip in zip(indices.tolist(), crop.tolist(), mirrored.tolist(), strict=True):
            name = self.source[index].name
            try:
                image = self.framing.load(self.source.read(index), name)
            except DamagedImage as error:
                raise NoLongerReadable(index, name, error.reason) from None
            pixels.append(self.framing.apply(image, size, stored_place(name, k), flip))
        return torch.stack(pixels)


class CachedDataset:
    """Latents and text features for given positions in training; no network runs.

    One of the image's cached crops, plain or mirrored, is drawn. repeats: number of times of each image in an
    epoch, (n,). originals: for inpainting only; they are decoded, and
    masks are drawn. A batch's `damaged` lists images that are no longer readable.
    """

    def __init__(
        self,
        latents: LatentCache,
        text: TextCache,
        seed: int,
        noising: Noising = DEFAULT_NOISING,
        *,
        repeats: NDArray[np.int64] | None = None,
        originals: Originals | None = None,
    ) -> None:
        if len(latents) != len(text):
            raise ValueError(
                f"latents of {len(latents)} images and captions of {len(text)}: must be caches of the same source"
            )
        self.latents, self.text, self.seed, self.noising, self.originals = latents, text, seed, noising, originals
        self.order: Order = latents.buckets or shuffled(len(latents), seed, repeats)

    def __len__(self) -> int:
        return len(self.latents)

    def shifted(self, shift: int) -> Self:
        """Return the same dataset in an order in which position p is now p + shift; see `Shifted`."""
        dataset = copy.copy(self)
        dataset.order = Shifted(self.order, shift)
        return dataset

    def __getitems__(self, positions: Positions, /) -> CachedBatch:
        damaged: list[tuple[str, str]] = []
        while True:
            try:
                return replace(self._batch(np.asarray(positions, np.int64)), damaged=damaged)
            except NoLongerReadable as error:
                self.latents.damaged[error.index] = True
                damaged.append((error.name, error.reason))

    def _batch(self, positions: NDArray[np.int64]) -> CachedBatch:
        seed, latents = self.seed, self.latents
        indices = self.order.at(positions)
        for k in np.flatnonzero(latents.damaged[indices]).tolist():
            candidates = (self.order.substitute(int(positions[k]), n) for n in range(1, ATTEMPTS + 1))
            indices[k] = next((index for index in candidates if not latents.damaged[index]), -1)
            if indices[k] < 0:
                raise RunError(
                    "no readable image found in one of the buckets: replace the damaged images, "
                    "or leave out --input.buckets"
                )
        crops = (uniform(seed, Purpose.CROP, positions) * latents.crops).astype(np.int64)
        flips = uniform(seed, Purpose.FLIP, positions) < 0.5 if latents.flip else np.zeros(len(positions), bool)
        shape, pixels, masks = latents.shape(int(indices[0])), None, None
        if self.originals is not None:
            pixels = self.originals.gather(indices, crops, flips)
            masks = draw_masking(seed, positions, (pixels.shape[3], pixels.shape[2]), shape)
        drawn = self.noising.draw(seed, positions, shape, masks)
        rows = self.text.rows(indices, uniform(seed, Purpose.CAPTION, positions))
        rows[drawn.dropped.numpy()] = 0
        mean, std = latents.gather(indices, crops, flips).unbind(1)
        return CachedBatch(
            position=torch.from_numpy(positions),
            index=torch.from_numpy(indices),
            mean=mean,
            std=std,
            condition=self.text.gather(rows),
            drawn=drawn,
            pixels=pixels,
        )
