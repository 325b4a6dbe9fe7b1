"""Batches as pure functions of (seed, positions): pictures decoded anew, or latents and text features from the caches.

Both sets answer `__getitems__(positions)` with a whole batch, which is what torch's DataLoader asks of its workers. A
position leads to an example (train/data/sampler.py) and to every random number that goes with it
(train/data/randomness.py), so the number of workers, processes and restarts makes no difference.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import RunError
from train.data.cache import LatentCache, TextCache
from train.data.decode import Crop, DamagedPicture, load_picture, to_tensor
from train.data.randomness import Positions, Purpose, normal, uniform, uniforms
from train.data.sampler import index_at, positions, substitute
from train.data.sources import Source
from train.data.workers import Batched, read_ahead

Batch = dict[str, Any]
Draws = Mapping[str, tuple[Purpose, tuple[int, ...]]]

_ATTEMPTS = 1000  # substitutes tried for one position before giving up
_FEW = 100  # examples below which the share of damaged ones says nothing yet


class PictureDataset:
    """Pictures and captions by position.

    A batch: "position" (b,), "index" (b,) in the source, "pixels" (b, 3, resolution, resolution), "caption" (b strings,
    one of each picture's), "damaged" ((name, reason) of every picture that another had to stand in for), and for each
    of `draws`, name → (purpose, shape), standard normal numbers (b, *shape). shuffle False: position p is example
    p mod n, for measuring. Raises RunError when no readable picture is found.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        seed: int,
        *,
        crop: Crop = "center",
        flip: bool = False,
        shuffle: bool = True,
        draws: Draws | None = None,
    ) -> None:
        self.source, self.resolution, self.seed = source, resolution, seed
        self.crop: Crop = crop
        self.flip, self.shuffle, self.draws = flip, shuffle, dict(draws or {})

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, where: Positions, /) -> Batch:
        n, seed = len(self.source), self.seed
        at = np.asarray(where, np.int64)
        places = uniforms(seed, Purpose.CROP, at, 2) if self.crop == "random" else np.full((len(at), 2), 0.5)
        flips = uniform(seed, Purpose.FLIP, at) < 0.5 if self.flip else np.zeros(len(at), bool)
        pixels, captions, damaged = [], [], []
        indices = index_at(at, n, seed) if self.shuffle else np.mod(at, n)
        for k, position in enumerate(at.tolist()):
            for attempt in range(1, _ATTEMPTS + 2):
                try:
                    image = load_picture(self.source[indices[k]].path)
                    break
                except DamagedPicture as error:
                    damaged.append((self.source.names[indices[k]], error.reason))
                    indices[k] = substitute(position, attempt, n, seed)
            else:
                raise RunError(f"found no readable picture in {self.source.folder}, e.g. {': '.join(damaged[-1])}")
            pixels.append(to_tensor(image, self.resolution, crop=self.crop, place=places[k], flip=bool(flips[k])))
            captions.append(self.source.captions(indices[k]))
        chosen = (uniform(seed, Purpose.CAPTION, at) * [len(c) for c in captions]).astype(np.int64)
        batch: Batch = {
            "position": torch.from_numpy(at),
            "index": torch.from_numpy(indices),
            "pixels": torch.stack(pixels),
            "caption": [c[k] for c, k in zip(captions, chosen, strict=True)],
            "damaged": damaged,
        }
        drawn = {name: normal(seed, purpose, at, shape) for name, (purpose, shape) in self.draws.items()}
        return batch | {name: torch.from_numpy(values) for name, values in drawn.items()}


class CachedDataset:
    """Latents and text features by position; no network runs.

    A batch, float32: "position" (b,), "index" (b,), "mean" and "std" (b, c, h, w) of the latent's posterior,
    "condition" (b, L, d), "timestep" (b,) uniform in [0, 1), "noise" and "posterior_noise" (b, c, h, w). With
    probability `dropout` the condition is the null condition. Where the latents were cached mirrored too, half are.

    `strata`: of that many positions in a row, each has its timestep in another of so many equal parts of [0, 1).
    `offset_noise`: so much of a normal number that a whole channel shares is added to the noise, which teaches the network
    to move a picture's mean (Guttenberg 2023, "Diffusion with offset noise").
    """

    def __init__(
        self, latents: LatentCache, text: TextCache, seed: int, *, dropout: float = 0.0, shuffle: bool = True,
        strata: int = 1, offset_noise: float = 0.0,
    ) -> None:  # fmt: skip
        if len(latents) != len(text):
            raise ValueError(f"latents of {len(latents)} pictures, captions of {len(text)}: give caches of one source")
        self.latents, self.text, self.seed, self.dropout, self.shuffle = latents, text, seed, dropout, shuffle
        self.strata, self.offset_noise = strata, offset_noise

    def __len__(self) -> int:
        return len(self.latents)

    def captions(self, count: int) -> list[str]:
        """The first caption of each of the first pictures."""
        return [self.text.source.captions(k)[0] for k in range(min(count, len(self)))]

    def __getitems__(self, where: Positions, /) -> Batch:
        seed, n = self.seed, len(self)
        at = np.asarray(where, np.int64)
        indices = index_at(at, n, seed) if self.shuffle else np.mod(at, n)
        for k in np.flatnonzero(self.latents.damaged[indices]).tolist():
            attempt = 0
            while self.latents.damaged[indices[k]]:
                attempt += 1
                indices[k] = substitute(int(at[k]), attempt, n, seed)
        flips = uniform(seed, Purpose.FLIP, at) < 0.5 if self.latents.views == 2 else np.zeros(len(at), bool)
        rows = self.text.rows(indices, uniform(seed, Purpose.CAPTION, at))
        rows[uniform(seed, Purpose.DROPOUT, at) < self.dropout] = 0
        mean, std = self.latents.gather(indices, flips).unbind(1)
        shape = self.latents.shape
        noise = normal(seed, Purpose.NOISE, at, shape)
        if self.offset_noise:
            noise += self.offset_noise * normal(seed, Purpose.OFFSET, at, (shape[0], 1, 1))
        return {
            "position": torch.from_numpy(at),
            "index": torch.from_numpy(indices),
            "mean": mean,
            "std": std,
            "condition": self.text.gather(rows),
            "timestep": _below_one((at % self.strata + uniform(seed, Purpose.TIMESTEP, at)) / self.strata),
            "noise": torch.from_numpy(noise),
            "posterior_noise": torch.from_numpy(normal(seed, Purpose.POSTERIOR, at, shape)),
        }


class Damage:
    """Counts pictures that can't be read, lists each once in a report, and stops when they are too many.

    A line of the report is {"file", "reason"}. Raises RunError once more than `most` of the pictures tried (of at
    least 100) were damaged. One object a process; all may share the report.
    """

    def __init__(self, source: Source, report: Path, most: float = 0.1, say: Callable[[str], None] = print) -> None:
        self.report, self.most, self.say = report, most, say
        self.seen = self.bad = 0
        self.listed = _listed(report)
        self._list([(name, "the metadata names it, but there is no such file") for name in source.missing])

    def note(self, examples: int, damaged: Iterable[tuple[str, str]]) -> None:
        """After a batch of so many examples."""
        damaged = list(damaged)
        self.seen += examples + len(damaged)
        self.bad += len(damaged)
        if not damaged:
            return
        self._list(damaged)
        if self.bad > self.most * max(self.seen, _FEW):
            raise RunError(
                f"{self.bad:,} of {self.seen:,} pictures can't be read, more than the share of {self.most:g} that "
                f"--input.max-damaged allows; {self.report} lists them"
            )

    def _list(self, damaged: list[tuple[str, str]]) -> None:
        if all(name in self.listed for name, _ in damaged):
            return
        self.listed |= _listed(self.report)  # other processes write there too
        new = {name: reason for name, reason in damaged if name not in self.listed}
        if new and not self.listed:
            name, reason = next(iter(new.items()))
            self.say(f"can't read {name} ({reason}); another picture stands in. All such are listed in {self.report}")
        self.listed |= set(new)
        lines = "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in new.items())
        self.report.parent.mkdir(parents=True, exist_ok=True)
        torn = self.report.is_file() and self.report.read_bytes()[-1:] not in (b"", b"\n")  # by a crash
        with open(self.report, "ab") as file:  # appended at once: processes don't mix their lines
            file.write(("\n" * torn + lines).encode())


def loader(
    dataset: Batched[Batch],
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
    batches = read_ahead(dataset, plan, workers, ahead=2 * accumulation, pin_memory=pin_memory)
    return _steps(batches, accumulation, damage)


def _steps(batches: Iterator[Batch], accumulation: int, damage: Damage | None) -> Iterator[list[Batch]]:
    parts = []
    for batch in batches:
        damaged = batch.pop("damaged", ())
        if damage is not None:
            damage.note(len(batch["position"]), damaged)
        parts.append(batch)
        if len(parts) == accumulation:
            yield parts
            parts = []


def _below_one(u: NDArray[np.float64]) -> Tensor:
    """float32, still in [0, 1): rounding must not reach 1."""
    return torch.from_numpy(np.minimum(u.astype(np.float32), np.float32(1 - 2**-24)))


def _listed(report: Path) -> set[str]:
    """The files in a report, which may be missing, or cut short by a crash."""
    names = set()
    for line in report.read_text(encoding="utf-8").splitlines() if report.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            names.add(json.loads(line)["file"])
    return names
