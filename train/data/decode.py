"""From a file to an 8-bit RGB picture to a tensor, whatever kind of picture it is; or a reason why not.

Alpha is laid over a background, EXIF's rotation is applied, 16-bit grey is scaled to 8, colours are brought from the
file's colour profile to sRGB, the first frame of an animation is taken. Only the formats in FORMATS are tried, and
nothing is decoded before its size is known to be within the limit.
"""

import errno
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import torch
from PIL import Image, ImageCms, UnidentifiedImageError, features
from torch import Tensor

Crop = Literal["center", "random"]

# JPEG's reader also takes MPO, several JPEGs in a file, as some cameras write them
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", *(["AVIF"] if features.check("avif") else []))
MAX_PIXELS = 89_478_485  # Pillow's own figure: a quarter of a GiB of RGB

Image.MAX_IMAGE_PIXELS = None  # the limit here is max_pixels, asked for after the header
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
_SIDEWAYS = (_UPRIGHT[5], _UPRIGHT[6], _UPRIGHT[7], _UPRIGHT[8])
_SAME = 2  # of 255: the common sRGB profiles differ by rounding


class DamagedPicture(Exception):
    """A file that gives no picture, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def load_picture(
    file: bytes | Path,
    *,
    name: str = "",
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """The picture in a file, mode RGB.

    name: for messages; empty: the path. Raises DamagedPicture; OSError where the machine failed, not the file.
    """
    with _open(file, name, max_pixels) as image:
        image.load()
        return _to_rgb(_upright(image), background)


def picture_size(file: bytes | Path, *, name: str = "", max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of the picture that load_picture would give, from the file's header. Raises as it does."""
    with _open(file, name, max_pixels) as image:
        width, height = image.size
        return (height, width) if _turn(image, decode=False) in _SIDEWAYS else (width, height)


def to_tensor(
    image: Image.Image,
    size: int | tuple[int, int],
    *,
    crop: Crop = "center",
    place: Sequence[float] = (0.5, 0.5),
    flip: bool = False,
) -> Tensor:
    """The largest window of an RGB picture that has the proportions of `size`, resized: (3, height, width) in [−1, 1].

    size: width and height, or the side of a square. place: two numbers in [0, 1) that say where a "random" window
    lies, across and down; a "center" one is centred within half a pixel. Resizing is Lanczos's, with the filter
    widened when it shrinks (no aliasing); a picture of the right size is taken over bit for bit.
    """
    target = (size, size) if isinstance(size, int) else size
    least = min(length * other for length, other in zip(image.size, reversed(target), strict=True))
    window = [least / other for other in reversed(target)]  # of exactly these proportions: not always whole pixels
    covered = [-(-least // other) for other in reversed(target)]  # the whole pixels that it needs
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
        x, y = ((n - length) / 2 for n, length in zip(covered, window, strict=True))
        image = image.resize(target, Image.Resampling.LANCZOS, box=(x, y, x + window[0], y + window[1]))
    pixels = torch.from_numpy(np.array(image, np.uint8)).permute(2, 0, 1)  # (3, h, w)
    return (pixels.flip(2) if flip else pixels).float().div_(127.5).sub_(1).contiguous()


@contextmanager
def _open(file: bytes | Path, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """A picture within the limit, not decoded yet. What goes wrong inside becomes DamagedPicture."""
    name = name or (str(file) if isinstance(file, Path) else "picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file is told by the exception alone
            with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    reason = f"{image.width} × {image.height} pixels; up to {max_pixels:,} are accepted"
                    raise DamagedPicture(name, reason)
                yield image
    except (DamagedPicture, MemoryError):
        raise
    except UnidentifiedImageError:
        raise DamagedPicture(name, f"not a picture of an accepted format ({', '.join(FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise nearly every kind there is
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise
        message = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DamagedPicture(name, " ".join(message.split())[:200]) from error


def _upright(image: Image.Image) -> Image.Image:
    """As EXIF says it is to be seen. (TIFF's own tag, Pillow has applied while loading.)"""
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image, decode: bool = True) -> Image.Transpose | None:
    """What EXIF says is to be done. Without leave to decode, EXIF behind a PNG's pixels isn't seen."""
    if not decode and image.format == "TIFF":  # whose size is the upright one
        return None
    try:
        exif = image.getexif() if decode else Image.Image.getexif(image)  # PNG's own method decodes
        return _UPRIGHT.get(exif.get(_ORIENTATION, 1))
    except Exception:  # unreadable EXIF says nothing
        return None


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 → 255
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32 bits a pixel) has no known range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(behind, _to_srgb(image.convert("RGBA"), profile)).convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours as they are meant; as they are where there is no profile, or none that makes sense."""
    transform = _transform(profile, image.mode) if profile else None
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=16)  # most pictures of a set share a few profiles
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where they are sRGB already, within rounding, or can't be told."""
    target = "RGBA" if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target)
        if mode == "CMYK":
            return transform
        levels = np.mgrid[:256:51, :256:51, :256:51].reshape(3, 1, -1).transpose(1, 2, 0)  # a lattice of colours
        probe = Image.fromarray(levels.astype(np.uint8)).convert(mode)
        seen = np.asarray(transform.apply(probe).convert("RGB")).astype(int)
        return None if np.abs(seen - np.asarray(probe.convert("RGB"))).max() <= _SAME else transform
    except Exception:  # as browsers do: a bad profile says nothing
        return None
