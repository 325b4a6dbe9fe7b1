"""From a file to the picture that training sees."""

from typing import Literal

Crop = Literal["center", "random"]
"""train/data/images/decode.py"""
