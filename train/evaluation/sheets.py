"""Sheets of images for visual inspection."""

import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from autoencoder.model import Autoencoder
from train.data.store.atomic import atomic_file
from train.evaluation.features import eight_bits
from train.evaluation.fonts import Fonts

_TILE = 128  # side in pixels to which small images are enlarged, approximately and without interpolation
_LINE = 13  # height of a line of a caption
_FONTS = Fonts()


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Convert images (b, 3, h, w) in [−1, 1] to (b, h, w, 3) uint8, clipped and rounded."""
    return eight_bits(pixels).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sheet(rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str] = (), fonts: Fonts = _FONTS) -> Image.Image:
    """Draw rows of uint8 images (h, w, 3) of one size, with optional captions below them, in row order.

    fonts: where fonts for characters outside ASCII are found.
    """
    h, w = rows[0][0].shape[:2]
    scale = max(1, _TILE // max(h, w))
    wrapped = [wrap(c, max(8, w * scale // (6 if c.isascii() else 7)))[:4] for c in captions]
    fonts.search(line for lines in wrapped for line in lines)
    caption_h = 14 * max(map(len, wrapped), default=0) + (4 if wrapped else 0)
    gap = 4
    cell_w, cell_h = w * scale + gap, h * scale + caption_h + gap
    canvas = Image.new("RGB", (cell_w * max(map(len, rows)) + gap, cell_h * len(rows) + gap), (245, 245, 245))
    number = 0
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            x, y = gap + c * cell_w, gap + r * cell_h
            canvas.paste(Image.fromarray(image).resize((w * scale, h * scale), Image.Resampling.NEAREST), (x, y))
            for k, line in enumerate(wrapped[number] if number < len(wrapped) else ()):
                fonts.draw(canvas, (x, y + h * scale + _LINE * (k + 1)), line, (40, 40, 40))
            number += 1
    return canvas


def wrap(text: str, width: int) -> list[str]:
    """Split a caption into lines of at most `width` columns; East Asian characters and emoji have two columns."""
    filler = "\U0010ffff"  # a second column
    text = unicodedata.normalize("NFC", text.encode(errors="replace").decode())
    wide = "".join(c + filler if unicodedata.east_asian_width(c) in "WF" else c for c in text)
    return [line.replace(filler, "") for line in textwrap.wrap(wide, width)]


def save_sheet(image: Image.Image, path: Path) -> None:
    """Write a PNG, completely or not at all. Raises RunError for a full disk."""
    with atomic_file(path) as file:
        image.save(file, "PNG")


def reconstruction_sheet(autoencoder: Autoencoder, pixels: Tensor) -> Image.Image:
    """Draw rows of images (b, 3, h, w), reconstructions, four times the difference, and each latent channel in grey."""
    z = autoencoder.encode(pixels).mean  # (b, c, h / f, w / f)
    decoded = autoencoder.decode(z).to(pixels.device)
    std, mean = torch.std_mean(z.to(pixels), dim=(0, 2, 3), correction=0, keepdim=True)
    grey = ((z.to(pixels) - mean) / (2 * std + 1e-8)).repeat_interleave(autoencoder.factor, 2)
    channels = grey.repeat_interleave(autoencoder.factor, 3).unbind(1)
    rows = [pixels, decoded, (decoded - pixels) * 4, *(c[:, None].expand(-1, 3, -1, -1) for c in channels)]
    return sheet([list(to_uint8(x)) for x in rows])


def in_rows(images: Sequence[np.ndarray], columns: int) -> list[list[np.ndarray]]:
    """Arrange images in rows of `columns`."""
    return [list(images[i : i + columns]) for i in range(0, len(images), columns)]
