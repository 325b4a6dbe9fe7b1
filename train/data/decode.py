"""From a file to an 8-bit RGB picture to a tensor, whatever kind of picture it is; or a reason why not.

Alpha is laid over a background, EXIF's rotation is applied, 16-bit grey is scaled to 8, the first frame of an animation
is taken. Colour profiles are not applied. Only the formats in FORMATS are tried, and nothing is decoded before its
size is known to be within the limit.
"""

import errno
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

Crop = Literal["center", "random"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 89_478_485  # Pillow's own figure: a quarter of a GiB of RGB

_MACHINE = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ETIMEDOUT, errno.ESTALE}
_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DamagedPicture(Exception):
    """A file that gives no picture, and why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def load_picture(
    path: Path, *, max_pixels: int = MAX_PIXELS, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """The picture in a file, mode RGB. Raises DamagedPicture; OSError where the machine failed, not the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file is told by the exception alone
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    reason = f"{image.width} × {image.height} pixels; up to {max_pixels:,} are accepted"
                    raise DamagedPicture(path, reason)
                image.load()
                return _to_rgb(_upright(image), background)
    except DamagedPicture:
        raise
    except UnidentifiedImageError:
        raise DamagedPicture(path, f"not a picture of an accepted format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind there is
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DamagedPicture(path, " ".join(message.split())[:200]) from error


def to_tensor(
    image: Image.Image,
    resolution: int,
    *,
    crop: Crop = "center",
    place: Sequence[float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """The largest square of an RGB picture, resized: (3, resolution, resolution) in [−1, 1].

    place: two numbers in [0, 1) that say where a "random" crop lies, across and down. Resizing is Lanczos's, with the
    filter widened when it shrinks (no aliasing); a square of the right size is taken over bit for bit.
    """
    side = min(image.size)
    match crop:
        case "center":
            left, top = ((length - side) // 2 for length in image.size)
        case "random":
            left, top = (math.floor(u * (length - side + 1)) for u, length in zip(place, image.size, strict=True))
        case _:
            assert_never(crop)
    if image.size != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != resolution:
        image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)  # (3, h, w)
    return (pixels.flip(2) if flip else pixels).float().div_(127.5).sub_(1).contiguous()


def _upright(image: Image.Image) -> Image.Image:
    """As EXIF says it is to be seen. (TIFF's own tag, Pillow has applied while loading.)"""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # unreadable EXIF says nothing
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 → 255
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32 bits a pixel) has no known range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(behind, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
