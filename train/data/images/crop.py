"""Crop and size of a training image."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ldm.formats import MAX_PIXELS
from train.data.images import Crop
from train.data.images.decode import load_image, to_tensor

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """Conversion of a file to the image used in training."""

    resolution: int
    """Side of a square image, or the square root of a rectangle's area."""
    crop: Crop = "center"
    flip: bool = False
    """Whether images are mirrored at random."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Background behind transparent images."""
    max_pixels: int = MAX_PIXELS

    @property
    def square(self) -> Size:
        return self.resolution, self.resolution

    def load(self, file: bytes, name: str) -> Image.Image:
        """Load an image, uncropped, in mode RGB. Raises DamagedImage, or OSError if the machine failed."""
        return load_image(file, name=name, max_pixels=self.max_pixels, background=self.background)

    def apply(self, image: Image.Image, size: Size, place: Sequence[float], flip: bool) -> Tensor:
        """Crop and resize an image: (3, height, width) in [−1, 1].

        place: position of a random crop, across and down, two numbers in [0, 1). flip: mirror left and right.
        """
        return to_tensor(image, size, crop=self.crop, place=place, flip=flip)
