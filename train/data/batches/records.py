"""Records of batches: named and typed fields that move together through workers, pinned memory and stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Generic, Self

import torch
from torch import Tensor
from typing_extensions import TypeVar

Drawn = TypeVar("Drawn", default=None)


class Record:
    """Base class of frozen dataclasses whose tensors and nested records move together."""

    def to(self, device: torch.device, *, non_blocking: bool = True) -> Self:
        """Return a copy whose tensors are on a device."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the tensors to pinned memory; torch's DataLoader calls this when batches are read for a GPU."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(part) for name, part in parts.items() if isinstance(part, Tensor | Record)}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples(Record):
    """Base class of the datasets' batches."""

    position: Tensor
    """Positions in training, (b,)."""
    index: Tensor
    """Indices of the images in their source, (b,)."""
    damaged: Sequence[tuple[str, str]] = ()
    """Name and reason of every unreadable image that was replaced by another."""
    left_out: Sequence[tuple[str, str]] = ()
    """Name and reason of each example that a stream has left out since the last batch."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageBatch(Examples, Generic[Drawn]):
    """Decoded images, and one caption for each."""

    pixels: Tensor
    """Pixels, (b, 3, h, w) in [−1, 1]."""
    captions: list[str]
    drawn: Drawn
    """Random numbers drawn for the images, e.g. `DrawnNoise`."""


@dataclass(frozen=True, eq=False)
class DrawnMasks(Record):
    """Masks and noise for inpainting."""

    mask: Tensor
    """Masks, (b, 1, H, W), 1 in the masked area."""
    noise: Tensor
    """Noise with which the posterior of a masked image is sampled, (b, c, h, w)."""


@dataclass(frozen=True, eq=False)
class DrawnNoise(Record):
    """Random numbers of diffusion training, float32."""

    timestep: Tensor
    """Random numbers that determine the timesteps, (b,), uniform in [0, 1)."""
    noise: Tensor
    """Noise added to the latents, (b, c, h, w)."""
    posterior_noise: Tensor
    """Noise with which the latents' posterior is sampled, (b, c, h, w)."""
    dropped: Tensor
    """Whether the condition is replaced by the null condition, (b,) bool."""
    masks: DrawnMasks | None = None
    scale: Tensor | None = None
    """Guidance scales, (b,), for a network that reads them."""
    renoise: Tensor | None = None
    """Noise for a second start of a trajectory, (b, c, h, w)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedBatch(Examples):
    """Latents and text features from the caches, float32."""

    mean: Tensor
    """Mean of the latents' posterior, (b, c, h, w)."""
    std: Tensor
    """Standard deviation of the posterior, (b, c, h, w)."""
    condition: Tensor
    """Text features, (b, L, d); dropped captions are already replaced by the null condition."""
    drawn: DrawnNoise
    pixels: Tensor | None = None
    """Images to be inpainted, (b, 3, H, W) in [−1, 1]."""
