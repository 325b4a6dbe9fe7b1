"""Images whose data end early inside a file that looks whole: Pillow fills in black or grey, we refuse them."""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from support.images import smooth_images
from support.odd_images import FORMS, chunk, encoded, png
from train.data.images.decode import DamagedImage, load_image

IMAGE = smooth_images(1, (72, 96))[0]
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 72, 3), dtype=np.uint8))
JPEGS = {
    "sequential": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "subsampling": 0},
    "with restarts": {"restart_marker_rows": 1},
}


def grey_png(rows: int) -> bytes:
    """Return a PNG of 72 × 96 grey pixels that has only its first rows."""
    return png(72, 96, 8, 0, (b"\0" + bytes([90] * 72)) * rows)


def interlaced_png(missing: int) -> bytes:
    """Return an interlaced PNG of 3 × 3 black pixels without its last bytes. Each pass is some rows with a filter."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 3, 8, 0, 0, 0, 1))
    data = chunk(b"IDAT", zlib.compress(bytes(2 + 2 + 3 + 2 * 2 + 4 - missing)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


def jpeg_cut(share: float, image: Image.Image = NOISE, **options: object) -> bytes:
    """Return a JPEG that ends after a share of its pixels' data, with an end marker."""
    whole = encoded(image, "JPEG", **options)
    start = whole.rindex(b"\xff\xda") + 10
    return whole[: start + int((len(whole) - start) * share)] + b"\xff\xd9"


def changed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


JPEG = encoded(NOISE, "JPEG")
PNG, LARGE = encoded(NOISE, "PNG"), encoded(NOISE.resize((300, 300)), "PNG")
BROKEN = {
    "PNG of half of the rows": grey_png(48),
    "PNG without its last row": grey_png(95),
    "PNG, interlaced": interlaced_png(4),
    "PNG without an end": PNG[:-12],
    "PNG with a wrong checksum": changed(PNG, len(PNG) - 14),
    "PNG with a wrong checksum in the middle": changed(LARGE, LARGE.rindex(b"IDAT") - 5),
    "MPO": encoded(NOISE, "MPO", save_all=True, append_images=[NOISE]).replace(JPEG[-400:], b"\xff\xd9"),
    "CMYK": jpeg_cut(0.5, NOISE.convert("CMYK")),
    "grey": jpeg_cut(0.5, NOISE.convert("L")),
    **{f"JPEG, {kind}, {share}": jpeg_cut(share, **how) for kind, how in JPEGS.items() for share in (0.3, 0.9)},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_an_image_with_missing_data_is_damaged(kind: str) -> None:
    with Image.open(io.BytesIO(BROKEN[kind])) as image:
        image.load()  # Pillow finds nothing wrong
    with pytest.raises(DamagedImage, match=r"ends? early|wrong checksum of the image data"):
        load_image(BROKEN[kind])


def whole_images() -> Iterator[tuple[str, bytes]]:
    for image, name in ((IMAGE, "smooth"), (NOISE, "noise"), (Image.new("RGB", (31, 17)), "black")):
        for form in FORMS:
            yield f"{name} {form}", encoded(image, form)
        for mode in ("1", "L", "P", "LA", "RGBA", "I;16"):
            converted = Image.new(mode, (9, 5)) if mode == "I;16" else image.convert(mode)
            yield f"{name} {mode} PNG", encoded(converted, "PNG")
        for kind, options in JPEGS.items():
            for quality in (5, 75, 100):
                yield f"{name} {kind} {quality}", encoded(image, "JPEG", quality=quality, **options)
        yield f"{name} CMYK", encoded(image.convert("CMYK"), "JPEG", progressive=True)
        yield f"{name} MPO", encoded(image, "MPO", save_all=True, append_images=[image])
        yield f"{name} JPEG with more after its end", encoded(image, "JPEG") + bytes(1000) + encoded(image, "JPEG")
        yield f"{name} JPEG with bytes before its end", encoded(image, "JPEG")[:-2] + bytes(99) + b"\xff\xff\xd9"
        yield f"{name} GIF without a trailer", encoded(image, "GIF")[:-1]
    for side in range(1, 18):
        for kind, options in JPEGS.items():
            yield f"{side} {kind}", encoded(NOISE.resize((side, 18 - side)), "JPEG", **options)
    yield "black, interlaced", interlaced_png(0)
    yield "more rows than its size", png(4, 2, 8, 0, bytes(5 * 99))


def test_complete_images_are_read_as_pillow_reads_them() -> None:
    for name, content in whole_images():
        with Image.open(io.BytesIO(content)) as image:
            expected = image.size
            pixels = image.copy() if image.mode in ("RGB", "L") else None
        found = load_image(content)
        assert found.size == expected, name
        if pixels is not None:
            assert np.array_equal(found, pixels.convert("RGB")), name
