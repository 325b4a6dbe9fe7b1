"""Editing of given images: image to image (Meng et al. 2022, SDEdit) and inpainting within a mask.

Inpainting works with any model. After every step, the latents outside the mask are replaced by the given latents at
that step's noise level (Song et al. 2021, arXiv 2011.13456, appendix I.2). This wraps the step; the sampling loop stays
the same. Latents at the mask's edge are only partly covered by it. While there is more noise than signal and the layout
of the image forms, they are replaced too, so that the new content fits inside the mask. Afterwards they are painted
(after Levin & Fried 2023, arXiv 2306.00950, who give each latent a step at which painting starts).
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

_BLACK = 8 / 255  # mask values below it count as black

Pixels = Image.Image | Tensor | np.ndarray | Sequence[Image.Image]
"""PIL images, a tensor (b, 3, h, w) or an array (b, h, w, 3) in [0, 1]."""


def steps_of(strength: float, n: int) -> int:
    """Return how many of n steps are walked: all at strength 1, none at 0, else ⌊n · strength⌋, but at least one.

    Raises UserError outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength}: 0 (the image as it is) to 1 (nothing of it) is accepted")
    return max(math.floor(n * strength + 1e-6), 1) if strength else 0


def to_pixels(images: Pixels, what: str = "image") -> Tensor:
    """Convert images of one size to (b, 3, h, w) float32 in [0, 1], on the CPU. Raises UserError for other input.

    Transparent PIL images are put on a white background. A mask has one channel, and its transparent parts are black.
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
            raise UserError(f"{what}: PIL images, or a tensor or array in [0, 1] is accepted")
        if len({image.size for image in listed}) > 1:
            raise UserError(
                f"{what}: images of sizes {', '.join('×'.join(map(str, i.size)) for i in listed)}: give one size"
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
    """Convert a mask to (b, 1, h, w) in [0, 1] and resize it to (h, w). White is painted.

    Reducing takes the maximum over each pixel's area, so that thin lines remain. Nearly black values, such as the noise
    of a scan or a JPEG file, become black. Raises UserError for a mask that is all black.
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
    """Pad (b, c, h, w) by repeating the last row and column until both sides are multiples of `multiple`."""
    h, w = x.shape[2:]
    return F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate")


def on_latents(mask: Tensor, factor: int) -> Tensor:
    """Reduce a mask of pixels (b, 1, h, w) to one of latents, which is the maximum over each latent's pixels."""
    return F.max_pool2d(mask, factor)


def without(pixels: Tensor, mask: Tensor) -> Tensor:
    """Return images (b, 3, h, w) in [−1, 1] that are grey wherever the mask isn't black, for an inpainting UNet."""
    return pixels * (mask == 0)


def filled(pixels: Tensor, mask: Tensor) -> Tensor:
    """Return images (b, 3, h, w) in which the painted area is filled with smooth colours from its surroundings.

    Each unknown pixel takes the mean of the known pixels near it, from coarse to fine (pull-push: Gortler et al. 1996,
    sec. 3.4).
    """
    known = (mask == 0).to(pixels)
    if known.all() or mask.shape[2:] == (1, 1):
        return pixels
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(pixels * known, 2, ceil_mode=True) / share.clamp_min(1e-6)
    around = F.interpolate(filled(coarse, (share == 0).to(mask)), pixels.shape[2:], mode="bilinear")
    return torch.where(mask == 0, pixels, around)


def inpainting_context(mask: Tensor, around: Tensor) -> Tensor:
    """Return the context of an inpainting network, (b, 1 + c, h, w).

    It is the mask (b, 1, H, W) reduced to latents, 1 if any pixel of a latent is painted, and `around` (b, c, h, w),
    the latent of the image outside the mask.
    """
    return torch.cat([on_latents((mask > 0).float(), mask.shape[-1] // around.shape[-1]), around], 1)


def paste(made: Tensor, given: Tensor, mask: Tensor) -> Tensor:
    """Combine generated and given images (b, 3, h, w): `made` in white, exactly `given` in black, a mix in grey."""
    return torch.where(mask > 0, given + mask * (made - given), given)


class InpaintMasks(NamedTuple):
    """Masks of the painted latents, (b, 1, h, w) bool each; the other latents are the given ones."""

    first: Tensor
    """Mask while there is more noise than signal."""
    then: Tensor
    """Mask afterwards."""


def inpaint_masks(mask: Tensor, factor: int, seen: bool) -> InpaintMasks:
    """Return the painted latents for a mask of pixels (b, 1, H, W).

    seen: whether the UNet sees the mask; it then keeps the latents outside by itself, except at the edge.
    """
    covered, whole = on_latents(mask, factor) > 0, on_latents((mask < 0.5).float(), factor) == 0
    return InpaintMasks(whole | ~covered, torch.ones_like(covered)) if seen else InpaintMasks(whole, covered)


class Blended:
    """A step after which the latents that aren't painted are replaced by the given ones."""

    def __init__(self, step: Step, x0: Tensor, noise: Tensor | None, masks: InpaintMasks, last: Level) -> None:
        """Wrap a step.

        x0: the given latents, (b, c, h, w).
        noise: their noise at every level, of the same shape; None: new noise at each level.
        last: the level at which the steps end, where x0 stays without noise.
        """
        self.step, self.x0, self.noise, self.masks, self.last = step, x0, noise, masks, last

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        made, last = self.step(denoise, x, now, next, noise), next is self.last
        given = self.x0
        if not last:
            given = next.alpha * self.x0 + next.sigma * (noise() if self.noise is None else self.noise)
        signal = last or next.sigma <= next.alpha
        return torch.where(self.masks.then if signal else self.masks.first, made, given)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from a (t = 0) to b (t = 1) along the arc between them, (b, …), separately for each image.

    On the straight line between two independent noises, the length is too small by a factor of up to √2 in the middle.
    The variance is then not 1, and images generated from it are flat. The arc keeps the length. If a and b have the
    same direction, the arc is the line. If they have opposite directions, any arc is valid and one is chosen.
    """
    if t in (0, 1):
        return a if t == 0 else b
    x, y = a.double().flatten(1), b.double().flatten(1)  # (b, n)
    length = torch.lerp(x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True), t)
    x, y = F.normalize(x), F.normalize(y)
    cos = (x * y).sum(1, keepdim=True)
    beside = y - cos * x  # component of b orthogonal to a
    sin = beside.norm(dim=1, keepdim=True)
    pairs = F.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2))
    turned = (pairs.flip(2) * x.new_tensor([-1, 1])).flatten(1)[:, : x.shape[1]]  # orthogonal to a
    beside = F.normalize(torch.where(sin > 1e-12, beside, turned))
    angle = t * torch.atan2(sin, cos)
    return ((angle.cos() * x + angle.sin() * beside) * length).view_as(a).to(a.dtype)
