"""Paint inside a mask, or beyond a picture's borders; the rest stays as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image, ImageChops, ImageFilter

from ldm.errors import UserError
from ldm.formats import MAX_PIXELS
from ldm.formats.png import slug
from ldm.samplers import SamplerKind
from train.commands.main import command
from train.config.load import overlay
from train.config.painting import PaintOptions


@dataclass(frozen=True, kw_only=True)
class Options(PaintOptions):
    """Paint inside a mask, or beyond a picture's borders; the rest stays as it is, bit by bit."""

    sampler: SamplerKind = "dpmpp_2m_sde"
    """How a step is taken; those that draw noise on the way fit what they paint to its surroundings better."""
    image: str = ""
    """The picture, of any size."""
    mask: str = ""
    """White is painted, black and transparent stay, grey is mixed; of any size. May be left out with --extend."""
    strength: float = 1.0
    """How much of what is inside the mask is given up: 0 nothing, 1 all."""
    feather: float = 0.0
    """Soften the mask's edge over about so many pixels, on both its sides."""
    extend: Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = (0, 0, 0, 0)
    """Pixels to paint beyond the borders (outpainting)."""


def framed(image: Image.Image, mask: Image.Image, o: Options) -> tuple[Image.Image, Image.Image]:
    """Picture and mask with what is to be painted beyond the borders, where the picture's edge is repeated."""
    left, top, right, bottom = o.extend
    if min(o.extend) < 0:
        raise UserError(f"--extend {' '.join(map(str, o.extend))}: pixels to add, none below 0")
    if not any(o.extend):
        return image, mask
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > MAX_PIXELS:
        raise UserError(f"--extend to {width}×{height} pixels: up to {MAX_PIXELS} in all are accepted")
    if mask.size != image.size:
        raise UserError(
            f"--mask of {mask.width}×{mask.height} pixels with --extend: {image.width}×{image.height}, the picture's"
        )
    sides = ((top, bottom), (left, right))
    wide = Image.fromarray(np.pad(np.asarray(image), (*sides, (0, 0)), mode="edge"))
    return wide, Image.fromarray(np.pad(np.asarray(mask), sides, constant_values=255))


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.generate import Painter, like, open_picture  # which takes seconds

    o = like(o)
    image = open_picture(o.image, "--image")
    if not o.mask and not any(o.extend):
        raise UserError("--mask is missing: a picture that is white where to paint; or give --extend")
    mask = open_picture(o.mask, "--mask", (0, 0, 0)).convert("L") if o.mask else Image.new("L", image.size)
    beyond = framed(image, Image.new("L", mask.size), o)[1]
    image, mask = framed(image, mask, o)
    if not 0 <= o.feather <= max(image.size):
        raise UserError(f"--feather {o.feather}: pixels, 0 to {max(image.size)} for this picture")
    if o.feather:
        mask = ImageChops.lighter(mask.filter(ImageFilter.GaussianBlur(o.feather / 2)), beyond)  # that is all new
    painter = Painter(o)
    files = {"image": o.image} | ({"mask": o.mask} if o.mask else {})
    name = f"{slug(Path(o.image).stem)}-"
    wanted = [p for prompt in painter.prompts for p in painter.wanted(prompt, image=image, name=name, files=files)]
    for path in painter.paint(wanted, mask_image=mask, strength=o.strength):
        print(path)


if __name__ == "__main__":
    command(main)
