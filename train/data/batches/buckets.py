"""Aspect-ratio buckets: rectangles of about equal area, so that crops remove little of an image.

Each image belongs to the rectangle nearest in aspect ratio, and a batch contains the images of one bucket (NovelAI
2022, "Improvements on Stable Diffusion"). This requires every image's size, which is read once and cached.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from train.data.images.crop import Size
from train.data.images.decode import DamagedImage, image_size
from train.data.order.permutation import permute, substitute
from train.data.order.rng import Positions, Purpose, fork
from train.data.sources.splits import Source
from train.data.store.prefetch import read_ahead
from train.data.store.row_index import Digests, digests, duplicated, image_keys
from train.data.store.shards import ComputedRows, Processes, open_shards

_BATCH_SIZE = 256  # images whose sizes are read in one batch


def bucket_sizes(resolution: int, step: int, ratio: float) -> list[Size]:
    """Return the largest rectangles of at most resolution² pixels whose sides are multiples of `step`.

    The longer side is at most `ratio` × the shorter one. The square is included. Raises UserError if the resolution
    isn't a multiple of `step`.
    """
    if resolution % step:
        raise UserError(f"--input.resolution {resolution}: must be a multiple of --input.buckets {step}")
    area, wide = resolution**2, []
    for height in range(step, resolution + 1, step):
        width = area // height // step * step
        if width <= ratio * height:
            wide.append((width, height))
    return sorted({*wide, *((height, width) for width, height in wide)}, key=lambda size: size[0] / size[1])


def no_rectangles(resolution: int, step: int, ratio: float, multiple: int = 1) -> str:
    """Return a warning if the square is the only rectangle (see `bucket_sizes`), else an empty text.

    multiple: number of which `step` must be a multiple.
    """
    if len(bucket_sizes(resolution, step, ratio)) > 1:
        return ""
    steps = [n for n in range(step - 1, 0, -1) if resolution % n == 0 and n % multiple == 0]
    smaller = next((n for n in steps if len(bucket_sizes(resolution, n, ratio)) > 1), 0)
    remedy = f"set --input.buckets {smaller}" if smaller else "give a higher --input.bucket-ratio or --input.resolution"
    return (
        f"--input.buckets {step} has no effect: with --input.resolution {resolution} and --input.bucket-ratio "
        f"{ratio:g}, {resolution}×{resolution} is the only rectangle, so every image is cropped to a square; {remedy}, "
        "or leave the option out"
    )


class Buckets:
    """Rectangle of each image, and an `Order` whose batches each contain images of one rectangle.

    An epoch contains every image at least once. A bucket's last batch is filled with images from the start of the
    bucket, which therefore appear twice. In a bucket smaller than a batch they would repeat more often, so merge such
    buckets with a neighbour first (`assign`).
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        bucket_of: NDArray[np.int64],
        batch_size: int,
        seed: int,
        merged: int = 0,
        repeats: NDArray[np.int64] | None = None,
    ) -> None:
        """bucket_of: (n,) index in `sizes` per image. batch_size: of all processes. merged: count of merged sizes.

        repeats: number of times of each image in an epoch, (n,).
        """
        self.sizes, self.bucket_of, self.batch_size, self.seed = list(sizes), bucket_of, batch_size, seed
        self.merged = merged
        counts = np.bincount(bucket_of, minlength=len(sizes))
        self.members = np.split(np.argsort(bucket_of, kind="stable"), np.cumsum(counts)[:-1])
        self.epochs = self.members  # the images of each bucket, as often as an epoch contains them
        if repeats is not None:
            self.epochs = [np.repeat(members, repeats[members]) for members in self.members]
            counts = np.array([len(epoch) for epoch in self.epochs])
        self.batches = -(-counts // batch_size)  # number of batches of each bucket in an epoch
        self.length = int(self.batches.sum()) * batch_size
        self.filled = self.length - int(counts.sum())

    @classmethod
    def assigned(
        cls,
        shapes: NDArray[np.int64],
        sizes: Sequence[Size],
        batch_size: int,
        seed: int,
        repeats: NDArray[np.int64] | None = None,
    ) -> Self:
        """Assign each image to the nearest of the sizes that have at least a batch of images.

        shapes: width and height of each image, (n, 2). repeats: number of times of each in an epoch, (n,).
        """
        bucket_of = assign(shapes, sizes, batch_size, repeats)
        merged = len(set(assign(shapes, sizes).tolist())) - len(set(bucket_of.tolist()))
        return cls(sizes, bucket_of, batch_size, seed, merged, repeats)

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """Index of each bucket's first batch."""
        return np.cumsum(self.batches) - self.batches

    @property
    def identity(self) -> str:
        content = hashlib.sha256(repr([self.sizes, self.batch_size, self.seed]).encode())
        content.update(b"".join(epoch.tobytes() for epoch in self.epochs))
        return content.hexdigest()

    def at(self, positions: Positions) -> NDArray[np.int64]:
        steps, slots = np.divmod(np.asarray(positions, np.int64), self.batch_size)
        indices = np.empty_like(slots)
        for step in np.unique(steps):
            epoch, place = divmod(int(step), int(self.batches.sum()))
            batch = int(permute([place], int(self.batches.sum()), fork(self.seed, Purpose.BUCKET), epoch)[0])
            bucket = int(np.searchsorted(self._first, batch, side="right")) - 1
            members, in_step = self.epochs[bucket], steps == step
            places = ((batch - self._first[bucket]) * self.batch_size + slots[in_step]) % len(members)
            indices[in_step] = members[permute(places, len(members), self.seed, epoch)]
        return indices

    def substitute(self, position: int, attempt: int) -> int:
        members = self.epochs[self.bucket_of[self.at([position])[0]]]
        return int(members[substitute(position, attempt, len(members), self.seed)])

    def size(self, index: int) -> Size:
        return self.sizes[self.bucket_of[index]]

    def __str__(self) -> str:
        used = sorted(
            ((len(m), size) for m, size in zip(self.members, self.sizes, strict=True) if len(m)), reverse=True
        )
        listed = ", ".join(f"{w}×{h}: {count:,}" for count, (w, h) in used[:12]) + (", …" if len(used) > 12 else "")
        merged = f"; {self.merged} shapes with fewer images than a batch were merged with others" if self.merged else ""
        if len(used) == 1 < len(self.sizes):
            merged += "; all images are in one bucket, so the other shapes aren't used"
        return (
            f"{len(used)} bucket{'s' * (len(used) > 1)} ({listed}); an epoch has {int(self.batches.sum()):,} batches, "
            f"in which {self.filled:,} images are repeats{merged}"
        )


def assign(
    shapes: NDArray[np.int64], sizes: Sequence[Size], least: int = 1, repeats: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Return the nearest of the sizes, (n,), for each image's width and height, (n, 2).

    The sizes must be in ascending order of width / height. While a size has fewer than `least` images, the size with
    the fewest is removed. repeats: number of times that each image counts, (n,).
    """
    ratios = np.log([width / height for width, height in sizes])
    image_ratios = np.log(shapes[:, 0] / shapes[:, 1])
    kept = np.arange(len(sizes))
    while True:
        between = (ratios[kept][1:] + ratios[kept][:-1]) / 2
        nearest = np.searchsorted(between, image_ratios)
        counts = np.bincount(nearest, repeats, minlength=len(kept))
        if len(kept) == 1 or counts.min() >= least:
            return kept[nearest]
        kept = np.delete(kept, counts.argmin())


def measure(
    source: Source, folder: Path, max_pixels: int, workers: int, processes: Processes
) -> tuple[NDArray[np.int64], list[tuple[str, str]]]:
    """Return each image's width and height after EXIF rotation, (n, 2), and the (name, reason) of unreadable images.

    The sizes are cached under `folder`. An unreadable image has width and height 0.
    """
    rows = _Shapes(source, max_pixels, workers)
    depends_on = {"max_pixels": max_pixels}
    shards, bad = open_shards(folder, "sizes", depends_on, rows, (2,), "float32", processes, _BATCH_SIZE)
    shapes = shards.gather(np.arange(len(source))).numpy().astype(np.int64)
    return shapes, [(source[k].name, reason) for k, reason in bad]


class _Shapes:
    """Computation of each image's width and height, as rows of a cache (`Rows`)."""

    def __init__(self, source: Source, max_pixels: int, workers: int) -> None:
        self.headers, self.workers = _Headers(source, max_pixels), workers
        self.keys = image_keys(source)
        self.ambiguous = duplicated(self.keys)

    def weak_keys(self, rows: NDArray[np.int64]) -> Digests:
        return self.keys[rows]  # no search by content: reading a header is cheaper than hashing the file

    def contents(self, rows: NDArray[np.int64]) -> Digests:
        return digests(map(str, self.headers.__getitems__(rows.tolist())))

    def compute(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[ComputedRows]:
        for shapes in read_ahead(self.headers, (rows.tolist() for rows in batches), self.workers):
            values = np.array([(0, 0) if isinstance(shape, str) else shape for shape in shapes], np.float32)
            bad = [shape if isinstance(shape, str) else "" for shape in shapes]
            yield ComputedRows(values, digests(map(str, shapes)), bad)


class _Headers:
    """Reader of each image's width and height, or the reason why they can't be read."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels

    def __getitems__(self, indices: Sequence[int], /) -> list[Size | str]:
        return [self._shape(k) for k in indices]

    def _shape(self, index: int) -> Size | str:
        try:
            return image_size(self.source.read(index), name=self.source[index].name, max_pixels=self.max_pixels)
        except DamagedImage as error:
            return error.reason
