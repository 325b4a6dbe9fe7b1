"""Encoding and decoding of any size in overlapping tiles, in the memory of one tile of the batch.

A tile's result differs from the same part of the whole image's in three ways, and each has a solution:

- At an inner border the convolutions pad with zeros instead of the rest of the image. This effect fades inwards, so
  the outermost quarter of the overlap is discarded (`windows`).
- Neighbours still differ a little. They are blended over the rest of the overlap, with weights that add up to 1.
- GroupNorm (Wu & He 2018, arXiv 1803.08494) takes its mean and variance over the image. A tile's own statistics would
  change its tone, and blending can't hide that. So all tiles use the whole image's statistics, which are measured on
  the tiles for one norm after the other (`_measure`). This costs about ten times as much as the tiles themselves.

Attention in the middle block is limited to its tile; this isn't corrected.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import UserError


@dataclass(frozen=True, slots=True)
class Tiles:
    """Size and overlap of tiles; lengths are in latents, both for encoding and for decoding."""

    side: int = 64
    """Side of a tile; smaller images stay whole."""
    overlap: int = 16
    """Overlap of neighbours: a quarter at each end is discarded, the half between is blended."""

    def __post_init__(self) -> None:
        if self.side < 1:
            raise UserError(f"tile side {self.side}: must be at least 1 latent")
        if not 0 <= self.overlap <= self.side // 2:
            most = self.side // 2
            raise UserError(f"overlap {self.overlap} of tiles of side {self.side}: must be 0 to {most} latents")


class Span(NamedTuple):
    """A tile along one axis, in latents."""

    start: int
    stop: int
    own: slice
    """Part that belongs to this tile and not to a neighbour, counted from `start`."""


class Tile(NamedTuple):
    """Position of a tile."""

    row: Span
    column: Span

    def at(self, scale: int) -> tuple[EllipsisType, slice, slice]:
        """Return the tile's index in an image that has `scale` elements per latent along each side."""
        (top, bottom, _), (left, right, _) = self
        return ..., slice(top * scale, bottom * scale), slice(left * scale, right * scale)

    def own(self, x: Tensor) -> Tensor:
        """Return the part of the tile's activation that belongs to this tile and not to a neighbour.

        The activation is (b, c, h, w), or (b, c, h w) in attention. Along each side it has a whole number of elements
        per latent.
        """
        rows, columns = self.row.stop - self.row.start, self.column.stop - self.column.start
        scale = math.isqrt(x.shape[2:].numel() // (rows * columns))
        x = x.reshape(*x.shape[:2], rows * scale, columns * scale)
        top, left = self.row.own, self.column.own
        return x[..., top.start * scale : top.stop * scale, left.start * scale : left.stop * scale]


def spans(n: int, tiles: Tiles) -> list[Span]:
    """Return the tiles along an axis of n latents. The last one is moved back to end at n, so that all are full.

    If n is less than a full side, there is one tile of n latents.
    """
    if n <= tiles.side:
        return [Span(0, n, slice(0, n))]
    starts = [*range(0, n - tiles.side, tiles.side - tiles.overlap), n - tiles.side]
    borders = [0, *((a + tiles.side + b) // 2 for a, b in pairwise(starts)), n]
    return [
        Span(start, start + tiles.side, slice(left - start, right - start))
        for start, (left, right) in zip(starts, pairwise(borders), strict=True)
    ]


def windows(along: Sequence[Span], overlap: int, scale: int) -> Tensor:
    """Return each tile's weights along an axis with `scale` elements per latent, (tiles, side × scale), float64.

    Weights of overlapping tiles add up to 1. They rise as sin², whose slope is zero at both ends, so that a difference
    of two tiles gives no visible kink, unlike a linear ramp. The borders of the image itself keep their full weight.
    """
    length, rim = (along[0].stop - along[0].start) * scale, overlap // 4 * scale
    ramp = overlap * scale - 2 * rim
    place = (torch.arange(length, dtype=torch.float64) + 0.5 - rim) / ramp  # 0 to 1 between the rims
    rise = (place.clamp(0, 1) * torch.pi / 2).sin() ** 2  # without an overlap: 1 everywhere
    weights = torch.ones(len(along), length, dtype=torch.float64)
    weights[1:] *= rise
    weights[:-1] *= rise.flip(0)
    total = torch.zeros(along[-1].stop * scale, dtype=torch.float64)
    for span, weight in zip(along, weights, strict=True):
        total[span.start * scale : span.stop * scale] += weight
    return torch.stack([w / total[s.start * scale : s.stop * scale] for s, w in zip(along, weights, strict=True)])


@torch.no_grad()
def tiled(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    tiles: Tiles,
    *,
    up: int = 1,
    down: int = 1,
    network: nn.Module | None = None,
) -> Tensor:
    """Compute `run`(x) tile by tile. Along each side, x has `down` elements per latent, and the result has `up`.

    x (b, c, h × down, w × down) gives (b, c', h × up, w × up), at least float32 and on the device of x. An image no
    larger than a tile runs once as a whole. Otherwise the group norms of `network`, which `run` calls, use the whole
    image's statistics; without `network`, every tile uses its own. If `run` has no attention and a receptive field of
    at most a quarter of the overlap to each side, the result equals that of the whole image. `run` may move a tile to
    another device. Two threads can't use this on one network at once, and the network can't slice its batches.
    Raises UserError if a side of x isn't a multiple of `down`, ValueError for a result of another size.
    """
    if x.shape[-2] % down or x.shape[-1] % down:
        raise UserError(f"input of {x.shape[-1]} × {x.shape[-2]} elements: both sides must be multiples of {down}")
    rows, columns = spans(x.shape[-2] // down, tiles), spans(x.shape[-1] // down, tiles)
    if len(rows) == len(columns) == 1:
        return _wide(run(x)).to(x.device)
    places = [Tile(row, column) for row, column in product(rows, columns)]
    weights = list(product(windows(rows, tiles.overlap, up), windows(columns, tiles.overlap, up)))
    out = None
    with _group_norms(network) as norms:
        if network is not None:
            _measure(run, x, places, down, norms)
        for place, (vertical, horizontal) in zip(places, weights, strict=True):
            part = _wide(run(x[place.at(down)])).to(x.device)
            if out is None:
                out = part.new_zeros(*part.shape[:-2], rows[-1].stop * up, columns[-1].stop * up)
            if part.shape[-2:] != (len(vertical), len(horizontal)):
                raise ValueError(
                    f"a tile's result is {tuple(part.shape[-2:])}, not {(len(vertical), len(horizontal))}: "
                    f"down={down} and up={up} don't fit the network"
                )
            out[place.at(up)] += part * vertical.to(part)[:, None] * horizontal.to(part)
    assert out is not None
    return out


def pad_to_multiple(pixels: Tensor, factor: int) -> Tensor:
    """Pad images (b, c, h, w) at the right and bottom until both sides are multiples of `factor`.

    The last row and column are repeated. Unlike a reflection, this works for the smallest images, and it adds no
    edges. The caller crops the reconstruction to h × w.
    """
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, -width % factor, 0, -height % factor), mode="replicate")


class _Moments(NamedTuple):
    """Moments of a group norm's input, for each image and group."""

    size: int  # elements
    mean: Tensor  # (b, groups), float64
    var: Tensor  # (b, groups), float64


def _moments(x: Tensor, groups: int) -> _Moments:
    """Return the moments of activations (b, c, ...)."""
    x = _wide(x).reshape(len(x), groups, -1)
    var, mean = torch.var_mean(x, -1, correction=0)
    return _Moments(x.shape[-1], mean.cpu().double(), var.cpu().double())


def _pooled(parts: Sequence[_Moments]) -> _Moments:
    """Return the moments of all parts together: Var x = E Var(x | part) + Var E(x | part)."""
    size = torch.tensor([part.size for part in parts], dtype=torch.float64).view(-1, 1, 1)
    means, variances = torch.stack([part.mean for part in parts]), torch.stack([part.var for part in parts])
    share = size / size.sum()
    mean = (share * means).sum(0)
    return _Moments(int(size.sum()), mean, (share * (variances + (means - mean) ** 2)).sum(0))


class _Reached(Exception):
    """Exception that ends a run at a norm without statistics, after measuring its input."""


class _GroupNorms:
    """Hook on group norms, which gives them the whole image's statistics.

    A norm whose statistics are already known uses them. For any other norm, the statistics of its input are measured.
    """

    tile: Tile
    """Tile whose own part is measured at the first norm without statistics."""

    def __init__(self) -> None:
        self.fixed: dict[nn.Module, _Moments] = {}
        self.measured: dict[nn.Module, list[_Moments]] = {}

    def fix(self) -> None:
        """Set the statistics of the norms measured so far; they don't change afterwards."""
        while self.measured:
            norm, parts = self.measured.popitem()
            self.fixed[norm] = _pooled(parts)

    def __call__(self, norm: nn.GroupNorm, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = inputs  # (b, c, ...)
        if norm in self.fixed:
            return _normalised(x, norm, self.fixed[norm]).to(output.dtype)
        self.measured.setdefault(norm, []).append(_moments(self.tile.own(x), norm.num_groups))
        raise _Reached


def _normalised(x: Tensor, norm: nn.GroupNorm, moments: _Moments) -> Tensor:
    """Apply the group norm to x with the given statistics, as a batch norm in eval mode with b × c channels."""
    b, c = x.shape[:2]
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean, var = (m.repeat_interleave(c // norm.num_groups, 1).flatten().to(x.device, dtype) for m in moments[1:])
    weight, bias = norm.weight.to(dtype).repeat(b), norm.bias.to(dtype).repeat(b)
    return F.batch_norm(x.reshape(1, b * c, *x.shape[2:]), mean, var, weight, bias, eps=norm.eps).view(x.shape)


@contextmanager
def _group_norms(network: nn.Module | None) -> Iterator[_GroupNorms]:
    """Keep a hook on every group norm of the network within the context."""
    hook = _GroupNorms()
    modules = [] if network is None else network.modules()
    handles = [norm.register_forward_hook(hook) for norm in modules if isinstance(norm, nn.GroupNorm)]
    try:
        yield hook
    finally:
        for handle in handles:
            handle.remove()


def _measure(run: Callable[[Tensor], Tensor], x: Tensor, places: Sequence[Tile], down: int, norms: _GroupNorms) -> None:
    """Measure the whole image's statistics of every norm, one norm after the other.

    Each run stops at the norm being measured. The norms can't be measured all at once, since each changes the input of
    the later ones; repeating that a few times doesn't converge.
    """
    while True:
        for place in places:
            norms.tile = place
            try:
                run(x[place.at(down)])
            except _Reached:
                continue
            return  # the run reached the end, so all norms are fixed
        norms.fix()


def _wide(x: Tensor) -> Tensor:
    """Cast to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
