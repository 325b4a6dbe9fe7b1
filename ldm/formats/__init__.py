"""The files of models and pictures."""

MAX_PIXELS = 89_478_485
"""Pixels of a picture, at most: Pillow's own figure, a quarter of a GiB of RGB."""
