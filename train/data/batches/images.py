"""Batches of images and captions as pure functions of (seed, positions).

A dataset answers `__getitems__(positions)` with a full batch, as torch's DataLoader requests from its workers. A
position determines an example (train/data/order/permutation.py) and all its random numbers (train/data/order/rng.py),
so the number of workers, processes and restarts makes no difference.
"""

import copy
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import RunError
from train.data.batches.buckets import Buckets
from train.data.batches.draws import Draws
from train.data.batches.records import Drawn, ImageBatch
from train.data.images.crop import Framing, Size
from train.data.images.decode import DamagedImage
from train.data.order.permutation import InOrder, Order, Shifted, shuffled
from train.data.order.rng import Positions, Purpose, uniform, uniforms
from train.data.sources.catalogue import Row
from train.data.sources.splits import Source
from train.data.sources.streams import Example, Stream

ATTEMPTS = 1000  # largest number of substitutes tried for one position


class ImageDataset(Generic[Drawn]):
    """Images and captions for given positions in training.

    Images are squares or, with buckets, rectangles. shuffle: False for a pass over all images, where position p is
    example p mod n. Raises RunError if no readable image is found.
    """

    def __init__(
        self,
        source: Source,
        framing: Framing,
        seed: int,
        *,
        buckets: Buckets | None = None,
        shuffle: bool = True,
        draws: Draws[Drawn] | None = None,
    ) -> None:
        self.source, self.buckets = source, buckets
        self.builder = _BatchBuilder(framing, seed, draws)
        self.order: Order = buckets or (
            shuffled(len(source), seed, source.repeats) if shuffle else InOrder(len(source), seed)
        )

    def __len__(self) -> int:
        return len(self.source)

    def shifted(self, shift: int) -> Self:
        """Return the same dataset in an order in which position p is now p + shift; see `Shifted`."""
        dataset = copy.copy(self)
        dataset.order = Shifted(self.order, shift)
        return dataset

    def __getitems__(self, positions: Positions, /) -> ImageBatch[Drawn]:
        positions = np.asarray(positions, np.int64)
        indices = self.order.at(positions)
        size = self.buckets.size(int(indices[0])) if self.buckets else self.builder.framing.square
        candidates = [self._candidates(int(p), int(k)) for p, k in zip(positions, indices, strict=True)]
        return self.builder.batch(positions, candidates, size, self.source.location)

    def _candidates(self, position: int, index: int) -> Iterator["_Candidate"]:
        """Yield the example of a position, then its substitutes."""
        for attempt in range(1, ATTEMPTS + 2):
            row = self.source[index]
            yield _Candidate(index, row, partial(self.source.read, index))
            index = self.order.substitute(position, attempt)


@dataclass(frozen=True)
class StreamOrder:
    """Order of a stream's examples, whose epochs have a length that isn't known."""

    identity: str
    length: int = 0


class StreamDataset(Generic[Drawn]):
    """Images and captions of a stream, in order from any start position. An example's index is its position.

    Every process reads the full stream and decodes its own share of it, in threads.
    """

    def __init__(self, stream: Stream, framing: Framing, seed: int, *, draws: Draws[Drawn] | None = None) -> None:
        self.stream, self.seed, self.reported, self.shift = stream, seed, 0, 0
        self.order = StreamOrder(f"{stream.buffer_size} {seed}")
        self.builder = _BatchBuilder(framing, seed, draws)

    def shifted(self, shift: int) -> Self:
        """Return the same dataset in an order in which position p is now p + shift, which must be at least 0."""
        dataset = copy.copy(self)
        dataset.shift = shift
        return dataset

    def read(self, parts: Iterable[Sequence[int]], workers: int, ahead: int) -> Iterator[ImageBatch[Drawn]]:
        """Yield a batch for each part. The positions of a part must be consecutive, and later than the last part's."""
        examples: Iterator[tuple[Example, ...]] | None = None
        following, pending = 0, deque[Future[ImageBatch[Drawn]]]()
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for part in parts:
                if examples is None:
                    examples, following = self.stream.examples(self.seed, part[0] + self.shift), part[0]
                own = list(itertools.islice(examples, part[0] - following, part[-1] + 1 - following))
                following = part[-1] + 1
                pending.append(pool.submit(self._batch, part, own))
                if len(pending) > ahead * workers:
                    yield self._with_left_out(pending.popleft().result())
            while pending:
                yield self._with_left_out(pending.popleft().result())

    def _with_left_out(self, batch: ImageBatch[Drawn]) -> ImageBatch[Drawn]:
        """Return a batch with the list of what the stream has left out since the last batch."""
        left_out, before = self.stream.left_out, self.reported
        self.reported = len(left_out)
        return replace(batch, left_out=left_out[before:])

    def _batch(self, part: Sequence[int], examples: Sequence[tuple[Example, ...]]) -> ImageBatch[Drawn]:
        candidates = [self._candidates(*example) for example in zip(part, examples, strict=True)]
        positions, square = np.asarray(part, np.int64), self.builder.framing.square
        return self.builder.batch(positions, candidates, square, self.stream.location)

    def _candidates(self, position: int, examples: tuple[Example, ...]) -> Iterator["_Candidate"]:
        """Yield the example of a position, then its substitutes."""
        for example in examples:
            row = Row(example.name, len(example.image), 0, example.captions)
            yield _Candidate(position, row, partial(bytes, example.image))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An example that may be used at a position."""

    index: int
    row: Row
    read: Callable[[], bytes]


class _BatchBuilder:
    """Builder of batches, from each position's first candidate that can be decoded."""

    def __init__(self, framing: Framing, seed: int, draws: Draws[Any] | None) -> None:
        self.framing, self.seed, self.draws = framing, seed, draws

    def batch(
        self, positions: NDArray[np.int64], examples: Sequence[Iterator[_Candidate]], size: Size, location: str
    ) -> ImageBatch[Any]:
        framing, seed = self.framing, self.seed
        n = len(positions)
        places = uniforms(seed, Purpose.CROP, positions, 2) if framing.crop == "random" else np.full((n, 2), 0.5)
        flips = uniform(seed, Purpose.FLIP, positions) < 0.5 if framing.flip else np.zeros(n, bool)
        pixels: list[Tensor] = []
        chosen: list[_Candidate] = []
        damaged: list[tuple[str, str]] = []
        for k, candidates in enumerate(examples):
            for candidate in candidates:
                try:
                    image = framing.load(candidate.read(), candidate.row.name)
                    break
                except DamagedImage as error:
                    damaged.append((candidate.row.name, error.reason))
            else:
                raise RunError(f"no readable image found in {location}, e.g. {': '.join(damaged[-1])}")
            pixels.append(framing.apply(image, size, places[k], bool(flips[k])))
            chosen.append(candidate)
        u = uniform(seed, Purpose.CAPTION, positions).tolist()
        return ImageBatch(
            position=torch.from_numpy(positions),
            index=torch.tensor([c.index for c in chosen]),
            pixels=torch.stack(pixels),
            captions=[c.row.captions[c.row.choose(value)] for c, value in zip(chosen, u, strict=True)],
            drawn=self.draws(seed, positions, size) if self.draws else None,
            damaged=damaged,
        )


@dataclass(frozen=True)
class Inputs:
    """Training and held-out images."""

    source: Source
    """Training images; those of a stream's head if the data is a stream."""
    held_out: Source
    """Images for validation and test."""
    stream: Stream | None = None
    """Training images if the data is a stream."""
    buckets: Buckets | None = None
    """Buckets of the training images; None if these are squares."""
    notes: tuple[str, ...] = ()
    """Lines for the log on what was left out when the dataset was opened."""

    @property
    def count(self) -> int | None:
        """Number of training images; None for a stream."""
        return len(self.source) if self.stream is None else None

    @property
    def fingerprint(self) -> str:
        parts = (self.source.fingerprint if self.stream is None else self.stream.fingerprint, self.held_out.fingerprint)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def images(
        self, framing: Framing, seed: int, draws: Draws[Drawn] | None = None
    ) -> ImageDataset[Drawn] | StreamDataset[Drawn]:
        """Return the dataset of the training images."""
        if self.stream is None:
            return ImageDataset(self.source, framing, seed, buckets=self.buckets, draws=draws)
        return StreamDataset(self.stream, framing, seed, draws=draws)
