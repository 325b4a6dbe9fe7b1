"""Inpaint the masked part of an image, or extend the image beyond its borders; the rest doesn't change."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from ldm.editing import steps_for_strength, to_mask
from ldm.errors import UserError
from ldm.formats import MAX_PIXELS
from ldm.formats.png import slug
from train.commands.generate import COMMAND_LINE, ImageGenerator, Session, open_image, options_like
from train.commands.sizes import fitted, restored
from train.config.generation import InpaintOptions


def inpaint(o: InpaintOptions, session: Session = COMMAND_LINE) -> Iterator[Path]:
    """Generate and write the images, and yield the path of each one."""
    o = options_like(o)
    steps_for_strength(o.strength, o.number_of_steps)  # raises UserError for a wrong strength, before any warning
    image = open_image(o.image, "--image")
    if not o.mask and not any(o.extend):
        raise UserError("--mask is missing: give an image that is white in the area to inpaint; or give --extend")
    mask = open_image(o.mask, "--mask", (0, 0, 0)).convert("L") if o.mask else Image.new("L", image.size)
    extension = extend(image, Image.new("L", mask.size), o)[1]
    image, mask = extend(image, mask, o)
    if not 0 <= o.feather <= max(image.size):
        raise UserError(f"--feather {o.feather}: must be 0 to {max(image.size)} pixels for this image")
    if o.feather:
        mask = ImageChops.lighter(
            mask.filter(ImageFilter.GaussianBlur(o.feather / 2)), extension
        )  # the extension stays white
    to_mask(mask, (mask.height, mask.width))  # raises UserError for a black mask, before any warning
    generator = ImageGenerator(o, session)
    files = {"image": o.image} | ({"mask": o.mask} if o.mask else {})
    fields = {
        "image": fitted(generator.pipe, image, o.resize, f"--image {o.image!r}"),
        "finish": partial(restored, given=image, mask=mask),
        "name": f"{slug(Path(o.image).stem)}-",
        "files": files,
    }
    jobs = [job for prompt in generator.prompts for job in generator.jobs(prompt, **fields)]
    return generator.generate(jobs, mask_image=mask, strength=o.strength)


def extend(image: Image.Image, mask: Image.Image, o: InpaintOptions) -> tuple[Image.Image, Image.Image]:
    """Return the image and mask extended by --extend: the image's edge is repeated, the new mask is white."""
    left, top, right, bottom = o.extend
    if min(o.extend) < 0:
        raise UserError(f"--extend {' '.join(map(str, o.extend))}: each number of pixels must be at least 0")
    if not any(o.extend):
        return image, mask
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > MAX_PIXELS:
        raise UserError(
            f"--extend: the image would have {width} × {height} pixels; the maximum is {MAX_PIXELS} in total"
        )
    if mask.size != image.size:
        raise UserError(
            f"--mask: has {mask.width} × {mask.height} pixels; with --extend it needs the size of the image, "
            f"{image.width} × {image.height}"
        )
    sides = ((top, bottom), (left, right))
    extended = Image.fromarray(np.pad(np.asarray(image), (*sides, (0, 0)), mode="edge"))
    return extended, Image.fromarray(np.pad(np.asarray(mask), sides, constant_values=255))
