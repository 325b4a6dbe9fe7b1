"""Batches as records: what travels together through workers, pinned memory and stages has names and types."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self

import torch
from torch import Tensor
from typing_extensions import TypeVar

Drawn = TypeVar("Drawn", default=None)


class Record:
    """Base of frozen dataclasses whose tensors, and records of tensors, move together."""

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Self:
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Called by torch's DataLoader where batches are read for a GPU."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(part) for name, part in parts.items() if isinstance(part, Tensor | Record)}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples(Record):
    """Base of what the data sets give."""

    position: Tensor
    """Positions in training, (b,)."""
    index: Tensor
    """Places of the pictures in their source, (b,)."""
    damaged: Sequence[tuple[str, str]] = ()
    """Name and reason of every picture that another had to stand in for."""
    left_out: Sequence[tuple[str, str]] = ()
    """Name and reason of what a stream has left out since the last batch."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PictureBatch(Examples, Generic[Drawn]):
    """Decoded pictures, and one of each picture's captions."""

    pixels: Tensor
    """(b, 3, h, w) in [−1, 1]."""
    captions: list[str]
    drawn: Drawn
    """Random numbers that go with them."""


@dataclass(frozen=True, eq=False)
class DrawnMasks(Record):
    """Where pictures are to be inpainted."""

    mask: Tensor
    """(b, 1, H, W), 1 where to paint."""
    noise: Tensor
    """(b, c, h, w), with which the posterior of what the mask leaves of a picture is sampled."""


@dataclass(frozen=True, eq=False)
class DrawnNoise(Record):
    """The random numbers of diffusion's training, float32."""

    timestep: Tensor
    """(b,), uniform in [0, 1)."""
    noise: Tensor
    """(b, c, h, w)."""
    posterior_noise: Tensor
    """(b, c, h, w), with which the latents' posterior is sampled."""
    dropped: Tensor
    """(b,) bool, whether the condition is the null condition."""
    masks: DrawnMasks | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedBatch(Examples):
    """Latents and text features from the caches, float32."""

    mean: Tensor
    """Of the latents' posterior, (b, c, h, w)."""
    std: Tensor
    """(b, c, h, w)."""
    condition: Tensor
    """(b, L, d); dropped captions have the null condition already."""
    drawn: DrawnNoise
    pixels: Tensor | None = None
    """Pictures to be inpainted, (b, 3, H, W) in [−1, 1]."""
