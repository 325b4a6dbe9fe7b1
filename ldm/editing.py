"""Editing of input images: image to image (Meng et al. 2022, SDEdit) and inpainting inside a mask.

White in a mask is the masked area, which is inpainted; the input image stays in the unmasked area. This works with any
model. After every step, the unmasked latents are replaced by those of the input image at that step's noise level (Song
et al. 2021, arXiv 2011.13456, appendix I.2). This wraps the step; the sampling loop stays the same.

A latent at the mask's edge is only partly masked. While there is more noise than signal and the layout of the image
forms, it is replaced too, so that the new content fits inside the mask. Afterwards it is inpainted (after Levin & Fried
2023, arXiv 2306.00950, where inpainting starts at a different step for each latent).
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
from ldm.float64 import double
from ldm.formats.images import to_rgb
from ldm.schedule import Level
from ldm.steps import Noise, Step

_BLACK = 8 / 255  # lower mask values count as black

Pixels = Image.Image | Tensor | np.ndarray | Sequence[Image.Image]
"""PIL images, a tensor (b, 3, h, w) or an array (b, h, w, 3) in [0, 1]."""


def steps_for_strength(strength: float, n: int) -> int:
    """Return how many of n steps are taken: all at strength 1, none at 0, else ⌊n · strength⌋, but at least one.

    Raises UserError outside [0, 1].
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength {strength}: must be 0 (keep the image) to 1 (replace it)")
    return max(math.floor(n * strength + 1e-6), 1) if strength else 0


def to_pixels(images: Pixels, argument: str = "image") -> Tensor:
    """Convert images of one size to (b, 3, h, w) float32 in [0, 1], on the CPU.

    Transparent PIL images are put on a white background. argument: the name of the pipeline's argument. For mask_image,
    the result has one channel, and transparent areas are black. Raises UserError, with that name, for other input.
    """
    mask = argument == "mask_image"
    if isinstance(images, Tensor):
        pixels = images.detach().float().cpu()
    elif isinstance(images, np.ndarray):
        pixels = torch.from_numpy(np.array(images, np.float32))
        pixels = pixels.movedim(-1, -3) if pixels.ndim > 2 else pixels
    else:
        pil_images = [images] if isinstance(images, Image.Image) else list(images)
        if not pil_images or not all(isinstance(image, Image.Image) for image in pil_images):
            raise UserError(f"{argument}: must be PIL images, or a tensor or array with values in [0, 1]")
        if len({image.size for image in pil_images}) > 1:
            sizes = ", ".join("×".join(map(str, image.size)) for image in pil_images)
            raise UserError(f"{argument}: images of sizes {sizes}: all must have the same size")
        try:
            converted = [to_rgb(image, (0, 0, 0) if mask else (255, 255, 255)) for image in pil_images]
        except ValueError as error:
            raise UserError(f"{argument}: {error}") from None
        arrays = [np.asarray(image.convert("L") if mask else image, np.float32) / 255 for image in converted]
        pixels = torch.from_numpy(np.stack(arrays))  # (b, h, w) or (b, h, w, 3)
        pixels = pixels[:, None] if mask else pixels.movedim(-1, 1)
    pixels = pixels[None, None] if mask and pixels.ndim == 2 else pixels
    channels = 1 if mask else 3
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] != channels or not pixels.numel():
        raise UserError(f"{argument} of shape {tuple(pixels.shape)}: must be (b, {channels}, h, w)")
    if not (torch.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise UserError(f"{argument}: values from {pixels.min():g} to {pixels.max():g}: must be from 0 to 1")
    return pixels


def to_mask(mask: Pixels, size: tuple[int, int]) -> Tensor:
    """Convert a mask to (b, 1, h, w) in [0, 1] and resize it to (h, w).

    If it gets smaller, each pixel takes the maximum over its area, so that thin lines remain. Nearly black values, such
    as the noise of a scan or a JPEG file, become black. Raises UserError for a mask that is all black.
    """
    pixels = to_pixels(mask, "mask_image")
    pixels = torch.where(pixels < _BLACK, 0, pixels)
    if tuple(pixels.shape[2:]) != size:
        pixels = F.adaptive_max_pool2d(pixels, [min(n, m) for n, m in zip(size, pixels.shape[2:], strict=True)])
        pixels = F.interpolate(pixels, size)
    if not pixels.flatten(1).amax(1).all():
        raise UserError("mask_image is completely black: draw the area to inpaint in white")
    return pixels


def pad(x: Tensor, multiple: int) -> Tensor:
    """Pad (b, c, h, w) by repeating the last row and column until both sides are multiples of `multiple`."""
    h, w = x.shape[2:]
    return F.pad(x, (0, -w % multiple, 0, -h % multiple), mode="replicate")


def latent_mask(mask: Tensor, factor: int) -> Tensor:
    """Reduce a mask of pixels (b, 1, H, W) to a mask of latents (b, 1, h, w), the maximum over each latent's pixels."""
    return F.max_pool2d(mask, factor)


def masked_image(pixels: Tensor, mask: Tensor) -> Tensor:
    """Return images (b, 3, h, w) in [−1, 1] whose masked area is grey, an input of an inpainting network."""
    return pixels * (mask == 0)


def fill_masked_area(pixels: Tensor, mask: Tensor) -> Tensor:
    """Return images (b, 3, h, w) in which the masked area is filled with smooth colours from its surroundings.

    Each unknown pixel takes the mean of the known pixels near it, from coarse to fine (pull-push: Gortler et al. 1996,
    sec. 3.4).
    """
    known = (mask == 0).to(pixels)
    if known.all() or mask.shape[2:] == (1, 1):
        return pixels
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    coarse = F.avg_pool2d(pixels * known, 2, ceil_mode=True) / share.clamp_min(1e-6)
    surroundings = F.interpolate(fill_masked_area(coarse, (share == 0).to(mask)), pixels.shape[2:], mode="bilinear")
    return torch.where(mask == 0, pixels, surroundings)


def inpainting_context(mask: Tensor, masked_latents: Tensor) -> Tensor:
    """Return the context of an inpainting network, (b, 1 + c, h, w).

    Its channels are the mask (b, 1, H, W) reduced to latents, which is 1 if any pixel of a latent is masked, and the
    latents (b, c, h, w) of the `masked_image`.
    """
    return torch.cat([latent_mask((mask > 0).float(), mask.shape[-1] // masked_latents.shape[-1]), masked_latents], 1)


def paste(generated: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Combine images (b, 3, h, w): `generated` where the mask is white, exactly `original` in black, a mix in grey."""
    return torch.where(mask > 0, original + mask * (generated - original), original)


class InpaintMasks(NamedTuple):
    """Masks of the latents to inpaint, (b, 1, h, w) bool each. The other latents are replaced by the input image's."""

    noisy: Tensor
    """Mask for levels with more noise than signal."""
    clear: Tensor
    """Mask for levels with at least as much signal as noise."""


def inpaint_masks(mask: Tensor, factor: int, mask_is_input: bool) -> InpaintMasks:
    """Return the masks of the latents to inpaint for a mask of pixels (b, 1, H, W).

    mask_is_input: whether the network has the mask as an input. Such a network keeps unmasked latents by itself, so
    only latents at the mask's edge are replaced.
    """
    any_masked, all_masked = latent_mask(mask, factor) > 0, latent_mask((mask < 0.5).float(), factor) == 0
    if mask_is_input:
        return InpaintMasks(all_masked | ~any_masked, torch.ones_like(any_masked))
    return InpaintMasks(all_masked, any_masked)


class BlendedStep:
    """A step after which the latents that aren't inpainted are replaced by those of the input image."""

    def __init__(self, step: Step, x0: Tensor, noise: Tensor | None, masks: InpaintMasks, last: Level) -> None:
        """Wrap a step.

        x0: the input image's latents, (b, c, h, w).
        noise: noise that is added to x0 at every level, of the same shape; None: new noise at each level.
        last: the level at which the last step ends, where no noise is added to x0.
        """
        self.step, self.x0, self.noise, self.masks, self.last = step, x0, noise, masks, last

    def __call__(self, denoise: Denoise, x: Tensor, now: Level, next: Level, noise: Noise) -> Tensor:
        inpainted, is_last = self.step(denoise, x, now, next, noise), next is self.last
        original = self.x0
        if not is_last:
            original = next.alpha * self.x0 + next.sigma * (noise() if self.noise is None else self.noise)
        clear = is_last or next.sigma <= next.alpha
        return torch.where(self.masks.clear if clear else self.masks.noisy, inpainted, original)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolate from a (t = 0) to b (t = 1) along the arc between them, (b, …), separately for each image.

    On the straight line between two independent noise tensors, the length is too small, in the middle by a factor of
    √2. The variance is then not 1, and images generated from it are flat. On the arc, the length changes linearly from
    a's to b's. If a and b have the same direction, the arc is the line. If they have opposite directions, any arc is
    valid and one is chosen.
    """
    if t in (0, 1):
        return a if t == 0 else b
    x, y = double(a).flatten(1), double(b).flatten(1)  # (b, n)
    length = torch.lerp(x.norm(dim=1, keepdim=True), y.norm(dim=1, keepdim=True), t)
    x, y = F.normalize(x), F.normalize(y)
    cos = (x * y).sum(1, keepdim=True)
    orthogonal = y - cos * x  # component of b orthogonal to a
    sin = orthogonal.norm(dim=1, keepdim=True)
    pairs = F.pad(x, (0, x.shape[1] % 2)).unflatten(1, (-1, 2))
    rotated = torch.stack([-pairs[..., 1], pairs[..., 0]], 2).flatten(1)[:, : x.shape[1]]  # also orthogonal to a
    orthogonal = F.normalize(torch.where(sin > 1e-12, orthogonal, rotated))
    angle = t * torch.atan2(sin, cos)
    return ((angle.cos() * x + angle.sin() * orthogonal) * length).view_as(a).to(a.dtype)
