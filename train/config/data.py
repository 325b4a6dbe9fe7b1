"""The configuration of the pictures and captions."""

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
    """Where the pictures and captions of `--data` are found, and what is read as a picture."""

    image_column: str = ""
    """Column of the picture (in tars: its extension); empty: file_name in metadata, the column of pictures in tables."""
    caption_column: str = ""
    """Column of the caption (in tars: extension, or key of the .json); empty: `text`, else `caption`."""
    caption_template: str = ""
    """Makes captions of class labels, e.g. "a photo of a {}": of folders' names, or of the caption column."""
    train_split: str = "train"
    """The split to train on."""
    validation_split: str = ""
    """The split for validation; empty: validation, val, dev or test, else a share of the training pictures."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of the pictures held out for validation where the source has no split of its own, 1000 at most."""
    stream_buffer: int = Field(default=1000, gt=0)
    """Pictures of a stream that wait in memory, of which one is drawn at a time: more are shuffled better."""
    max_pixels: int = Field(default=MAX_PIXELS, gt=0)
    """Larger pictures count as damaged and aren't decoded."""
    background: tuple[Byte, Byte, Byte] = (255, 255, 255)
    """Red, green and blue of what transparent pictures are laid on."""

    @model_validator(mode="after")
    def _has_room_for_a_label(self) -> Self:
        if self.caption_template and "{}" not in self.caption_template:
            raise ValueError(f"caption_template {self.caption_template!r} has no {{}} for the label")
        return self

    def columns(self, captioned: bool) -> Columns:
        """Where captions and pictures are."""
        return Columns(
            image=self.image_column, caption=self.caption_column, template=self.caption_template, captioned=captioned
        )

    def plain(self, resolution: int) -> "Framing":
        """How a file becomes a square picture, nothing left to chance."""
        from train.data.images.crop import Framing

        return Framing(resolution=resolution, background=self.background, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True, config=strict)
class DataConfig(SourceConfig):
    """How the pictures and captions of `--data` are read."""

    resolution: int = Field(default=32, ge=8)
    """Side of the square training pictures, in pixels: the shorter side is resized to it, then cropped."""
    crop: Crop = "center"
    """Which part of a picture that has another shape."""
    crops: int = Field(default=0, ge=0)
    """Random crops of each picture that stage 2's cache keeps; with crop `random` and without --cache off, at least 1."""
    flip: bool = False
    """Mirror half of the pictures. Wrong for captions that speak of left and right, and for writing."""
    buckets: int = Field(default=0, ge=0)
    """Train on rectangles of about resolution² pixels whose sides are multiples of this, e.g. 64, each batch of one shape;
    0: squares. Stage 2 alone."""
    bucket_ratio: float = Field(default=2.0, ge=1)
    """Longest rectangle, as its longer side over its shorter one."""
    min_size: int = Field(default=0, ge=0)
    """Leave out pictures whose shorter side has fewer pixels."""
    max_damaged: float = Field(default=0.1, ge=0, le=1)
    """Stop when more than this share of the pictures can't be read."""

    @model_validator(mode="after")
    def _crops_differ(self) -> Self:
        if self.crops and self.crop != "random":
            raise ValueError(f"crops {self.crops} with crop {self.crop}: only random crops differ from one another")
        return self

    def framing(self) -> "Framing":
        """How a file becomes a training picture."""
        return replace(self.plain(self.resolution), crop=self.crop, flip=self.flip)
