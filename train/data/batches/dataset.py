"""Batches as pure functions of (seed, positions): pictures decoded anew, or latents and text features from the caches.

Both sets answer `__getitems__(positions)` with a whole batch, which is what torch's DataLoader asks of its workers. A
position leads to an example (train/data/order/permutation.py) and to every random number that goes with it
(train/data/order/rng.py), so the number of workers, processes and restarts makes no difference.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import RunError
from train.data.batches.buckets import Buckets
from train.data.batches.cache import GonePicture, LatentCache, Originals, TextCache
from train.data.batches.unreadable import Damage
from train.data.images.crop import Framing, Size
from train.data.images.decode import DamagedPicture
from train.data.images.masks import draw_masks
from train.data.order.permutation import InOrder, Order, Shuffled, positions
from train.data.order.rng import Positions, Purpose, normal, uniform, uniforms
from train.data.sources.splits import Source
from train.data.sources.streams import Example, Stream
from train.data.store.prefetch import Batched, read_ahead

Batch = dict[str, Any]


class Draws(Protocol):
    """Random numbers that go with pictures."""

    def __call__(self, seed: int, at: NDArray[np.int64], size: Size) -> Batch:
        """Tensors (b, …) by name, for positions (b,) and pictures of this size."""
        ...


_ATTEMPTS = 1000  # substitutes tried for one position before giving up


class PictureDataset:
    """Pictures and captions by position.

    A batch: "position" (b,), "index" (b,) in the source, "pixels" (b, 3, h, w), "caption" (b strings, one of each
    picture's), "damaged" ((name, reason) of every picture that another had to stand in for), and what `draws` gives.
    Pictures are squares or, with buckets, their rectangles. shuffle False: position p is example p mod n,
    for measuring. Raises RunError when no readable picture is found.
    """

    def __init__(
        self, source: Source, framing: Framing, seed: int, *, buckets: Buckets | None = None, shuffle: bool = True,
        draws: Draws | None = None,
    ) -> None:  # fmt: skip
        self.source, self.buckets = source, buckets
        self.framer = _Framer(framing, seed, draws)
        self.order: Order = buckets or (Shuffled if shuffle else InOrder)(len(source), seed)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, where: Positions, /) -> Batch:
        at = np.asarray(where, np.int64)
        indices = self.order.at(at)
        size = self.buckets.size(int(indices[0])) if self.buckets else self.framer.framing.square
        candidates = [self._candidates(int(p), int(k)) for p, k in zip(at, indices, strict=True)]
        return self.framer.batch(at, candidates, size, self.source.place)

    def _candidates(self, position: int, index: int) -> Iterator["_Candidate"]:
        """The example of a position, then its substitutes."""
        for attempt in range(1, _ATTEMPTS + 2):
            row = self.source[index]
            yield _Candidate(index, row.name, row.captions, partial(self.source.read, index))
            index = self.order.substitute(position, attempt)


class StreamDataset:
    """As PictureDataset, of a stream: from any position on, but forwards only. An example's index is its position.

    Every process reads the whole stream and decodes its own share of it, in threads.
    """

    def __init__(self, stream: Stream, framing: Framing, seed: int, *, draws: Draws | None = None) -> None:
        self.stream, self.seed, self.told = stream, seed, 0
        self.framer = _Framer(framing, seed, draws)

    def read(self, parts: Iterable[Sequence[int]], workers: int, ahead: int) -> Iterator[Batch]:
        """A batch for each part, whose positions follow one another, as do the parts."""
        examples: Iterator[tuple[Example, ...]] | None = None
        begin, pending = 0, deque[Future[Batch]]()
        with ThreadPoolExecutor(max(1, workers)) as pool:
            for part in parts:
                if examples is None:
                    examples, begin = self.stream.examples(self.seed, part[0]), part[0]
                mine = list(itertools.islice(examples, part[0] - begin, part[-1] + 1 - begin))
                begin = part[-1] + 1
                pending.append(pool.submit(self._batch, part, mine))
                if len(pending) > ahead * workers:
                    yield self._told(pending.popleft().result())
            while pending:
                yield self._told(pending.popleft().result())

    def _told(self, batch: Batch) -> Batch:
        """With what the stream has left out since the last one."""
        found = self.stream.left_out
        batch["left_out"], self.told = found[self.told :], len(found)
        return batch

    def _batch(self, part: Sequence[int], examples: Sequence[tuple[Example, ...]]) -> Batch:
        candidates = [self._candidates(*each) for each in zip(part, examples, strict=True)]
        return self.framer.batch(np.asarray(part, np.int64), candidates, self.framer.framing.square, self.stream.place)

    def _candidates(self, position: int, examples: tuple[Example, ...]) -> Iterator["_Candidate"]:
        """The example of a position, then those that may stand in."""
        for example in examples:
            yield _Candidate(position, example.name, example.captions, partial(bytes, example.picture))


@dataclass(frozen=True, slots=True)
class _Candidate:
    """An example that is to be decoded."""

    index: int
    name: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]


class _Framer:
    """Makes a batch of the first of each position's candidates that can be decoded."""

    def __init__(self, framing: Framing, seed: int, draws: Draws | None) -> None:
        self.framing, self.seed, self.draws = framing, seed, draws

    def batch(self, at: NDArray[np.int64], each: Sequence[Iterator[_Candidate]], size: Size, place: str) -> Batch:
        framing, seed = self.framing, self.seed
        places = uniforms(seed, Purpose.CROP, at, 2) if framing.crop == "random" else np.full((len(at), 2), 0.5)
        flips = uniform(seed, Purpose.FLIP, at) < 0.5 if framing.flip else np.zeros(len(at), bool)
        pixels: list[Tensor] = []
        chosen: list[_Candidate] = []
        damaged: list[tuple[str, str]] = []
        for k, candidates in enumerate(each):
            for candidate in candidates:
                try:
                    image = framing.load(candidate.read(), candidate.name)
                    break
                except DamagedPicture as error:
                    damaged.append((candidate.name, error.reason))
            else:
                raise RunError(f"found no readable picture in {place}, e.g. {': '.join(damaged[-1])}")
            pixels.append(framing.cut(image, size, places[k], bool(flips[k])))
            chosen.append(candidate)
        which = (uniform(seed, Purpose.CAPTION, at) * [len(c.captions) for c in chosen]).astype(np.int64)
        batch = {
            "position": torch.from_numpy(at),
            "index": torch.tensor([c.index for c in chosen]),
            "pixels": torch.stack(pixels),
            "caption": [c.captions[k] for c, k in zip(chosen, which, strict=True)],
            "damaged": damaged,
        }
        return batch | (self.draws(seed, at, size) if self.draws else {})


class PosteriorNoise(NamedTuple):
    """`Draws` of what a posterior is sampled with. factor: of pictures' sides to latents'."""

    channels: int
    factor: int

    def __call__(self, seed: int, at: NDArray[np.int64], size: Size) -> Batch:
        """ "posterior_noise" (b, c, h, w)."""
        shape = (self.channels, size[1] // self.factor, size[0] // self.factor)
        return {"posterior_noise": torch.from_numpy(normal(seed, Purpose.POSTERIOR, at, shape))}


class Noising(NamedTuple):
    """The random numbers of diffusion's training, for pictures and for caches alike.

    dropout: share of examples whose condition is the null condition. strata: of that many positions in a row, each has
    its timestep in another of so many equal parts of [0, 1). offset: so much of a normal number that a whole channel
    shares is added to the noise, which teaches the network to move a picture's mean (Guttenberg 2023, "Diffusion with
    offset noise").
    """

    dropout: float = 0.0
    strata: int = 1
    offset: float = 0.0

    def dropped(self, seed: int, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(b,), whether the condition of each position is the null condition."""
        return uniform(seed, Purpose.DROPOUT, at) < self.dropout

    def draw(self, seed: int, at: NDArray[np.int64], shape: tuple[int, ...]) -> Batch:
        """ "timestep" (b,) uniform in [0, 1), "noise" and "posterior_noise" (b, *shape), float32."""
        noise = normal(seed, Purpose.NOISE, at, shape)
        if self.offset:
            noise += self.offset * normal(seed, Purpose.OFFSET, at, (shape[0], 1, 1))
        return {
            "timestep": _below_one((at % self.strata + uniform(seed, Purpose.TIMESTEP, at)) / self.strata),
            "noise": torch.from_numpy(noise),
            "posterior_noise": torch.from_numpy(normal(seed, Purpose.POSTERIOR, at, shape)),
        }


PLAIN = Noising()


class LatentNoise(NamedTuple):
    """`Draws` of diffusion's training on pictures that are encoded as they come. masks: to be inpainted."""

    noising: Noising
    channels: int
    factor: int
    masks: bool = False

    def __call__(self, seed: int, at: NDArray[np.int64], size: Size) -> Batch:
        """What Noising draws, "dropped" (b,), whether the condition is the null condition, and what `masking` draws."""
        shape = (self.channels, size[1] // self.factor, size[0] // self.factor)
        drawn = self.noising.draw(seed, at, shape) | {"dropped": torch.from_numpy(self.noising.dropped(seed, at))}
        return drawn | (masking(seed, at, size, shape) if self.masks else {})


def masking(seed: int, at: NDArray[np.int64], size: Size, shape: tuple[int, ...]) -> Batch:
    """ "mask" (b, 1, H, W), 1 where to paint, and "masked_noise" (b, *shape), which the rest's posterior is sampled with."""
    noise = torch.from_numpy(normal(seed, Purpose.MASKED, at, shape))
    return {"mask": draw_masks(seed, at, size), "masked_noise": noise}


class CachedDataset:
    """Latents and text features by position; no network runs.

    A batch, float32: "position" (b,), "index" (b,), "mean" and "std" (b, c, h, w) of the latent's posterior,
    "condition" (b, L, d), "damaged" where pictures have gone since, and what `noising` draws. Of windows and
    mirrored pictures in the cache, one is taken.
    originals: given to be inpainted; "pixels" (b, 3, H, W) are then decoded too, and `masking` draws.
    """

    def __init__(
        self, latents: LatentCache, text: TextCache, seed: int, noising: Noising = PLAIN, *, shuffle: bool = True,
        originals: Originals | None = None,
    ) -> None:  # fmt: skip
        if len(latents) != len(text):
            raise ValueError(f"latents of {len(latents)} pictures, captions of {len(text)}: give caches of one source")
        self.latents, self.text, self.seed, self.noising, self.originals = latents, text, seed, noising, originals
        self.order: Order = latents.buckets or (Shuffled if shuffle else InOrder)(len(latents), seed)

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, where: Positions, /) -> Batch:
        damaged: list[tuple[str, str]] = []
        while True:
            try:
                return self._batch(np.asarray(where, np.int64)) | ({"damaged": damaged} if damaged else {})
            except GonePicture as gone:
                self.latents.damaged[gone.index] = True
                damaged.append((gone.name, gone.reason))

    def _batch(self, at: NDArray[np.int64]) -> Batch:
        seed, latents = self.seed, self.latents
        indices = self.order.at(at)
        for k in np.flatnonzero(latents.damaged[indices]).tolist():
            tried = (self.order.substitute(int(at[k]), attempt) for attempt in range(1, _ATTEMPTS + 1))
            indices[k] = next((index for index in tried if not latents.damaged[index]), -1)
            if indices[k] < 0:
                raise RunError("found no readable picture among those of one shape: leave out input.buckets")
        crops = (uniform(seed, Purpose.CROP, at) * latents.crops).astype(np.int64)
        flips = uniform(seed, Purpose.FLIP, at) < 0.5 if latents.flip else np.zeros(len(at), bool)
        rows = self.text.rows(indices, uniform(seed, Purpose.CAPTION, at))
        rows[self.noising.dropped(seed, at)] = 0
        mean, std = latents.gather(indices, crops, flips).unbind(1)
        shape = latents.shape(int(indices[0]))
        found = {
            "position": torch.from_numpy(at),
            "index": torch.from_numpy(indices),
            "mean": mean,
            "std": std,
            "condition": self.text.gather(rows),
        }
        if self.originals is not None:
            pixels = self.originals.gather(indices, crops, flips)
            found |= {"pixels": pixels} | masking(seed, at, (pixels.shape[3], pixels.shape[2]), shape)
        return found | self.noising.draw(seed, at, shape)


def loader(
    dataset: Batched[Batch] | StreamDataset,
    *,
    start_step: int,
    steps: int,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    damage: Damage | None = None,
) -> Iterator[list[Batch]]:
    """This rank's `accumulation` parts of the batch of each step start_step … steps − 1, read ahead by workers.

    The batches are the same for any number of workers. Raises UserError when the batch size doesn't divide.
    """
    positions(0, batch_size, rank, world, accumulation)  # refuse now, not in a worker
    plan = (
        p.tolist() for step in range(start_step, steps) for p in positions(step, batch_size, rank, world, accumulation)
    )
    if isinstance(dataset, StreamDataset):
        batches = dataset.read(plan, workers, ahead=2 * accumulation)
    else:
        batches = read_ahead(dataset, plan, workers, ahead=2 * accumulation, pin_memory=pin_memory)
    return _steps(batches, accumulation, damage)


def _steps(batches: Iterator[Batch], accumulation: int, damage: Damage | None) -> Iterator[list[Batch]]:
    parts = []
    for batch in batches:
        damaged, left_out = batch.pop("damaged", ()), batch.pop("left_out", ())
        if damage is not None:
            damage.list(left_out)
            damage.note(len(batch["position"]), damaged)
        parts.append(batch)
        if len(parts) == accumulation:
            yield parts
            parts = []


def _below_one(u: NDArray[np.float64]) -> Tensor:
    """float32, still in [0, 1): rounding must not reach 1."""
    return torch.from_numpy(np.minimum(u.astype(np.float32), np.float32(1 - 2**-24)))
