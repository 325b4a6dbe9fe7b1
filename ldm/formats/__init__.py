"""File formats of models and images."""

MAX_PIXELS = 89_478_485
"""Maximum number of pixels of an image. It is Pillow's default limit: 256 MiB as RGB."""
