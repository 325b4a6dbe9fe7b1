"""Variants of captions that are lists of tags: some tags left out, and in another order.

A tag is the text between two commas. The variants of a caption are a function of the seed and its text, so that their
features can be cached; training draws one of them, as it draws one of an image's captions.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from train.data.order.rng import Purpose, generator
from train.data.sources.catalogue import Row


class TagVariants(NamedTuple):
    """Settings of the variants."""

    seed: int
    dropout: float
    """Probability with which each tag is left out; one tag always remains."""
    shuffle: bool
    """Whether tags are in random order."""
    number: int
    """Number of variants of each caption."""

    def __call__(self, row: Row) -> Row:
        """Return an image's row with the variants of all its captions, equally many of each."""
        return row._replace(
            captions=tuple(variant for caption in row.captions for variant in self.of(caption)),
            weights=tuple(weight for weight in row.weights for _ in range(self.number)),
        )

    def of(self, caption: str) -> list[str]:
        """Return the variants of a caption; a caption of one tag stays as it is."""
        tags = [tag for part in caption.split(",") if (tag := part.strip())]
        if len(tags) < 2:
            return [caption] * self.number
        key = int.from_bytes(hashlib.blake2b(caption.encode(errors="replace"), digest_size=8).digest(), "little")
        random = generator(self.seed, Purpose.TAGS, key)
        u, places = random.random((self.number, len(tags))), random.random((self.number, len(tags)))
        kept = u >= np.minimum(self.dropout, u.max(1, keepdims=True))
        order = places.argsort(1) if self.shuffle else np.tile(np.arange(len(tags)), (self.number, 1))
        return [", ".join(tags[k] for k in row if keep[k]) for row, keep in zip(order, kept, strict=True)]
