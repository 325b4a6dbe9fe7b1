"""What frozen networks make of a source, computed once: posteriors of pictures, features of captions.

Stage 2 then reads both from disk (train/data/shards.py) and runs neither the autoencoder nor the text encoder. Other
weights, another transform or another kind of number have other folders; a changed picture or caption is made anew.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import RunError
from train.data.decode import DamagedPicture, load_picture, to_tensor
from train.data.shards import Bad, Processes, Shards, Stored, open_shards
from train.data.sources import Source
from train.data.workers import read_ahead


class PictureEncoder(Protocol):
    """Pictures (b, 3, H, W) in [−1, 1] → mean and standard deviation of their latents, (b, c, h, w) each, scaled."""

    def __call__(self, pixels: Tensor, /) -> tuple[Tensor, Tensor]: ...


class CaptionEncoder(Protocol):
    """Captions → (b, L, d)."""

    def __call__(self, captions: Sequence[str], /) -> Tensor: ...


class LatentCache:
    """The posterior of each picture's latent: `shape` (c, h, w), mean and deviation, as the encoder gave them.

    damaged: (n,) bool, pictures that can't be read and have no latent. views: 2 where each picture is also there
    mirrored, else 1.
    """

    def __init__(self, shards: Shards, views: int, damaged: NDArray[np.bool_]) -> None:
        self.shards, self.views, self.damaged = shards, views, damaged
        self.shape: tuple[int, ...] = shards.shape[1:]

    def __len__(self) -> int:
        return len(self.damaged)

    def gather(self, indices: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> Tensor:
        """(b, 2, c, h, w) float32: mean and deviation of these pictures. mirrored needs 2 views."""
        rows = indices * self.views
        return self.shards.gather(rows if mirrored is None else rows + mirrored)

    @classmethod
    def open(
        cls,
        folder: Path,
        source: Source,
        encode: PictureEncoder,
        *,
        digest: str,
        resolution: int,
        shape: tuple[int, ...],
        flip: bool = False,
        dtype: Stored = "float32",
        batch_size: int = 32,
        workers: int = 0,
        processes: Processes | None = None,
        note: Callable[[int, list[tuple[str, str]]], object] = lambda readable, damaged: None,
    ) -> Self:
        """The cache of a source under `folder`, completed where it isn't; `encode` isn't called if nothing is missing.

        Pictures are cropped about their centre. digest: of the encoder's weights and whatever else its output depends
        on. shape: (c, h, w). flip: keep the mirrored pictures' latents too. note: told how many pictures can be read,
        and the (name, reason) of each that can't. Raises RunError when none can, when the encoder gives another shape
        or numbers that aren't finite, and when the disk has no room.
        """
        processes, views = processes or Processes(), 1 + flip
        squares = _Squares(source, resolution, views)

        def make(ranges: Sequence[range], advance: Callable[[int], object]) -> Iterator[tuple[NDArray[Any], Bad]]:
            batches = read_ahead(squares, [part for rows in ranges for part in _cut(rows, batch_size)], workers)
            for rows in ranges:
                values, bad = [], Bad()
                for part in _cut(rows, batch_size):
                    pixels, failed = next(batches)
                    with torch.no_grad():
                        both = torch.stack(list(encode(pixels)), 1)  # (b, 2, c, h, w)
                    both[[row - part.start for row, _ in failed]] = 0
                    name = source.names[part.start // views]
                    values.append(_stored(both, (len(part), 2, *shape), dtype, name))
                    bad += failed
                    advance(len(part))
                yield np.concatenate(values), bad

        how = {"encoder": digest, "resolution": resolution, "transform": "center, lanczos", "flip": flip}
        files = zip(source.names, source.sizes.tolist(), source.mtimes_ns.tolist(), strict=True)
        keys = [json.dumps([*file, view]) for file in files for view in range(views)]
        shards, bad = open_shards(folder, "latents", how, keys, (2, *shape), dtype, make, processes)
        reasons = {row // views: reason for row, reason in bad}
        damaged = np.zeros(len(source), bool)
        damaged[list(reasons)] = True
        if damaged.all():
            raise RunError(f"not one picture of {source.folder} can be read, e.g. {source.names[0]}: {reasons[0]}")
        listed = [(source.names[k], reason) for k, reason in sorted(reasons.items())]
        if processes.rank == 0:
            note(len(source) - len(listed), listed)
        processes.barrier()  # the others then see what is listed already
        if processes.rank != 0:
            note(len(source) - len(listed), listed)
        return cls(shards, views, damaged)


class TextCache:
    """The features (L, d) of each caption there is, once; row 0 is the null condition, the encoding of ""."""

    def __init__(self, source: Source, shards: Shards, row_of: NDArray[np.int64]) -> None:
        self.source, self.shards, self.row_of = source, shards, row_of  # row_of: of each of the source's texts

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, indices: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.int64]:
        """The row of one caption of each of these pictures, chosen by u in [0, 1)."""
        first, end = self.source.first_text[indices], self.source.first_text[indices + 1]
        return self.row_of[first + (u * (end - first)).astype(np.int64)]

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """(b, L, d) float32."""
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
        """As LatentCache.open. shape: (L, d)."""
        captions = sorted({"", *source.texts})  # "" sorts first
        row = {caption: k for k, caption in enumerate(captions)}

        def make(ranges: Sequence[range], advance: Callable[[int], object]) -> Iterator[tuple[NDArray[Any], Bad]]:
            for rows in ranges:
                values = []
                for part in _cut(rows, batch_size):
                    texts = [captions[k] for k in part]
                    with torch.no_grad():
                        values.append(_stored(encode(texts), (len(part), *shape), dtype, repr(texts[0][:80])))
                    advance(len(part))
                yield np.concatenate(values), []

        processes = processes or Processes()
        shards, _ = open_shards(folder, "text", {"encoder": digest}, captions, shape, dtype, make, processes)
        return cls(source, shards, np.array([row[text] for text in source.texts], np.int64))


class _Squares:
    """Rows → pictures as the encoder is given them, (b, 3, H, W); those that can't be read are zeros, and told."""

    def __init__(self, source: Source, resolution: int, views: int) -> None:
        self.source, self.resolution, self.views = source, resolution, views

    def __getitems__(self, rows: Sequence[int], /) -> tuple[Tensor, Bad]:
        pixels, bad = torch.zeros(len(rows), 3, self.resolution, self.resolution), Bad()
        for k, row in enumerate(rows):
            index, view = divmod(row, self.views)
            try:
                pixels[k] = to_tensor(load_picture(self.source[index].path), self.resolution, flip=bool(view))
            except DamagedPicture as error:
                bad.append((row, error.reason))
        return pixels, bad


def _cut(rows: range, size: int) -> list[range]:
    return [rows[k : k + size] for k in range(0, len(rows), size)]


def _stored(values: Tensor, shape: tuple[int, ...], dtype: Stored, first: str) -> NDArray[Any]:
    if tuple(values.shape) != shape:
        raise RunError(f"the encoder gave {tuple(values.shape)} where {shape} was expected")
    kept = values.cpu().to(getattr(torch, dtype))
    if not kept.isfinite().all():
        raise RunError(f"the encoder gave numbers not finite in {dtype}, in the batch that begins with {first}")
    return kept.numpy()
