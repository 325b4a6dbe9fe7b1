"""Decoding of image files to 8-bit RGB images and tensors; a damaged file gives the reason why it can't be decoded.

Alpha is composed over a background, EXIF rotation is applied, 16-bit grey is scaled to 8 bits, colours are converted
from the file's colour profile to sRGB, and the first frame of an animation is used. Only the formats in FORMATS are
tried, and nothing is decoded before its size has been checked against the limit.
"""

import errno
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import assert_never

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from ldm.errors import one_line
from ldm.files import read_regular
from ldm.formats import MAX_PIXELS
from ldm.formats.images import is_sideways, to_rgb
from train.data.images import MAX_BYTES, Crop
from train.data.images.complete import load_complete


def _register_heif() -> bool:
    """Let Pillow read HEIF files through the package pillow-heif. Returns whether it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener(thumbnails=False)
    return True


HEIF = _register_heif()
"""Whether HEIF images (.heic) can be read."""
# JPEG's reader also reads MPO, a file of several JPEGs that some cameras write.
FORMATS = (
    *("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"),
    *(["AVIF"] if features.check("avif") else []),
    *(["HEIF"] if HEIF else []),
)

Image.MAX_IMAGE_PIXELS = None  # max_pixels replaces this limit; it is checked after the header
SYSTEM_ERRORS = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETIMEDOUT, errno.ESTALE}


class DamagedImage(Exception):
    """A file that can't be decoded, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class UnknownFormat(DamagedImage):
    """A file of no format that can be read here; with a package for its format, it may be readable later."""


def check_format(content: bytes, name: str) -> None:
    """Raise UnknownFormat unless a file begins like an image of an accepted format."""
    try:
        Image.open(io.BytesIO(content), formats=FORMATS).close()
    except UnidentifiedImageError:
        raise UnknownFormat(name, _not_accepted()) from None
    except Exception:  # a damaged header; Pillow raises nearly every kind of exception
        return


def load_image(
    file: bytes | Path,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Return the image in a file, mode RGB.

    name: for messages; empty: the path. Raises DamagedImage, or OSError if the machine failed and not the file.
    """
    with _open(file, name, max_pixels) as (image, content):
        load_complete(image, content)
        return to_rgb(image, background)


def image_size(file: bytes | Path, *, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return width and height of load_image's result, read from the file's header. Raises the same errors."""
    with _open(file, name, max_pixels) as (image, _):
        width, height = image.size
        return (height, width) if is_sideways(image) else (width, height)


def to_tensor(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: Crop = "center",
    place: Sequence[float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """Crop an RGB image to the proportions of `size` and resize it: (3, height, width) in [−1, 1].

    The crop is as large as possible. size: width and height, or the side of a square. place: two numbers in [0, 1) that
    set the position of a "random" crop, across and down; a "center" crop is centred within half a pixel. Resizing is
    Lanczos, with a wider filter for downsizing (no aliasing); an image that already has this size is copied unchanged.
    """
    target = (size, size) if isinstance(size, int) else size
    # Crop width × target height = crop height × target width; the largest crop that fits has the smaller product.
    product = min(length * other for length, other in zip(image.size, reversed(target), strict=True))
    exact = [product / other for other in reversed(target)]  # crop of exact proportions, not always in whole pixels
    covered = [-(-product // other) for other in reversed(target)]  # number of whole pixels that this crop touches
    match crop:
        case "center":
            left, top = ((length - n) // 2 for length, n in zip(image.size, covered, strict=True))
        case "random":
            left, top = (
                math.floor(u * (length - n + 1)) for u, length, n in zip(place, image.size, covered, strict=True)
            )
        case _:
            assert_never(crop)
    if image.size != tuple(covered):
        image = image.crop((left, top, left + covered[0], top + covered[1]))
    if image.size != target:
        x, y = ((n - length) / 2 for n, length in zip(covered, exact, strict=True))
        image = image.resize(target, Image.Resampling.LANCZOS, box=(x, y, x + exact[0], y + exact[1]))
    levels = np.asarray(image)[:, :: -1 if flip else 1].transpose(2, 0, 1)  # (3, h, w)
    pixels = np.empty(levels.shape, np.float32)
    np.divide(levels, np.float32(127.5), out=pixels, dtype=np.float32)  # NumPy's calls cost less than torch's
    return torch.from_numpy(np.subtract(pixels, np.float32(1), out=pixels))


def _not_accepted() -> str:
    return f"not an image of an accepted format ({', '.join(FORMATS)})"


@contextmanager
def _open(file: bytes | Path, name: str, max_pixels: int) -> Iterator[tuple[Image.Image, bytes]]:
    """Open an image within the limit, without decoding it. Errors inside become DamagedImage.

    Yields the image and the file's content.
    """
    name = name or (str(file) if isinstance(file, Path) else "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file raises an exception; warnings add nothing
            content = read_regular(file, MAX_BYTES) if isinstance(file, Path) else file
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    reason = f"{image.width} × {image.height} pixels; up to {max_pixels:,} are accepted"
                    raise DamagedImage(name, reason)
                yield image, content
    except (DamagedImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnknownFormat(name, _not_accepted()) from None
    except Exception as error:  # Pillow's decoders raise nearly every kind of exception
        if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
            raise
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DamagedImage(name, one_line(message, 200)) from error
