"""Conversion of a file to the image used in training."""

from typing import Literal

Crop = Literal["center", "random"]
"""Position of a crop in an image; see `to_tensor` in train/data/images/decode.py."""
