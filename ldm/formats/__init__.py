"""File formats of models and pictures."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels of a picture: Pillow's own limit, a quarter of a GiB of RGB."""
