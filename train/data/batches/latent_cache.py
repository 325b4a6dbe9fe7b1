"""Latent cache: the posteriors that a frozen autoencoder computes for a source's images, computed once.

Stage 2 reads them from disk (train/data/store/shards.py) and doesn't run the autoencoder. Each combination of weights,
transform and number type has its own folder; the latent of a changed image is computed again.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.errors import RunError
from train.data.batches.buckets import Buckets
from train.data.images.crop import Framing, Size
from train.data.images.decode import DamagedImage, UnknownFormat, check_format
from train.data.sources.splits import Source
from train.data.store.prefetch import read_ahead
from train.data.store.row_index import Digests, digest, digests, duplicated, image_keys
from train.data.store.shards import ComputedRows, Processes, Shards, Stored, open_shards

_PIXELS_AT_ONCE = 2**22  # 16 images of 512 × 512; an autoencoder in fp32 needs about 1 GB for each


class ImageEncoder(Protocol):
    """Frozen encoder: images (b, 3, H, W) in [−1, 1] → mean and standard deviation of scaled latents, (b, c, h, w).

    If the cache has a last layer, the encoder's output is the input of this layer instead, in two halves.
    """

    def __call__(self, pixels: Tensor, /) -> tuple[Tensor, Tensor]: ...


LastLayer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function from what the cache stores of each image, (b, 2c, h, w), to mean and standard deviation of its latents."""


class LatentCache:
    """Posterior of each image's latent: mean and standard deviation, as the encoder returned them.

    With a last layer, they are its outputs for what the encoder returned, computed at each read. damaged: (n,) bool,
    true for unreadable images, which have no latent. crops: number of crops per image. flip: whether each crop is also
    stored mirrored. With buckets, images of one rectangle have latents of one shape.
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        crops: int,
        flip: bool,
        damaged: NDArray[np.bool_],
        buckets: Buckets | None = None,
        last_layer: LastLayer | None = None,
    ) -> None:
        self.shards, self.crops, self.flip, self.damaged, self.buckets = list(shards), crops, flip, damaged, buckets
        self.last_layer = last_layer
        self._member = np.arange(len(damaged))  # index of each image within its bucket
        for members in buckets.members if buckets else ():
            self._member[members] = np.arange(len(members))

    def __len__(self) -> int:
        return len(self.damaged)

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the shape (c, h, w) of an image's latent."""
        return self._shards_of(index).shape[1:]

    def _shards_of(self, index: int) -> Shards:
        return self.shards[self.buckets.bucket_of[index] if self.buckets else 0]

    def gather(
        self, indices: NDArray[np.int64], crop: NDArray[np.int64] | int = 0, mirrored: NDArray[np.bool_] | bool = False
    ) -> Tensor:
        """Return mean and standard deviation of the images' latents, (b, 2, c, h, w) float32.

        crop: number of each image's crop. mirrored: whether it is mirrored. All latents must have one shape.
        """
        rows = (self._member[indices] * self.crops + crop) * (1 + self.flip) + mirrored
        stored = self._shards_of(int(indices[0])).gather(rows)
        return stored if self.last_layer is None else torch.stack(self.last_layer(stored.flatten(1, 2)), 1)

    @classmethod
    def open(
        cls,
        folder: Path,
        source: Source,
        encode: ImageEncoder,
        *,
        digest: str,
        framing: Framing,
        channels: int,
        factor: int,
        last_layer: LastLayer | None = None,
        crops: int = 1,
        buckets: Buckets | None = None,
        dtype: Stored = "float32",
        batch_size: int | None = None,
        workers: int = 0,
        processes: Processes | None = None,
        count: Callable[[int, list[tuple[str, str]]], object] = lambda readable, unreadable: None,
    ) -> Self:
        """Open the cache of a source under `folder`, and complete it if needed; `encode` runs only for missing latents.

        digest: hash of the encoder's weights and of everything else its output depends on; not of the last layer.
        channels: channels of a latent. factor: side of an image divided by the side of its latent. crops: random crops
        per image, fixed by the image's name. With framing.flip, latents of the mirrored images are cached too.
        batch_size: images encoded at once, by default as many as fit into a GPU's memory. count: called with the number
        of readable images, and the (name, reason) of each unreadable one. Raises RunError if no image can be read, if
        the encoder returns another shape or non-finite numbers, or if the disk is full.
        """
        processes = processes or Processes()
        sizes = buckets.sizes if buckets else [framing.square]
        members = buckets.members if buckets else [np.arange(len(source))]
        keys = image_keys(source)
        ambiguous = duplicated(keys)
        shards: list[Shards] = []
        reasons: dict[int, str] = {}
        for size, images in zip(sizes, members, strict=True):
            shape = (2, channels, size[1] // factor, size[0] // factor)
            depends_on = {"encoder": digest, "size": size, "crops": crops, "resampling": "lanczos", **asdict(framing)}
            views = _Views(source, images, size, framing, crops)
            at_once = batch_size or min(64, max(1, _PIXELS_AT_ONCE // (size[0] * size[1])))
            rows = _Latents(views, keys[images], ambiguous[images], encode, shape, dtype, workers)
            opened, bad = open_shards(folder, "latents", depends_on, rows, shape, dtype, processes, at_once)
            shards.append(opened)
            reasons |= {int(images[row // views.per_image]): reason for row, reason in bad}
        damaged = np.zeros(len(source), bool)
        damaged[list(reasons)] = True
        if damaged.all():
            raise RunError(f"none of the images in {source.location} can be read, e.g. {source[0].name}: {reasons[0]}")
        unreadable = [(source[k].name, reason) for k, reason in sorted(reasons.items())]
        if processes.rank == 0:
            count(len(source) - len(unreadable), unreadable)
        processes.barrier()  # so that the others read the report of the first
        if processes.rank != 0:
            count(len(source) - len(unreadable), unreadable)
        return cls(shards, crops, framing.flip, damaged, buckets, last_layer)


class _View(NamedTuple):
    """A crop of an image, plain or mirrored: an input of the encoder."""

    pixels: Tensor  # (3, H, W); zeros if the image can't be read
    content: Digests  # (2,)
    bad: str  # reason why the image can't be read, or an empty text


class _Views:
    """Views of images by row. Rows are ordered by index among `members`, then crop, then plain or mirrored."""

    def __init__(self, source: Source, members: NDArray[np.int64], size: Size, framing: Framing, crops: int) -> None:
        self.source, self.members, self.size, self.framing, self.crops = source, members, size, framing, crops
        self.per_image = crops * (1 + framing.flip)

    def __len__(self) -> int:
        return len(self.members) * self.per_image

    def content(self, image: int) -> Digests:
        """Return the digest of an image's file, or of the reason why it can't be read, (2,).

        A file of an unknown format counts as one that can't be read, so that it is tried again when a package for its
        format is installed. image: index among the members.
        """
        try:
            file = self.source.read(int(self.members[image]))
            check_format(file, "")
            return digest(file)
        except DamagedImage as error:
            return digest(error.reason.encode())

    def __getitems__(self, rows: Sequence[int], /) -> list[_View]:
        views: list[_View] = []
        for member, image_rows in _by_image(rows, self.per_image):
            index, empty = int(self.members[member]), torch.zeros(3, self.size[1], self.size[0])
            name, content = self.source[index].name, None
            try:
                file = self.source.read(index)
                content = digest(file)
                image = self.framing.load(file, name)
                for row in image_rows:
                    crop, flip = divmod(row % self.per_image, 1 + self.framing.flip)
                    pixels = self.framing.apply(image, self.size, stored_place(name, crop), bool(flip))
                    views.append(_View(pixels, content, ""))
            except DamagedImage as error:
                if content is None or isinstance(error, UnknownFormat):
                    content = digest(error.reason.encode())
                views += [_View(empty, content, error.reason) for _ in image_rows]
        return views


class _Latents:
    """Computation of the latents' posteriors, as rows of a cache (`Rows`)."""

    def __init__(
        self,
        views: _Views,
        keys: Digests,
        ambiguous: NDArray[np.bool_],
        encode: ImageEncoder,
        shape: tuple[int, ...],
        dtype: Stored,
        workers: int,
    ) -> None:
        """keys: key of each image, (n, 2). ambiguous: whether another image has the same key, (n,)."""
        self.views, self.encode, self.shape, self.dtype, self.workers = views, encode, shape, dtype, workers
        self.keys = np.repeat(keys, views.per_image, 0)
        self.keys[:, 0] += np.tile(np.arange(views.per_image, dtype=np.uint64), len(keys))
        self.ambiguous = np.repeat(ambiguous, views.per_image)
        self._images_at_once = 2**31

    def weak_keys(self, rows: NDArray[np.int64]) -> Digests:
        images, numbers = np.divmod(rows, self.views.per_image)
        images, inverse = np.unique(images, return_inverse=True)
        files = (self.views.source[k] for k in self.views.members[images].tolist())
        weak_keys = digests(json.dumps([file.name, file.size]) for file in files)[inverse]
        weak_keys[:, 0] += numbers.astype(np.uint64)
        return weak_keys

    def contents(self, rows: NDArray[np.int64]) -> Digests:
        images, inverse = np.unique(rows // self.views.per_image, return_inverse=True)
        contents = np.empty((len(images), 2), np.uint64)
        with ThreadPoolExecutor(8) as pool, tqdm(total=len(images), desc="comparing", leave=False, delay=2) as bar:
            for k in range(0, len(images), 1024):  # threads, because reading and hashing release the interpreter lock
                part = images[k : k + 1024].tolist()
                contents[k : k + 1024] = list(pool.map(self.views.content, part))
                bar.update(len(part))
        return contents[inverse]

    def compute(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[ComputedRows]:
        prefetched = read_ahead(self.views, (rows.tolist() for rows in batches), self.workers)
        for rows, views in zip(batches, prefetched, strict=True):
            posteriors = self._encoded(torch.stack([view.pixels for view in views]))
            posteriors[[k for k, view in enumerate(views) if view.bad]] = 0
            first = self.views.source[int(self.views.members[rows[0] // self.views.per_image])].name
            values = storable(posteriors, self.shape, self.dtype, first)
            yield ComputedRows(values, np.stack([view.content for view in views]), [view.bad for view in views])

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> Tensor:
        """Encode (b, 3, H, W) to (b, 2, c, h, w), in smaller parts if memory is short."""
        while True:
            try:
                parts = pixels.split(self._images_at_once)
                return torch.cat([torch.stack(list(self.encode(part)), 1) for part in parts])
            except torch.OutOfMemoryError:
                self._images_at_once = min(self._images_at_once, len(pixels)) // 2
                if not self._images_at_once:
                    raise


def stored_place(name: str, crop: int) -> tuple[float, float]:
    """Return the position of an image's cached crop, across and down, in [0, 1). It depends only on name and number."""
    digest = hashlib.blake2b(f"{crop} {name}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:]) / 2**32


def _by_image(rows: Sequence[int], per_image: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (image, rows) for consecutive rows of one image, so that its file is decoded once for all of them."""
    for image, group in itertools.groupby(rows, lambda row: row // per_image):
        yield image, list(group)


def storable(values: Tensor, shape: tuple[int, ...], dtype: Stored, first: str) -> NDArray[Any]:
    """Return the encoder's output in the stored type. first: name of the batch's first image, for messages.

    Raises RunError if the output has another shape, or numbers that aren't finite in this type.
    """
    if tuple(values.shape[1:]) != shape:
        raise RunError(f"the encoder returned the shape {tuple(values.shape[1:])}, but {shape} was expected")
    kept = values.cpu().to(getattr(torch, dtype))
    if not kept.isfinite().all():
        raise RunError(
            f"the encoder returned numbers that aren't finite in {dtype}, in the batch that starts with {first}"
        )
    return kept.numpy()
