"""Random numbers of training, each a pure function of (seed, purpose, position).

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is a keyed bijection of a counter. The key is
(seed, purpose). The position, which counts examples since the start of training, is the counter's third word. So each
position has its own 2^128 blocks, whatever the process, worker, batch or restart.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import IntEnum, unique
from itertools import accumulate

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

Positions = Sequence[int] | NDArray[np.int64]


@unique
class Purpose(IntEnum):
    """Purpose of a random stream. The numbers are part of every run: add at the end, never change or reorder."""

    ORDER = 1
    TIMESTEP = 2
    NOISE = 3
    CAPTION = 4
    DROPOUT = 5
    CROP = 6
    FLIP = 7
    POSTERIOR = 8
    VALIDATION = 9
    SUBSTITUTE = 10
    OFFSET = 11
    TRANSFORM = 12  # here, a position is a step
    STREAM = 13  # here, a position is a draw from a stream's buffer
    BUCKET = 14
    MASK = 15
    MASKED = 16  # the posterior of a masked image
    LEVEL = 17  # here, a position is an image and a noise level (train/evaluation/losses.py)
    GUIDANCE = 18
    TAGS = 19  # here, a position is the hash of a caption
    RENOISE = 20


def generator(seed: int, purpose: Purpose, position: int) -> Generator:
    """Return a generator at the start of this position's stream. seed and position: 0 … 2^64 − 1."""
    return Generator(Philox(key=_words(seed, purpose), counter=_words(0, 0, position, 0)))


def uniform(seed: int, purpose: Purpose, positions: Positions) -> NDArray[np.float64]:
    """Return one number in [0, 1) per position, (b,): the first of `generator(seed, purpose, position).random()`."""
    return np.array([stream.random() for stream in _streams(seed, purpose, positions)], np.float64)


def uniforms(seed: int, purpose: Purpose, positions: Positions, count: int) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) per position, (b, count)."""
    out = np.empty((len(positions), count))
    for row, stream in zip(out, _streams(seed, purpose, positions), strict=True):
        stream.random(out=row)
    return out


def normal(seed: int, purpose: Purpose, positions: Positions, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return standard normal numbers, (b, *shape) float32, from each position's own generator."""
    out = np.empty((len(positions), math.prod(shape)), np.float32)
    for row, stream in zip(out, _streams(seed, purpose, positions), strict=True):
        stream.standard_normal(out=row, dtype=np.float32)
    return out.reshape(len(positions), *shape)


def weighted_choice(weights: Sequence[float], u: float) -> int:
    """Return the index that a number in [0, 1) chooses, with probabilities in proportion to the weights."""
    ends = list(accumulate(weights))
    return min(bisect_right(ends, u * ends[-1]), len(ends) - 1)


def fork(seed: int, purpose: Purpose) -> int:
    """Return another seed that depends on this one, e.g. for validation, whose positions start at 0 too."""
    return int(generator(seed, purpose, 0).integers(2**63))


def _streams(seed: int, purpose: Purpose, positions: Positions) -> Iterator[Generator]:
    """Yield the same generator, moved to the start of each position in turn; new ones would cost four times as much."""
    bits = Philox(key=_words(seed, purpose))
    stream, state = Generator(bits), bits.state  # a fresh state: no buffered numbers
    for position in positions:
        state["state"]["counter"][2] = position
        bits.state = state
        yield stream


def _words(*words: int) -> NDArray[np.uint64]:
    return np.array(words, np.uint64)
