"""Aspect-ratio buckets: rectangles of equal area for images of similar shape, so that crops lose little.

An image goes to the rectangle nearest in aspect ratio, and a batch holds one bucket's images (NovelAI 2022,
"Improvements on Stable Diffusion"). This requires every image's size, which is read once and cached.
"""

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
from train.data.store.row_index import Digests, digests, image_keys, repeated
from train.data.store.shards import Made, Processes, open_shards

_AT_ONCE = 256  # images whose sizes are read in one batch


def bucket_sizes(resolution: int, step: int, ratio: float) -> list[Size]:
    """Return rectangles with sides that are multiples of `step`, each as large as resolution² allows.

    The longer side is at most `ratio` × the shorter one. The square is included. Raises UserError if that is
    impossible.
    """
    if resolution % step:
        raise UserError(
            f"input.resolution {resolution} isn't a multiple of input.buckets {step}, the step of the sides"
        )
    area, wide = resolution**2, []
    for height in range(step, resolution + 1, step):
        width = area // height // step * step
        if width <= ratio * height:
            wide.append((width, height))
    return sorted({*wide, *((height, width) for width, height in wide)}, key=lambda size: size[0] / size[1])


class Buckets:
    """Each image's rectangle, and an `Order` whose batches each hold images of one rectangle.

    An epoch holds every image at least once. A bucket's last batch is filled by starting the bucket again, so some of
    its images appear twice. The images of a bucket smaller than a batch would repeat many times: move them to a
    neighbour first (`assign`).
    """

    def __init__(
        self, sizes: Sequence[Size], of: NDArray[np.int64], batch_size: int, seed: int, joined: int = 0
    ) -> None:
        """of: (n,) index into `sizes` for each image. batch_size: over all processes. joined: number of sizes left out."""
        self.sizes, self.of, self.batch_size, self.seed, self.joined = list(sizes), of, batch_size, seed, joined
        counts = np.bincount(of, minlength=len(sizes))
        self.members = np.split(np.argsort(of, kind="stable"), np.cumsum(counts)[:-1])
        self.batches = -(-counts // batch_size)  # of each bucket, per epoch
        self.repeats = int((self.batches * batch_size - counts).sum())

    @classmethod
    def assigned(cls, shapes: NDArray[np.int64], sizes: Sequence[Size], batch_size: int, seed: int) -> Self:
        """Give each image the nearest of the sizes that a batch of them share. shapes: width and height of each, (n, 2)."""
        of = assign(shapes, sizes, least=batch_size)
        joined = len(set(assign(shapes, sizes).tolist())) - len(set(of.tolist()))
        return cls(sizes, of, batch_size, seed, joined)

    @cached_property
    def _first(self) -> NDArray[np.int64]:
        """Number of each bucket's first batch."""
        return np.cumsum(self.batches) - self.batches

    def at(self, positions: Positions) -> NDArray[np.int64]:
        steps, slots = np.divmod(np.asarray(positions, np.int64), self.batch_size)
        indices = np.empty_like(slots)
        for step in np.unique(steps):
            epoch, place = divmod(int(step), int(self.batches.sum()))
            batch = int(permute([place], int(self.batches.sum()), fork(self.seed, Purpose.BUCKET), epoch)[0])
            bucket = int(np.searchsorted(self._first, batch, side="right")) - 1
            members, now = self.members[bucket], steps == step
            places = ((batch - self._first[bucket]) * self.batch_size + slots[now]) % len(members)
            indices[now] = members[permute(places, len(members), self.seed, epoch)]
        return indices

    def substitute(self, position: int, attempt: int) -> int:
        members = self.members[self.of[self.at([position])[0]]]
        return int(members[substitute(position, attempt, len(members), self.seed)])

    def size(self, index: int) -> Size:
        return self.sizes[self.of[index]]

    def __str__(self) -> str:
        filled = sorted(
            ((len(m), size) for m, size in zip(self.members, self.sizes, strict=True) if len(m)), reverse=True
        )
        listed = ", ".join(f"{w}×{h}: {count:,}" for count, (w, h) in filled[:12]) + (", …" if len(filled) > 12 else "")
        few = f"; {self.joined} shapes with less than a batch of images joined others" if self.joined else ""
        return (
            f"{len(filled)} bucket{'s' * (len(filled) > 1)} ({listed}); in an epoch of {int(self.batches.sum()):,} batches, "
            f"{self.repeats:,} places are filled by repeats{few}"
        )


def assign(shapes: NDArray[np.int64], sizes: Sequence[Size], least: int = 1) -> NDArray[np.int64]:
    """Return the nearest of the sizes, (n,), for each image's width and height, (n, 2).

    The sizes must be in ascending order of width / height. Sizes with fewer than `least` images are dropped, the
    emptiest first.
    """
    ratios = np.log([width / height for width, height in sizes])
    mine = np.log(shapes[:, 0] / shapes[:, 1])
    kept = np.arange(len(sizes))
    while True:
        between = (ratios[kept][1:] + ratios[kept][:-1]) / 2
        of = np.searchsorted(between, mine)
        counts = np.bincount(of, minlength=len(kept))
        if len(kept) == 1 or counts.min() >= least:
            return kept[of]
        kept = np.delete(kept, counts.argmin())


def measure(
    source: Source, folder: Path, max_pixels: int, workers: int, processes: Processes
) -> tuple[NDArray[np.int64], list[tuple[str, str]]]:
    """Return each image's upright width and height, (n, 2), and the (name, reason) of each that can't be read.

    The sizes are cached under `folder`. An image that can't be read has size 0.
    """
    rows = _Shapes(source, max_pixels, workers)
    how = {"max_pixels": max_pixels}
    shards, bad = open_shards(folder, "sizes", how, rows, (2,), "float32", processes, _AT_ONCE)
    shapes = shards.gather(np.arange(len(source))).numpy().astype(np.int64)
    return shapes, [(source[k].name, reason) for k, reason in bad]


class _Shapes:
    """`Rows` of width and height."""

    def __init__(self, source: Source, max_pixels: int, workers: int) -> None:
        self.headers, self.workers = _Headers(source, max_pixels), workers
        self.keys = image_keys(source)
        self.ambiguous = repeated(self.keys)

    def weak_keys(self, rows: NDArray[np.int64]) -> Digests:
        return self.keys[rows]  # reading a header is cheaper than comparing files

    def contents(self, rows: NDArray[np.int64]) -> Digests:
        return digests(map(str, self.headers.__getitems__(rows.tolist())))

    def make(self, batches: Sequence[NDArray[np.int64]]) -> Iterator[Made]:
        for shapes in read_ahead(self.headers, (rows.tolist() for rows in batches), self.workers):
            values = np.array([(0, 0) if isinstance(shape, str) else shape for shape in shapes], np.float32)
            bad = [shape if isinstance(shape, str) else "" for shape in shapes]
            yield Made(values, digests(map(str, shapes)), bad)


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
