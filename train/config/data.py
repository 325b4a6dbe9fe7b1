"""The configuration of the images and captions."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from ldm.formats import MAX_PIXELS
from train.config.optimizer import strict
from train.data.images import Crop
from train.data.sources.catalogue import Columns

if TYPE_CHECKING:
    from train.data.images.crop import Framing

Byte = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True, kw_only=True, config=strict)
class SourceConfig:
    """Settings that locate and decode the images and captions of `--data`."""

    image_column: str = ""
    """Column of the image (in tars: its extension); empty: file_name in metadata, the column of images in tables."""
    caption_column: str = ""
    """Column of the caption (in tars: its extension, or a key of the .json); empty: `text`, else `caption`."""
    caption_template: str = ""
    """Template of captions for class labels (folder names or the caption column), e.g. "a photo of a {}"."""
    train_split: str = "train"
    """Name of the training split."""
    validation_split: str = ""
    """Name of the validation split; empty: validation, val, dev or test, else a share of the training images."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the images held out for validation if the dataset has no validation split; at most 1000 images."""
    stream_buffer: int = Field(default=1000, gt=0)
    """Size of a stream's shuffle buffer, in images; a larger buffer shuffles better and needs more memory."""
    max_pixels: int = Field(default=MAX_PIXELS, gt=0)
    """Largest number of pixels that is decoded; larger images count as damaged."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Background colour (red, green, blue) behind transparent images."""

    @model_validator(mode="after")
    def _has_room_for_a_label(self) -> Self:
        if self.caption_template and "{}" not in self.caption_template:
            raise ValueError(f"caption_template {self.caption_template!r} has no {{}} for the label")
        return self

    def columns(self, captioned: bool) -> Columns:
        """Return the columns of the images and captions."""
        return Columns(
            image=self.image_column, caption=self.caption_column, template=self.caption_template, captioned=captioned
        )

    def plain(self, resolution: int) -> "Framing":
        """Return the deterministic framing of a file: a square centre crop, without flips."""
        from train.data.images.crop import Framing

        return Framing(resolution=resolution, background=self.background, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True, config=strict)
class DataConfig(SourceConfig):
    """Settings that prepare the images and captions of `--data` for training."""

    resolution: int = Field(default=32, ge=8)
    """Side of the square training images, in pixels: the shorter side is resized to it, then the image is cropped."""
    crop: Crop = "center"
    """Part of an image that is kept if the image isn't square."""
    crops: int = Field(default=0, ge=0)
    """Random crops of each image kept in stage 2's cache; at least 1 for crop `random`, unless --cache is off."""
    flip: bool = False
    """Mirror half of the images. Unsuitable if captions mention left and right, or if images contain text."""
    buckets: int = Field(default=0, ge=0)
    """Train on rectangles of about resolution² pixels whose sides are multiples of this, e.g. 64; all images of a batch
    have the same shape. 0: squares. Stage 2 only."""
    bucket_ratio: float = Field(default=2.0, ge=1)
    """Largest aspect ratio of a rectangle (longer side / shorter side)."""
    min_size: int = Field(default=0, ge=0)
    """Smallest accepted shorter side, in pixels; smaller images are left out."""
    max_damaged: float = Field(default=0.1, ge=0, le=1)
    """Largest share of images that may be unreadable; training stops above it."""

    @model_validator(mode="after")
    def _crops_differ(self) -> Self:
        if self.crops and self.crop != "random":
            raise ValueError(f"crops {self.crops} with crop {self.crop}: only random crops differ from one another")
        return self

    def framing(self) -> "Framing":
        """Return the framing that turns a file into a training image."""
        return replace(self.plain(self.resolution), crop=self.crop, flip=self.flip)
