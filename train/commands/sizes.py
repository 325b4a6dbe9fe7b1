"""Image sizes that suit a model: resizing to the size that it was trained at and back, and warnings."""

import math

from PIL import Image

from ldm.editing import paste, to_mask, to_pixels
from ldm.pipeline import LatentDiffusionPipeline, to_pil
from train.config.generation import Resize
from train.output import warn

_FAR = 2.25  # factor between numbers of pixels


def trained_size(pipe: LatentDiffusionPipeline) -> tuple[int, int]:
    """Return the width and height of the images that a model was trained at."""
    h, w = pipe.backbone.sample_size
    return w * pipe.autoencoder.factor, h * pipe.autoencoder.factor


def is_far(pipe: LatentDiffusionPipeline, size: tuple[int, int]) -> bool:
    """Return whether a size, width and height, has many more or fewer pixels than the model was trained at."""
    ratio = math.prod(size) / math.prod(trained_size(pipe))
    return not 1 / _FAR <= ratio <= _FAR


def suitable(pipe: LatentDiffusionPipeline, size: tuple[int, int]) -> tuple[int, int]:
    """Return the size of about the same ratio that has about as many pixels as the model was trained at.

    Both sides are multiples of what the model needs.
    """
    multiple = pipe.model.size_multiple
    scale = math.sqrt(math.prod(trained_size(pipe)) / math.prod(size)) / multiple
    width, height = (multiple * max(1, round(side * scale)) for side in size)
    return width, height


def fitted(pipe: LatentDiffusionPipeline, image: Image.Image, resize: Resize, option: str) -> Image.Image:
    """Return a given image at the size at which to generate it, and warn if that isn't the size given.

    option: the option and value that gave the image, for the warning.
    """
    far = is_far(pipe, image.size)
    size = suitable(pipe, image.size) if resize == "always" or (resize == "auto" and far) else image.size
    if far:
        about = (
            f"{option}: has {_by(image.size)} pixels, far from the {_by(trained_size(pipe))} of the model's training"
        )
        if size == image.size:
            warn(f"{about}, so the result will be poor; leave --resize never out")
        else:
            warn(f"{about}; generated at {_by(size)} and resized back (--resize never: at its own size)")
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def restored(image: Image.Image, given: Image.Image, mask: Image.Image | None = None) -> Image.Image:
    """Return a generated image at the size of the given one. Outside the mask it has exactly the given pixels."""
    if image.size == given.size:
        return image
    whole = image.resize(given.size, Image.Resampling.BICUBIC)
    if mask is None:
        return whole
    white = to_mask(mask, (given.height, given.width))
    return to_pil(paste(to_pixels(whole), to_pixels(given), white))[0]


def warn_if_far(pipe: LatentDiffusionPipeline, width: int | None, height: int | None) -> None:
    """Warn if images of the requested size can't be good. Raises UserError for a size that the model can't have."""
    h, w = (side * pipe.autoencoder.factor for side in pipe.latent_size(height, width))
    if is_far(pipe, (w, h)):
        warn(
            f"--width {w} --height {h}: far from the {_by(trained_size(pipe))} of the model's training, so the images "
            "will be poor; leave both out, or choose sides with about as many pixels"
        )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"
