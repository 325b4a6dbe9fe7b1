"""Conversion of a file to the picture used in training."""

from typing import Literal

Crop = Literal["center", "random"]
"""Position of a crop in a picture; see `to_tensor` in train/data/images/decode.py."""
