"""Text cache: the features that a frozen text encoder computes for a source's captions, computed once.

Stage 2 reads them from disk (train/data/store/shards.py) and doesn't run the text encoder.
"""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.data.batches.latent_cache import storable
from train.data.order.rng import weighted_choice
from train.data.sources.splits import Source
from train.data.store.row_index import Digests, digests
from train.data.store.shards import ComputedRows, Processes, Shards, Stored, open_shards


class CaptionEncoder(Protocol):
    """Frozen text encoder: captions → features (b, L, d)."""

    def __call__(self, captions: Sequence[str], /) -> Tensor: ...


class TextCache:
    """Features (L, d) of each distinct caption; row 0 is the null condition, the encoding of "" (no text)."""

    def __init__(
        self,
        shards: Shards,
        captions: NDArray[np.int64],
        first: NDArray[np.int64],
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        """captions: row of each caption. first: (n + 1,), index in `captions` of each image's first caption.

        weights: of the captions in the random choice; None: all are equally likely.
        """
        self.shards, self.captions, self.first, self.weights = shards, captions, first, weights

    def __len__(self) -> int:
        return len(self.first) - 1

    def rows(self, indices: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return the row of one caption for each of these images, chosen by u in [0, 1)."""
        first, end = self.first[indices], self.first[indices + 1]
        if self.weights is None:
            return self.captions[first + (u * (end - first)).astype(np.int64)]
        own = zip(first.tolist(), end.tolist(), u.tolist(), strict=True)
        return self.captions[[a + weighted_choice(self.weights[a:b].tolist(), value) for a, b, value in own]]

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the features of these rows, (b, L, d) float32."""
        return self.shards.gather(rows)

    @classmethod
    def open(
        cls,
        folder: Path,
        source: Source,
        encode: CaptionEncoder,
        *,
        digest: str,
        shape: tuple[int, ...],
        dtype: Stored = "float32",
        batch_size: int = 256,
        processes: Processes | None = None,
    ) -> Self:
        """Open the cache of a source's captions under `folder`, and complete it if needed; see LatentCache.open.

        shape: (L, d) of a caption's features.
        """
        captions = sorted({"", *source.captions()})  # "" sorts first
        row = {caption: k for k, caption in enumerate(captions)}
        rows = _Texts(captions, encode, shape, dtype)
        depends_on = {"encoder": digest}
        shards, _ = open_shards(folder, "text", depends_on, rows, shape, dtype, processes or Processes(), batch_size)
        caption_rows, first, weights = array("q"), array("q", [0]), array("d")
        for image in source:
            caption_rows.extend(row[text] for text in image.captions)
            weights.extend(image.weights)
            first.append(len(caption_rows))
        return cls(shards, np.array(caption_rows), np.array(first), np.array(weights) if weights else None)


class _Texts:
    """Computation of caption features, as rows of a cache (`Rows`)."""

    def __init__(self, captions: Sequence[str], encode: CaptionEncoder, shape: tuple[int, ...], dtype: Stored) -> None:
        self.captions, self.encode, self.shape, self.dtype = captions, encode, shape, dtype
        self.keys, self.ambiguous = digests(captions), np.zeros(len(captions), bool)

    def weak_keys(self, rows: NDArray[np.int64]) -> Digests:
        return self.keys[rows]

    def contents(self, rows: NDArray[np.int64]) -> Digests:
        return np.zeros((len(rows), 2), np.uint64)  # a key is a digest of the caption, which is the content

    def compute(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[ComputedRows]:
        for rows in batches:
            texts = [self.captions[k] for k in rows]
            with torch.no_grad():
                values = storable(self.encode(texts), self.shape, self.dtype, repr(texts[0][:80]))
            yield ComputedRows(values, self.contents(rows), [""] * len(rows))
