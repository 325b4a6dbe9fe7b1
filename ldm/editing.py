"""Pictures as where sampling begins (Meng et al. 2022, SDEdit), or as what is to stay round a mask.

Inpainting with any model replaces, after every step, what lies outside the mask by the given latent at that step's noise
level (Song et al. 2021, arXiv 2011.13456, appendix I.2): it wraps the step, and the loop stays as it is. At the mask's edge
lie latents that it covers in part. As long as there is more noise than signal, when a picture is laid out, they are the
given ones, so that what is painted finds its place inside; afterwards they are painted too (after Levin & Fried 2023, arXiv
2306.00950, who give each latent a step from which on it is painted).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.denoiser import Denoise
from ldm.errors import UserError
from ldm.formats.images import to_rgb
from ldm.schedule import Level
from ldm.steps import Noise, Step

_BLACK = 8 / 255  # masks' values below it

Pixels = Image.Image | Tensor | np.ndarray | Sequence[Image.Image]
"""PIL pictures, or (b, 3, h, w) or (b, h, w, 3) in [0, 1]."""


def steps_of(strength: float, n: int) -> int:
    """How many of n steps are walked: all at strength 1, none at 0, else ⌊n · strength⌋, but at least one.

    Raises UserError outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength}: 0 (the picture as it is) to 1 (nothing of it) is accepted")
    return max(math.floor(n * strength + 1e-6), 1) if strength else 0


def to_pixels(images: Pixels, what: str = "image") -> Tensor:
    """Pictures of one size, (b, 3, h, w) float32 in [0, 1], on the CPU. Raises UserError for anything else.

    Transparent PIL pictures are laid on white; of a mask, which has one channel, what is transparent is black.
    """
    mask = what == "mask_image"
    if isinstance(images, Tensor):
        found = images.detach().float().cpu()
    elif isinstance(images, np.ndarray):
        found = torch.from_numpy(np.array(images, np.float32))
        found = found.movedim(-1, -3) if found.ndim > 2 else found
    else:
        listed = [images] if isinstance(images, Image.Image) else list(images)
        if not listed or not all(isinstance(image, Image.Image) for image in listed):
            raise UserError(f"{what}: PIL pictures, or a tensor or array in [0, 1] is accepted")
        if len({image.size for image in listed}) > 1:
            raise UserError(
                f"{what}: pictures of sizes {', '.join('×'.join(map(str, i.size)) for i in listed)}: give one size"
            )
        try:
            seen = [to_rgb(image, (0, 0, 0) if mask else (255, 255, 255)) for image in listed]
        except ValueError as error:
            raise UserError(f"{what}: {error}") from None
        arrays = [np.asarray(image.convert("L") if mask else image, np.float32) / 255 for image in seen]
        found = torch.from_numpy(np.stack(arrays))  # (b, h, w) or (b, h, w, 3)
        found = found[:, None] if mask else found.movedim(-1, 1)
    found = found[None, None] if mask and found.ndim == 2 else found
    channels = 1 if mask else 3
    found = found[None] if found.ndim == 3 else found
    if found.ndim != 4 or found.shape[1] != channels or not found.numel():
        raise UserError(f"{what} of shape {tuple(found.shape)}: (b, {channels}, h, w) is accepted")
    if not (torch.isfinite(found).all() and found.min() >= 0 and found.max() <= 1):
        raise UserError(f"{what}: values from {found.min():g} to {found.max():g}; 0 to 1 are accepted")
    return found


def to_mask(mask: Pixels, size: tuple[int, int]) -> Tensor:
    """Where to paint, (b, 1, h, w) in [0, 1]; white is painted. A mask of another size is brought to (h, w).

    When it is reduced, a thin line stays: the whitest of what falls on a pixel counts. What is black but for the noise of
    a scan or a JPEG file is black. Raises UserError where nothing is to be painted.
    """
    found = to_pixels(mask, "mask_image")
    found = torch.where(found < _BLACK, 0, found)
    if tuple(found.shape[2:]) != size:
        found = F.adaptive_max_pool2d(found, [min(n, m) for n, m in zip(size, found.shape[2:], strict=True)])
        found = F.interpolate(found, size)
    if not found.flatten(1).amax(1).all():
        raise UserError("mask_image is black: what is white in it is painted")
    return found


def pad(x: Tensor, multiple: int) -> Tensor:
    """(b, c, h, w) with its last row and column repeated until both sides are multiples."""
    h, w = x.shape[2:]
    return F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate")


def on_latents(mask: Tensor, factor: int) -> Tensor:
    """A mask (b, 1, h, w) of pixels as one of latents: whatever a latent covers of it, it has to paint."""
    return F.max_pool2d(mask, factor)


def without(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pictures (b, 3, h, w) in [−1, 1], grey where anything is to be painted: what a UNet trained to inpaint sees of them."""
    return pixels * (mask == 0)


def filled(pixels: Tensor, mask: Tensor) -> Tensor:
    """Pictures (b, 3, h, w) with smooth colours, made up from what lies around, where anything is to be painted.

    From coarse to fine: each pixel takes the mean of what is known near it (pull-push: Gortler et al. 1996, sec. 3.4).
    """
    known = (mask == 0).to(pixels)
    if known.all() or mask.shape[2:] == (1, 1):
        return pixels
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(pixels * known, 2, ceil_mode=True) / share.clamp_min(1e-6)
    around = F.interpolate(filled(coarse, (share == 0).to(mask)), pixels.shape[2:], mode="bilinear")
    return torch.where(mask == 0, pixels, around)


def inpainting_context(mask: Tensor, around: Tensor) -> Tensor:
    """What it sees beside its state, (b, 1 + c, h, w): the mask (b, 1, H, W), 1 where any of a latent's pixels is to be
    painted, and `around` (b, c, h, w), the latent of what the mask leaves.
    """
    return torch.cat([on_latents((mask > 0).float(), mask.shape[-1] // around.shape[-1]), around], 1)


def paste(made: Tensor, given: Tensor, mask: Tensor) -> Tensor:
    """(b, 3, h, w): what was made inside the mask, what was given outside, bit by bit, mixed where the mask is grey."""
    return torch.where(mask > 0, given + mask * (made - given), given)


class Painted(NamedTuple):
    """Which latents are painted, (b, 1, h, w) bool each; the others are the given ones."""

    first: Tensor
    """As long as there is more noise than signal."""
    then: Tensor


def painted(mask: Tensor, factor: int, seen: bool) -> Painted:
    """By a mask of pixels (b, 1, H, W). seen: by the UNet, which keeps by itself what lies outside, but for the edge."""
    covered, whole = on_latents(mask, factor) > 0, on_latents((mask < 0.5).float(), factor) == 0
    return Painted(whole | ~covered, torch.ones_like(covered)) if seen else Painted(whole, covered)


class Blended:
    """A step after which latents that aren't painted are the given ones."""

    def __init__(self, step: Step, x0: Tensor, noise: Tensor | None, painted: Painted, last: Level) -> None:
        """x0: the given latent, (b, c, h, w), and noise, of the same shape, what noises it at every level; None: what is
        drawn anew at each.

        last: where the steps end; there x0 is given as it is.
        """
        self.step, self.x0, self.noise, self.painted, self.last = step, x0, noise, painted, last

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        made, last = self.step(denoise, x, now, next, noise), next is self.last
        given = self.x0
        if not last:
            given = next.alpha * self.x0 + next.sigma * (noise() if self.noise is None else self.noise)
        signal = last or next.sigma <= next.alpha
        return torch.where(self.painted.then if signal else self.painted.first, made, given)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a (t = 0) to b (t = 1) along the arc between them, (b, …), each picture by itself.

    The straight line between two independent noises is too short by up to √2 in its middle, so that it is no noise of
    unit variance any more, and what is painted from it is flat; on the arc it keeps its length. Where a and b point the
    same way the arc is the line; where they point opposite ways all arcs are as good, and one of them is taken.
    """
    if t in (0, 1):
        return a if t == 0 else b
    x, y = a.double().flatten(1), b.double().flatten(1)  # (b, n)
    length = torch.lerp(x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True), t)
    x, y = F.normalize(x), F.normalize(y)
    cos = (x * y).sum(1, keepdim=True)
    beside = y - cos * x  # what b has that a hasn't
    sin = beside.norm(dim=1, keepdim=True)
    pairs = F.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2))
    turned = (pairs.flip(2) * x.new_tensor([-1, 1])).flatten(1)[:, : x.shape[1]]  # at a right angle to a
    beside = F.normalize(torch.where(sin > 1e-12, beside, turned))
    angle = t * torch.atan2(sin, cos)
    return ((angle.cos() * x + angle.sin() * beside) * length).view_as(a).to(a.dtype)
