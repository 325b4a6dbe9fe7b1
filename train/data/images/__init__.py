"""Conversion of a file to the image used in training."""

from typing import Literal

MAX_BYTES = 2**30
"""Largest accepted file of an image, in bytes."""

Crop = Literal["center", "random"]
"""Position of a crop in an image; see `to_tensor` in train/data/images/decode.py."""
