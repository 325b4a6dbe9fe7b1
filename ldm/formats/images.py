"""Conversion of any image to upright 8-bit RGB in the sRGB colour space, without transparency.

EXIF's rotation is applied (Pillow applies TIFF's own tag while loading). 16-bit grey is scaled to 8 bits, transparent
images are put on a background, and colours are converted from the image's profile to sRGB.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

Colour = tuple[int, int, int]

_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSES = {  # value of the tag → operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (_TRANSPOSES[5], _TRANSPOSES[6], _TRANSPOSES[7], _TRANSPOSES[8])
_ROUNDING = 2  # of 255: difference between common sRGB profiles


def to_rgb(image: Image.Image, background: Colour = (255, 255, 255)) -> Image.Image:
    """Return the image in mode RGB, with EXIF and profile applied. Raises ValueError for 32 bits per pixel."""
    transpose = _transpose(image)
    rgb = _opaque_rgb(image if transpose is None else image.transpose(transpose), background)
    rgb.info = {}
    return rgb


def is_sideways(image: Image.Image) -> bool:
    """Return whether `to_rgb` will swap width and height of an image. The image isn't decoded."""
    return _transpose(image, decode=False) in _SIDEWAYS


def _transpose(image: Image.Image, decode: bool = True) -> Image.Transpose | None:
    """Return the operation that turns an image upright, from its EXIF; None: it is upright.

    Without `decode`, EXIF after a PNG's pixels isn't found.
    """
    if not decode and image.format == "TIFF":  # Pillow gives the upright size
        return None
    try:
        exif = image.getexif() if decode else Image.Image.getexif(image)  # PNG's own method decodes
        return _TRANSPOSES.get(exif.get(_ORIENTATION, 1))
    except Exception:  # unreadable EXIF is ignored
        return None


def _opaque_rgb(image: Image.Image, background: Colour) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.float64) / 257  # 65535 → 255
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode} (32 bits per pixel) has no fixed range of values: save the image with 8 or 16 bits"
        )
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, _to_srgb(image.convert("RGBA"), profile)).convert("RGB")
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert the colours to sRGB; without a valid profile they stay the same."""
    transform = _transform(profile, image.mode) if profile else None
    return image if transform is None else transform.apply(image)


@lru_cache(maxsize=16)  # most images of a dataset share a few profiles
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile's colours to sRGB; None if the profile is sRGB up to rounding, or invalid."""
    target = "RGBA" if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, target)
        if mode == "CMYK":
            return transform
        levels = np.mgrid[:256:51, :256:51, :256:51].reshape(3, 1, -1).transpose(1, 2, 0)  # a grid of colours
        probe = Image.fromarray(levels.astype(np.uint8)).convert(mode)
        transformed = np.asarray(transform.apply(probe).convert("RGB")).astype(int)
        return None if np.abs(transformed - np.asarray(probe.convert("RGB"))).max() <= _ROUNDING else transform
    except Exception:  # an invalid profile is ignored, as in browsers
        return None
