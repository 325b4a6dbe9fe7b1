"""Decoding that refuses images whose data end early, which Pillow fills with black or grey without an error.

A PNG's rows are missing if its zlib stream ends early. A JPEG that was cut gets a new end marker from some tools.
Pillow's readers of the other formats find missing data themselves, except in TIFF's JPEG and fax compressions.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, ImageFile

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First pixel and step of each pass of an interlaced PNG, across and down: x, y, dx, dy.
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # x, y, steps
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # of a JPEG, but not a restart
_FRAMES = (b"\xff\xc0", b"\xff\xc1", b"\xff\xc2")  # markers of the Huffman-coded kinds that Pillow decodes
_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_NO_LENGTH = (b"\xff\x01", b"\xff\xd8")
# The decoder reads up to 8 bytes ahead. A code of ones only is not allowed, so these bytes replace about 4 blocks.
_READ_AHEAD = b"\xff\x00" * 16


def load_complete(image: Image.Image, content: bytes) -> None:
    """Decode an opened image. Raises ValueError or OSError if its data end early. content: its file."""
    if image.format in ("JPEG", "MPO") and isinstance(image, ImageFile.ImageFile):
        _load_jpeg(image, content)
    image.load()
    if image.format == "PNG":
        _check_png(image, content)


def _check_png(image: Image.Image, content: bytes) -> None:
    """Raise ValueError for a wrong checksum of the pixels' chunks, for missing rows, or without the last chunk.

    Missing rows are black. So the data are decompressed again only if the last row is black, or interlaced.
    """
    pixels, names = [], set()
    for name, data, checksum in _png_chunks(memoryview(content)):
        names.add(name)
        if name == b"IDAT":
            if zlib.crc32(data, zlib.crc32(name)) != checksum:
                raise ValueError("wrong checksum of the image data")
            pixels.append(data)
    if b"IEND" not in names:
        raise ValueError("the file ends early")
    width, height, depth, colours, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    if not interlaced and image.crop((0, height - 1, width, height)).tobytes().strip(b"\0"):
        return
    bits = depth * _PNG_CHANNELS[colours]
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sides = [(len(range(x, width, dx)), len(range(y, height, dy))) for x, y, dx, dy in passes]
    missing = sum(h * (1 + -(-w * bits // 8)) for w, h in sides if w)
    stream = zlib.decompressobj()
    for data in pixels:
        rest: bytes | memoryview = data
        while rest and missing > 0:
            missing -= len(stream.decompress(rest, 2**20))
            rest = stream.unconsumed_tail
    if missing > 0:
        raise ValueError("the image data end early")


def _png_chunks(content: memoryview) -> Iterator[tuple[bytes, memoryview, int]]:
    """Yield name, data and checksum of a PNG's chunks up to the last one, as far as they are there."""
    at, name = 8, b""
    while at + 12 <= len(content) and name != b"IEND":
        length, name = struct.unpack_from(">I4s", content, at)
        data = content[at + 8 : at + 8 + length]
        if at + 12 + length > len(content):
            return
        yield name, data, struct.unpack_from(">I", content, at + 8 + length)[0]
        at += 12 + length


def _load_jpeg(image: ImageFile.ImageFile, content: bytes) -> None:
    """Decode a JPEG's pixels, unless it is of a kind that can't be checked. Raises ValueError if data are missing.

    libjpeg fills in grey for data that are missing before the end marker, and only warns, which Pillow ignores. Without
    the marker it waits for more data instead. So the decoder gets the marker last. An image of one scan must be
    complete before it. After the last of several scans the decoder must be searching for the next marker, and skip
    other bytes.
    """
    end, scans = _jpeg_end(content)
    if end < 0 or len(image.tile) != 1:
        return
    name, extents, _, args = image.tile[0]
    image.load_prepare()
    decoder = Image._getdecoder(image.mode, name, args, image.decoderconfig)
    try:
        decoder.setimage(image.im, extents)
        rest = b""
        for part in (content[:end], _READ_AHEAD, *[b"\0"] * 16):
            rest += part
            used, _ = decoder.decode(rest)
            if used < 0:
                break
            rest = rest[used:]
            if rest and part == b"\0":
                raise ValueError("the image data end early")
        else:
            if scans == 1 or decoder.decode(_END)[0] >= 0:
                raise ValueError("the image data end early")
    finally:
        decoder.cleanup()
    image.tile = []


def _jpeg_end(content: bytes) -> tuple[int, int]:
    """Return the position of a JPEG's end marker and its number of scans.

    The position is -1 if there is no end marker, or for a kind that can't be decoded without it.
    """
    at, supported, scans = 2, False, 0
    while found := _MARKER.search(content, at):
        at, marker = found.end(), found[0]
        if marker == _END:
            return (found.start() if supported else -1), scans
        if marker not in _NO_LENGTH:
            supported |= marker in _FRAMES
            scans += marker == _SCAN
            at += int.from_bytes(content[at : at + 2])
    return -1, scans
