"""Order of examples in training: a permutation that is computed, not stored.

Position epoch · n + place has the example permutation(seed, epoch)[place]. The permutation is a Feistel
network (Luby & Rackoff 1988) over the smallest power of four that is at least n, with the round function splitmix64
(Steele et al. 2014). A value outside [0, n) passes through the network again until it is inside ("cycle walking",
Black & Rogaway 2002), which keeps the map a bijection. Memory is constant and any place can be computed directly, so
resuming needs one number. For few examples, such a small Feistel network doesn't reach all orders equally often, so
the order is drawn directly.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ldm.errors import UserError
from train.data.order.rng import Positions, Purpose, generator

_ROUNDS = 8
_DIRECT_LIMIT = 1024  # up to this many examples, the order is drawn directly


class Epochs(Protocol):
    """Division of an order of examples into epochs."""

    @property
    def length(self) -> int:
        """Number of positions in an epoch; 0 if it isn't known in advance."""
        ...

    @property
    def identity(self) -> str:
        """Text that is equal for equal orders of the same dataset."""
        ...


class Order(Epochs, Protocol):
    """Order of examples: the example at each position, and its substitutes if it is damaged."""

    def at(self, positions: Positions, /) -> NDArray[np.int64]:
        """Return the examples at these positions, (b,)."""
        ...

    def substitute(self, position: int, attempt: int, /) -> int:
        """Return the example to try in place of a damaged one, attempt = 1, 2, …"""
        ...


@dataclass(frozen=True)
class Shuffled:
    """Epochs of n examples, each in its own order."""

    n: int
    seed: int

    @property
    def length(self) -> int:
        return self.n

    @property
    def identity(self) -> str:
        return f"{self.n} {self.seed}"

    def at(self, positions: Positions) -> NDArray[np.int64]:
        return index_at(positions, self.n, self.seed)

    def substitute(self, position: int, attempt: int) -> int:
        return substitute(position, attempt, self.n, self.seed)


class Repeated:
    """Epochs in which each example appears its number of times, shuffled together."""

    def __init__(self, repeats: NDArray[np.int64], seed: int) -> None:
        """repeats: number of times of each example, (n,)."""
        self.ends, self.seed = np.cumsum(repeats), seed
        self.length = int(self.ends[-1])

    @property
    def identity(self) -> str:
        return f"{hashlib.sha256(self.ends.tobytes()).hexdigest()} {self.seed}"

    def at(self, positions: Positions) -> NDArray[np.int64]:
        return np.searchsorted(self.ends, index_at(positions, self.length, self.seed), side="right")

    def substitute(self, position: int, attempt: int) -> int:
        place = substitute(position, attempt, self.length, self.seed)
        return int(np.searchsorted(self.ends, place, side="right"))


def shuffled(n: int, seed: int, repeats: NDArray[np.int64] | None = None) -> Order:
    """Return the training order of n examples, which appear once in each epoch, or as often as `repeats` (n,) says."""
    return Shuffled(n, seed) if repeats is None else Repeated(repeats, seed)


@dataclass(frozen=True)
class Shifted:
    """Another order that starts at another position: position p is `order`'s position p + shift."""

    order: Order
    shift: int

    @property
    def length(self) -> int:
        return self.order.length

    @property
    def identity(self) -> str:
        return self.order.identity

    def at(self, positions: Positions) -> NDArray[np.int64]:
        return self.order.at(np.asarray(positions, np.int64) + self.shift)

    def substitute(self, position: int, attempt: int) -> int:
        return self.order.substitute(position + self.shift, attempt)


@dataclass(frozen=True)
class Cycle:
    """The first `length` examples of another order, again and again."""

    order: Order
    length: int

    @property
    def identity(self) -> str:
        return f"{self.order.identity}, the first {self.length}"

    def at(self, positions: Positions) -> NDArray[np.int64]:
        return self.order.at(np.mod(np.asarray(positions, np.int64), self.length))

    def substitute(self, position: int, attempt: int) -> int:
        return self.order.substitute(position % self.length, attempt)


@dataclass(frozen=True)
class InOrder:
    """Order for a pass over all examples: position p is example p mod n."""

    n: int
    seed: int

    @property
    def length(self) -> int:
        return self.n

    @property
    def identity(self) -> str:
        return f"{self.n} in order"

    def at(self, positions: Positions) -> NDArray[np.int64]:
        return np.mod(np.asarray(positions, np.int64), self.n)

    def substitute(self, position: int, attempt: int) -> int:
        return substitute(position, attempt, self.n, self.seed)


def permute(places: ArrayLike, n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the examples at these places of an epoch: a bijection of 0 … n − 1, in the shape of `places`."""
    places = np.asarray(places, np.int64)
    if invalid := places[(places < 0) | (places >= n)].tolist():
        raise ValueError(f"place {invalid[0]} of {n} examples: must be from 0 to {n - 1}")
    order = generator(seed, Purpose.ORDER, epoch)
    if n <= _DIRECT_LIMIT:
        return order.permutation(n)[places]
    half = np.uint64(((n - 1).bit_length() + 1) // 2)  # half the number of bits of a place
    keys = order.integers(2**64, size=_ROUNDS, dtype=np.uint64)
    x = _feistel(places.ravel().astype(np.uint64), half, keys)
    while (outside := x >= n).any():  # on average, at most 3 of 4 remaining values
        x[outside] = _feistel(x[outside], half, keys)
    return x.astype(np.int64).reshape(places.shape)


def choose(count: int, n: int, seed: int) -> list[int]:
    """Return `count` of n examples, or all if there are fewer: the first of `Shuffled`, as a dataset may be sorted."""
    return permute(np.arange(min(count, n)), n, seed, 0).tolist()


def index_at(positions: ArrayLike, n: int, seed: int) -> NDArray[np.int64]:
    """Return the examples at these positions of training, over n examples."""
    epochs, places = np.divmod(np.asarray(positions, np.int64), n)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        indices[in_epoch] = permute(places[in_epoch], n, seed, int(epoch))
    return indices


def positions(
    step: int, batch_size: int, rank: int = 0, world: int = 1, accumulation: int = 1
) -> list[NDArray[np.int64]]:
    """Return this rank's parts of a step's batch: `accumulation` arrays of positions.

    The batch is positions [step · batch_size, (step + 1) · batch_size), split into accumulation × world chunks: part a
    of rank r is chunk a · world + r. Raises UserError if the batch isn't divisible.
    """
    parts = world * accumulation
    if batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} can't be split evenly over {world} process(es) × accumulation {accumulation}: "
            f"must be a multiple of {parts}"
        )
    size = batch_size // parts
    starts = [step * batch_size + (part * world + rank) * size for part in range(accumulation)]
    return [np.arange(start, start + size, dtype=np.int64) for start in starts]


def substitute(position: int, attempt: int, n: int, seed: int) -> int:
    """Return the example to try in place of a damaged one, attempt = 1, 2, …; drawn from all n."""
    return int(generator(seed, Purpose.SUBSTITUTE, position).integers(n, size=attempt)[-1])


def _feistel(x: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return splitmix64's output: every input bit affects every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
