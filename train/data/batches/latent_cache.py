"""Latent cache: the posteriors that a frozen autoencoder computes for a source's images, computed once.

Stage 2 reads them from disk (train/data/store/shards.py) and doesn't run the autoencoder. Each combination of weights,
transform and number type has its own folder; the latent of a changed image is computed again.
"""

import hashlib
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
from train.data.images.decode import DamagedImage
from train.data.sources.splits import Source
from train.data.store.prefetch import read_ahead
from train.data.store.row_index import Digests, digest, digests, image_keys, repeated
from train.data.store.shards import Made, Processes, Shards, Stored, open_shards

_PIXELS = 2**22  # encoded at once, at most: 16 images of 512²; an autoencoder in fp32 takes about 1 GB for each


class ImageEncoder(Protocol):
    """Frozen encoder: images (b, 3, H, W) in [−1, 1] → mean and deviation of scaled latents, (b, c, h, w) each."""

    def __call__(self, pixels: Tensor, /) -> tuple[Tensor, Tensor]: ...


class LatentCache:
    """Posterior of each image's latent: mean and standard deviation, as the encoder returned them.

    damaged: (n,) bool, images that can't be read and have no latent. crops: number of windows per image. flip:
    whether each window is also mirrored. With buckets, images of one rectangle have latents of one shape.
    """

    def __init__(
        self,
        shards: Sequence[Shards],
        crops: int,
        flip: bool,
        damaged: NDArray[np.bool_],
        buckets: Buckets | None = None,
    ) -> None:
        self.shards, self.crops, self.flip, self.damaged, self.buckets = list(shards), crops, flip, damaged, buckets
        self._place = np.arange(len(damaged))  # index of each image within its rectangle
        for members in buckets.members if buckets else ():
            self._place[members] = np.arange(len(members))

    def __len__(self) -> int:
        return len(self.damaged)

    def shape(self, index: int) -> tuple[int, ...]:
        """Return the shape (c, h, w) of an image's latent."""
        return self._of(index).shape[1:]

    def _of(self, index: int) -> Shards:
        return self.shards[self.buckets.of[index] if self.buckets else 0]

    def gather(
        self, indices: NDArray[np.int64], crop: NDArray[np.int64] | int = 0, mirrored: NDArray[np.bool_] | bool = False
    ) -> Tensor:
        """Return mean and standard deviation of these images' windows, (b, 2, c, h, w) float32.

        All images must have one shape.
        """
        rows = (self._place[indices] * self.crops + crop) * (1 + self.flip) + mirrored
        return self._of(int(indices[0])).gather(rows)

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
        crops: int = 1,
        buckets: Buckets | None = None,
        dtype: Stored = "float32",
        batch_size: int | None = None,
        workers: int = 0,
        processes: Processes | None = None,
        note: Callable[[int, list[tuple[str, str]]], object] = lambda readable, damaged: None,
    ) -> Self:
        """Open the cache of a source under `folder`, and complete it if needed; `encode` runs only for missing latents.

        digest: hash of the encoder's weights and of everything else its output depends on. channels: of a latent.
        factor: side of an image divided by the side of its latent. crops: random windows per image, fixed by the
        image's name. With framing.flip, latents of the mirrored images are cached too. batch_size: images encoded
        at once, by default as a GPU's memory allows. note: called with the number of readable images, and the (name,
        reason) of each that can't be read. Raises RunError if no image can be read, if the encoder returns another
        shape or non-finite numbers, or if the disk is full.
        """
        processes = processes or Processes()
        sizes = buckets.sizes if buckets else [framing.square]
        members = buckets.members if buckets else [np.arange(len(source))]
        keys = image_keys(source)
        ambiguous = repeated(keys)
        shards: list[Shards] = []
        reasons: dict[int, str] = {}
        for size, those in zip(sizes, members, strict=True):
            shape = (2, channels, size[1] // factor, size[0] // factor)
            how = {"encoder": digest, "size": size, "crops": crops, "resampling": "lanczos", **asdict(framing)}
            windows = _Windows(source, those, size, framing, crops)
            at_once = batch_size or min(64, max(1, _PIXELS // (size[0] * size[1])))
            rows = _Latents(windows, keys[those], ambiguous[those], encode, shape, dtype, workers)
            opened, bad = open_shards(folder, "latents", how, rows, shape, dtype, processes, at_once)
            shards.append(opened)
            reasons |= {int(those[row // windows.views]): reason for row, reason in bad}
        damaged = np.zeros(len(source), bool)
        damaged[list(reasons)] = True
        if damaged.all():
            raise RunError(f"not one image of {source.place} can be read, e.g. {source[0].name}: {reasons[0]}")
        listed = [(source[k].name, reason) for k, reason in sorted(reasons.items())]
        if processes.rank == 0:
            note(len(source) - len(listed), listed)
        processes.barrier()  # so that the others see what is listed already
        if processes.rank != 0:
            note(len(source) - len(listed), listed)
        return cls(shards, crops, framing.flip, damaged, buckets)


class _Window(NamedTuple):
    """An image as input of the encoder."""

    pixels: Tensor  # (3, H, W); zeros if it can't be read
    content: Digests  # (2,)
    bad: str


class _Windows:
    """Windows of images by row. Rows are ordered by index among `members`, then crop, then plain or mirrored."""

    def __init__(self, source: Source, members: NDArray[np.int64], size: Size, framing: Framing, crops: int) -> None:
        self.source, self.members, self.size, self.framing, self.crops = source, members, size, framing, crops
        self.views = crops * (1 + framing.flip)

    def __len__(self) -> int:
        return len(self.members) * self.views

    def content(self, image: int) -> Digests:
        """Return the digest, (2,), of the file of an image, or of the reason why it can't be read.

        image: index among the members.
        """
        try:
            return digest(self.source.read(int(self.members[image])))
        except DamagedImage as error:
            return digest(error.reason.encode())

    def __getitems__(self, rows: Sequence[int], /) -> list[_Window]:
        windows: list[_Window] = []
        for member, own in _runs(rows, self.views):
            index, empty = int(self.members[member]), torch.zeros(3, self.size[1], self.size[0])
            name, content = self.source[index].name, None
            try:
                file = self.source.read(index)
                content = digest(file)
                image = self.framing.load(file, name)
                for row in own:
                    crop, flip = divmod(row % self.views, 1 + self.framing.flip)
                    pixels = self.framing.cut(image, self.size, stored_place(name, crop), bool(flip))
                    windows.append(_Window(pixels, content, ""))
            except DamagedImage as error:
                content = digest(error.reason.encode()) if content is None else content
                windows += [_Window(empty, content, error.reason) for _ in own]
        return windows


class _Latents:
    """`Rows` of posteriors."""

    def __init__(
        self,
        windows: _Windows,
        keys: Digests,
        ambiguous: NDArray[np.bool_],
        encode: ImageEncoder,
        shape: tuple[int, ...],
        dtype: Stored,
        workers: int,
    ) -> None:
        """keys, ambiguous: those of the windows' images."""
        self.windows, self.encode, self.shape, self.dtype, self.workers = windows, encode, shape, dtype, workers
        self.keys = np.repeat(keys, windows.views, 0)
        self.keys[:, 0] += np.tile(np.arange(windows.views, dtype=np.uint64), len(keys))
        self.ambiguous = np.repeat(ambiguous, windows.views)
        self._at_once = 2**31

    def weak_keys(self, rows: NDArray[np.int64]) -> Digests:
        images, views = np.divmod(rows, self.windows.views)
        images, which = np.unique(images, return_inverse=True)
        files = (self.windows.source[k] for k in self.windows.members[images].tolist())
        weak_keys = digests(json.dumps([file.name, file.size]) for file in files)[which]
        weak_keys[:, 0] += views.astype(np.uint64)
        return weak_keys

    def contents(self, rows: NDArray[np.int64]) -> Digests:
        images, which = np.unique(rows // self.windows.views, return_inverse=True)
        contents = np.empty((len(images), 2), np.uint64)
        with ThreadPoolExecutor(8) as pool, tqdm(total=len(images), desc="comparing", leave=False, delay=2) as bar:
            for k in range(0, len(images), 1024):  # threads, as reading and hashing release the interpreter lock
                part = images[k : k + 1024].tolist()
                contents[k : k + 1024] = list(pool.map(self.windows.content, part))
                bar.update(len(part))
        return contents[which]

    def make(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Made]:
        read = read_ahead(self.windows, (rows.tolist() for rows in batches), self.workers)
        for rows, windows in zip(batches, read, strict=True):
            both = self._encoded(torch.stack([w.pixels for w in windows]))
            both[[k for k, w in enumerate(windows) if w.bad]] = 0
            first = self.windows.source[int(self.windows.members[rows[0] // self.windows.views])].name
            values = storable(both, self.shape, self.dtype, first)
            yield Made(values, np.stack([w.content for w in windows]), [w.bad for w in windows])

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> Tensor:
        """Encode (b, 3, H, W) to (b, 2, c, h, w), in smaller parts if memory is short."""
        while True:
            try:
                parts = pixels.split(self._at_once)
                return torch.cat([torch.stack(list(self.encode(part)), 1) for part in parts])
            except torch.OutOfMemoryError:
                self._at_once = min(self._at_once, len(pixels)) // 2
                if not self._at_once:
                    raise


def stored_place(name: str, crop: int) -> tuple[float, float]:
    """Return the place of an image's crop-th stored window, in [0, 1) across and down. Depends only on the name."""
    digest = hashlib.blake2b(f"{crop} {name}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:]) / 2**32


def _runs(rows: Sequence[int], views: int) -> Iterator[tuple[int, list[int]]]:
    """Group the rows of each image, so that a file is decoded once for all its windows in a batch."""
    own: list[int] = []
    for row in rows:
        if own and row // views != own[0] // views:
            yield own[0] // views, own
            own = []
        own.append(row)
    if own:
        yield own[0] // views, own


def storable(values: Tensor, shape: tuple[int, ...], dtype: Stored, first: str) -> NDArray[Any]:
    """Return the encoder's output in the stored type. first: name of the batch's first image, for messages.

    Raises RunError if the output has another shape, or numbers that aren't finite in this type.
    """
    if tuple(values.shape[1:]) != shape:
        raise RunError(f"the encoder gave {tuple(values.shape[1:])} where {shape} was expected")
    kept = values.cpu().to(getattr(torch, dtype))
    if not kept.isfinite().all():
        raise RunError(f"the encoder gave numbers not finite in {dtype}, in the batch that begins with {first}")
    return kept.numpy()
