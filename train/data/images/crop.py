"""What part of a picture training sees, and how large."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from ldm.formats import MAX_PIXELS
from train.data.images import Crop
from train.data.images.decode import load_picture, to_tensor

Size = tuple[int, int]
"""Width and height, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Framing:
    """From a file to the picture that training sees."""

    resolution: int
    """Side of a square picture, or the root of a rectangle's area."""
    crop: Crop = "center"
    flip: bool = False
    background: tuple[int, int, int] = (255, 255, 255)
    """What transparent pictures are laid on."""
    max_pixels: int = MAX_PIXELS

    @property
    def square(self) -> Size:
        return self.resolution, self.resolution

    def load(self, file: bytes, name: str) -> Image.Image:
        """The whole picture, mode RGB. Raises DamagedPicture."""
        return load_picture(file, name=name, max_pixels=self.max_pixels, background=self.background)

    def cut(self, image: Image.Image, size: Size, place: Sequence[float], flip: bool) -> Tensor:
        """Its window of this shape, (3, height, width) in [−1, 1]. place: of a random one, in [0, 1) across and down."""
        return to_tensor(image, size, crop=self.crop, place=place, flip=flip)
