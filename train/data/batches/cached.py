"""Batches from the caches: latents and text features by position, and the original images for inpainting."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import RunError
from train.data.batches.buckets import Buckets
from train.data.batches.draws import PLAIN, Noising, masking
from train.data.batches.images import ATTEMPTS
from train.data.batches.latent_cache import LatentCache, stored_place
from train.data.batches.records import CachedBatch
from train.data.batches.text_cache import TextCache
from train.data.images.crop import Framing
from train.data.images.decode import DamagedImage
from train.data.order.permutation import InOrder, Order, Shuffled
from train.data.order.rng import Positions, Purpose, uniform
from train.data.sources.splits import Source


class MissingImage(Exception):
    """An image that was readable when its latent was made, and no longer is."""

    def __init__(self, index: int, name: str, reason: str) -> None:
        self.index, self.name, self.reason = index, name, reason


@dataclass(frozen=True)
class Originals:
    """The images from which a cache's latents were made, decoded again."""

    source: Source
    framing: Framing
    buckets: Buckets | None = None

    def gather(self, indices: NDArray[np.int64], crop: NDArray[np.int64], mirrored: NDArray[np.bool_]) -> Tensor:
        """Return pixels, (b, 3, h, w) in [−1, 1], of the windows that `LatentCache.gather` returns.

        Raises MissingImage if an image is no longer readable.
        """
        size = self.buckets.size(int(indices[0])) if self.buckets else self.framing.square
        pixels = []
        for index, window, flip in zip(indices.tolist(), crop.tolist(), mirrored.tolist(), strict=True):
            name = self.source[index].name
            try:
                image = self.framing.load(self.source.read(index), name)
            except DamagedImage as error:
                raise MissingImage(index, name, error.reason) from None
            pixels.append(self.framing.cut(image, size, stored_place(name, window), flip))
        return torch.stack(pixels)


class CachedDataset:
    """Latents and text features by position; no network runs.

    One of the image's cached windows, plain or mirrored, is drawn. originals: given for inpainting; they are then
    decoded, and masks drawn. A batch's `damaged` lists images that are no longer readable.
    """

    def __init__(
        self,
        latents: LatentCache,
        text: TextCache,
        seed: int,
        noising: Noising = PLAIN,
        *,
        shuffle: bool = True,
        originals: Originals | None = None,
    ) -> None:
        if len(latents) != len(text):
            raise ValueError(f"latents of {len(latents)} images, captions of {len(text)}: give caches of one source")
        self.latents, self.text, self.seed, self.noising, self.originals = latents, text, seed, noising, originals
        self.order: Order = latents.buckets or (Shuffled if shuffle else InOrder)(len(latents), seed)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, where: Positions, /) -> CachedBatch:
        damaged: list[tuple[str, str]] = []
        while True:
            try:
                return replace(self._batch(np.asarray(where, np.int64)), damaged=damaged)
            except MissingImage as gone:
                self.latents.damaged[gone.index] = True
                damaged.append((gone.name, gone.reason))

    def _batch(self, at: NDArray[np.int64]) -> CachedBatch:
        seed, latents = self.seed, self.latents
        indices = self.order.at(at)
        for k in np.flatnonzero(latents.damaged[indices]).tolist():
            tried = (self.order.substitute(int(at[k]), attempt) for attempt in range(1, ATTEMPTS + 1))
            indices[k] = next((index for index in tried if not latents.damaged[index]), -1)
            if indices[k] < 0:
                raise RunError("found no readable image among those of one shape: leave out input.buckets")
        crops = (uniform(seed, Purpose.CROP, at) * latents.crops).astype(np.int64)
        flips = uniform(seed, Purpose.FLIP, at) < 0.5 if latents.flip else np.zeros(len(at), bool)
        shape, pixels, masks = latents.shape(int(indices[0])), None, None
        if self.originals is not None:
            pixels = self.originals.gather(indices, crops, flips)
            masks = masking(seed, at, (pixels.shape[3], pixels.shape[2]), shape)
        drawn = self.noising.draw(seed, at, shape, masks)
        rows = self.text.rows(indices, uniform(seed, Purpose.CAPTION, at))
        rows[drawn.dropped.numpy()] = 0
        mean, std = latents.gather(indices, crops, flips).unbind(1)
        return CachedBatch(
            position=torch.from_numpy(at),
            index=torch.from_numpy(indices),
            mean=mean,
            std=std,
            condition=self.text.gather(rows),
            drawn=drawn,
            pixels=pixels,
        )
