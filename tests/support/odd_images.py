"""Image files of many kinds, some of them damaged."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(image: Image.Image, form: str, **options) -> bytes:
    """Return the bytes of a file in a format of Pillow's."""
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def noise(rng: np.random.Generator, channels: int = 3, dtype=np.uint8) -> np.ndarray:
    """Return random pixels of a random size."""
    height, width = rng.integers(12, 40, 2)
    return rng.integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def chunk(name: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour_type: int, data: bytes) -> bytes:
    """Return a PNG file with these rows, whether or not they fit its size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


# -- kinds of files --------------------------------------------------------------------------------------------------

FORMS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
Made = tuple[bytes, str]  # a file, and its extension


def good(k: int, rng) -> Made:
    form = FORMS[k % 3]
    return encoded(Image.fromarray(noise(rng)), form), form.lower()


def truncated(k: int, rng) -> Made:
    form = FORMS[k % 6]
    content = encoded(Image.fromarray(noise(rng)), form)
    return content[: int(len(content) * rng.uniform(0.05, 0.85))], form.lower()


def flipped(k: int, rng) -> Made:
    form = FORMS[k % 6]
    raw = np.frombuffer(encoded(Image.fromarray(noise(rng)), form), np.uint8).copy()
    raw[rng.integers(0, len(raw), 1 + k % 8)] ^= np.uint8(1 << k % 8)
    return raw.tobytes(), form.lower()


def empty(k: int, rng) -> Made:
    return b"", ("png", "jpg", "webp")[k % 3]


def text(k: int, rng) -> Made:
    contents = (
        "<!DOCTYPE html><title>404</title>",
        "<svg xmlns='http://www.w3.org/2000/svg'/>",
        "version https://git-lfs",
    )
    return contents[k % 3].encode(), "png"


def no_size(k: int, rng) -> Made:
    width, height = ((0, 16), (16, 0), (0, 0))[k % 3]
    if k % 2:
        return png(width, height, 8, 2, b"\0" * 16), "png"
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0), "bmp"


def bomb(k: int, rng) -> Made:
    return png(60_000, 60_000, 1, 0, bytes(1000)), "png"


def cmyk(k: int, rng) -> Made:
    return encoded(Image.fromarray(noise(rng, 4), "CMYK"), ("JPEG", "TIFF")[k % 2]), ("jpg", "tif")[k % 2]


def sixteen_bits(k: int, rng) -> Made:
    channels, colour_type = ((1, 0), (2, 4), (3, 2), (4, 6))[k % 4]
    pixels = noise(rng, channels, np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return png(pixels.shape[1], pixels.shape[0], 16, colour_type, rows), "png"


def palette(k: int, rng) -> Made:
    image = Image.fromarray(noise(rng)).quantize(2 + k % 200)
    options = ({}, {"transparency": 0}, {"transparency": bytes([9, 99])})[k % 3]
    return encoded(image, "GIF" if k % 3 < 2 and k % 2 else "PNG", **options), "png"


def animated(k: int, rng) -> Made:
    first = noise(rng)
    frames = [Image.fromarray(np.roll(first, n, 1)) for n in range(1 + k % 3, 4)]
    form = ("GIF", "WEBP", "PNG", "TIFF")[k % 4]
    return encoded(Image.fromarray(first), form, save_all=True, append_images=frames), form.lower()


def rotated(k: int, rng) -> Made:
    exif = Image.Exif()
    exif[0x0112] = k % 10  # 0 and 9 are undefined
    form = ("JPEG", "PNG", "WEBP", "TIFF")[k % 4]
    return encoded(Image.fromarray(noise(rng)), form, exif=exif), form.lower()


def alpha(k: int, rng) -> Made:
    pixels = noise(rng, 4 if k % 2 else 2)
    return encoded(Image.fromarray(pixels), ("PNG", "WEBP", "TIFF")[k % 3]), "png"


def misnamed(k: int, rng) -> Made:
    return encoded(Image.fromarray(noise(rng)), FORMS[k % 6]), FORMS[(k + 1) % 6].lower()


def few_colours(k: int, rng) -> Made:
    image = Image.fromarray(noise(rng, 1)[..., 0])
    return encoded(image.convert("1") if k % 2 else image, ("PNG", "TIFF", "BMP")[k % 3]), "png"


READABLE = (cmyk, sixteen_bits, palette, animated, rotated, alpha, misnamed, few_colours)
DAMAGED = (truncated, empty, text, no_size, bomb)
EITHER = (flipped,)


def write_odd_images(folder: Path, many: int = 1000) -> tuple[set[str], set[str], set[str], set[str]]:
    """Write `many` good images and as many of 14 other kinds to a folder, mixed, with metadata.jsonl.

    Returns the names of the good images, the odd ones to be read, the damaged ones, and those that may be either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups: tuple[set[str], ...] = (set(), set(), set(), set())
    odd = [(kind, group) for group, kinds in enumerate((READABLE, DAMAGED, EITHER), 1) for kind in kinds]
    plan: list[tuple[Callable[..., Made], int]] = [(good, 0)] * many
    plan += [odd[k % len(odd)] for k in range(many)]
    rows = []
    for number, at in enumerate(np.random.default_rng(0).permutation(len(plan)).tolist()):
        kind, group = plan[at]
        k = at if kind is good else (at - many) // len(odd)
        data, extension = kind(k, np.random.default_rng((1, at)))
        name = f"{number:04d}-{kind.__name__}.{extension}"
        (folder / name).write_bytes(data)
        groups[group].add(name)
        rows.append(json.dumps({"file_name": name, "text": f"an image, {kind.__name__}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return groups
