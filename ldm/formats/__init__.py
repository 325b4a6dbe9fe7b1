"""File formats of models and images."""

MAX_PIXELS = 89_478_485
"""Largest number of pixels of an image: Pillow's own limit, a quarter of a GiB of RGB."""
