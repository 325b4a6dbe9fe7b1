"""The configuration of the images and captions."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic.dataclasses import dataclass

from ldm.formats import MAX_PIXELS
from train.config.limits import LONGEST_SIDE, MOST_EXAMPLES, PathText
from train.config.optimizer import strict
from train.config.resumable import ON_REQUEST, Resumable
from train.data.images import Crop
from train.data.sources.caption_columns import caption_columns
from train.data.sources.catalogue import READING, Columns
from train.data.sources.text import check_encoding

if TYPE_CHECKING:
    from train.data.images.crop import Framing

Byte = Annotated[int, Field(ge=0, le=255)]


@dataclass(frozen=True, kw_only=True, config=strict)
class SourceConfig:
    """Settings that locate and decode the images and captions of `--data`."""

    # Settings of how captions are read may change when a run is continued: the dataset's fingerprint must stay equal.

    image_column: Annotated[str, ON_REQUEST] = ""
    """Column of the image (in tars: its file extension).
    Empty: `file_name` in metadata files, and the only column with images in parquet files and datasets."""
    caption_column: Annotated[str, ON_REQUEST] = ""
    """Column of the caption (in tars: its file extension, or a key of the .json); empty: `text`, else `caption`.
    Several columns have weights: with "long:3 short:1", an example's caption is `long` three times as often."""
    caption_template: Annotated[str, ON_REQUEST] = ""
    """Template that turns class labels into captions, e.g. "a photo of a {}"; empty: the captions are read as texts.
    Labels are folder names or the values of the caption column; {} is replaced by the label."""
    caption_from_names: Annotated[bool, Resumable()] = False
    """Use the names of the files as captions (in folders and tars); a_red_dog.png is "a red dog"."""
    caption_files: Annotated[Literal["lines", "whole"], Resumable()] = "lines"
    """Division of a caption file (.txt): each of its `lines` is a caption, or the `whole` file is one."""
    encoding: Annotated[str, Resumable()] = ""
    """Encoding of caption files that aren't UTF-8, e.g. cp932 or cp1251; empty: guessed from all of them."""
    follow_links: Annotated[bool, Resumable()] = False
    """Follow links and paths that lead out of the dataset's folder; the log states what they open."""
    reading: Annotated[int, Resumable()] = Field(default=READING, ge=1, le=READING)
    """Version of the rules by which datasets are read. 1 continues runs that were started before there was a choice.
    A run is refused if another version reads its dataset differently."""
    repeats: Annotated[str, ON_REQUEST] = ""
    """Column (in tars: key of the .json) with the number of times that each image appears in an epoch of training.
    Or `folders`: the number before the first _ in the name of the image's folder, e.g. 10_cat. Empty: once each."""
    duplicates: Annotated[PathText, Resumable(location=True, on_request=True)] = ""
    """File duplicates.jsonl of inspect_data.py, whose copies are left out (see `copies`); empty: copies are kept."""
    copies: Annotated[Literal["held_out", "one_side", "all"], ON_REQUEST] = "held_out"
    """What to do with copies: `held_out` leaves out held-out images that are also trained on, `one_side` trains on them
    too, and `all` also leaves out all except one image of each group."""
    train_split: Annotated[str, ON_REQUEST] = "train"
    """Name of the dataset's training split."""
    validation_split: Annotated[str, ON_REQUEST] = ""
    """Name of the dataset's validation split; empty: the first that exists of validation, val, dev and test.
    If none of them exists, a share of the training images is held out (validation_fraction)."""
    validation_fraction: Annotated[float, ON_REQUEST] = Field(default=0.05, gt=0, lt=1)
    """Share of the images, 0 to 1, held out if the dataset has no validation split; at most 1000 are held out."""
    stream_buffer: Annotated[int, ON_REQUEST] = Field(default=1000, gt=0, le=10**9)
    """Number of images in the shuffle buffer of a stream (a URL or `pipe:` as --data).
    A larger buffer shuffles better and needs more memory."""
    max_pixels: Annotated[int, ON_REQUEST] = Field(default=MAX_PIXELS, gt=0, le=10**10)
    """Largest accepted size of an image, in pixels (width × height); larger images count as damaged."""
    background: Annotated[tuple[Byte, Byte, Byte], ON_REQUEST] = (255, 255, 255)
    """Background colour behind transparent images: red, green and blue, 0 to 255 each."""

    @model_validator(mode="after")
    def _template_has_a_placeholder(self) -> Self:
        if self.caption_template and "{}" not in self.caption_template:
            raise ValueError(
                f"caption_template {self.caption_template!r}: must contain {{}}, which is replaced by the label"
            )
        return self

    @field_validator("caption_column")
    @classmethod
    def _weights_are_valid(cls, column: str) -> str:
        caption_columns(column)
        return column

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, encoding: str) -> str:
        if encoding:
            check_encoding(encoding)
        return encoding

    def columns(self, captioned: bool) -> Columns:
        """Return the names of the columns with the images and captions."""
        return Columns(
            image=self.image_column,
            caption=self.caption_column,
            template=self.caption_template,
            captioned=captioned,
            from_names=self.caption_from_names,
            whole_files=self.caption_files == "whole",
            encoding=self.encoding,
            follow_links=self.follow_links,
            reading=self.reading,
            numbered=self.repeats == "folders",
            repeats="" if self.repeats == "folders" else self.repeats,
        )

    def center_framing(self, resolution: int) -> "Framing":
        """Return the framing that crops the central square of an image and never mirrors it."""
        from train.data.images.crop import Framing

        return Framing(resolution=resolution, background=self.background, max_pixels=self.max_pixels)


@dataclass(frozen=True, kw_only=True, config=strict)
class DataConfig(SourceConfig):
    """Settings that prepare the images and captions of `--data` for training."""

    resolution: Annotated[int, ON_REQUEST] = Field(default=32, ge=8, le=LONGEST_SIDE)
    """Side of the square training images, in pixels; each image is cropped to a square and resized to it."""
    crop: Annotated[Crop, ON_REQUEST] = "center"
    """Position of the crop along an image's longer side: `center` (the middle), or `random`."""
    crops: Annotated[int, ON_REQUEST] = Field(default=0, ge=0, le=MOST_EXAMPLES)
    """Number of random crops of each image in stage 2's cache; crop `random` with a cache needs at least 1."""
    flip: Annotated[bool, ON_REQUEST] = False
    """Mirror half of the images, left to right.
    Unsuitable if captions mention left or right, or if images contain text."""
    buckets: Annotated[int, ON_REQUEST] = Field(default=0, ge=0, le=LONGEST_SIDE)
    """Train on rectangles whose sides are multiples of this number of pixels, e.g. 64 (stage 2 only); 0: on squares.
    A rectangle has about resolution² pixels, and all images of a batch have the same shape."""
    bucket_ratio: Annotated[float, ON_REQUEST] = Field(default=2.0, ge=1, le=100)
    """Largest aspect ratio of the rectangles of `buckets`, longer side / shorter side; at least 1."""
    min_size: Annotated[int, ON_REQUEST] = Field(default=0, ge=0, le=10**9)
    """Smallest accepted length of an image's shorter side, in pixels; smaller images are left out."""
    tag_dropout: Annotated[float, ON_REQUEST] = Field(default=0.0, ge=0, lt=1)
    """Probability with which each tag of a training caption (a text between commas) is left out; one always remains."""
    tag_shuffle: Annotated[bool, ON_REQUEST] = False
    """Put the tags of a training caption in random order."""
    tag_variants: Annotated[int, ON_REQUEST] = Field(default=8, ge=1, le=1000)
    """Number of variants of each caption with `tag_dropout` or `tag_shuffle`; the features of all are cached."""
    max_damaged: Annotated[float, Resumable()] = Field(default=0.1, ge=0, le=1)
    """Largest accepted share of unreadable images, 0 to 1; training stops if there are more.
    Each image is counted once, except in streams."""

    @model_validator(mode="after")
    def _crops_differ(self) -> Self:
        if self.crops and self.crop != "random":
            raise ValueError(
                f"crops {self.crops} with crop {self.crop}: only random crops can be cached several times; "
                "set crop to random or crops to 0"
            )
        return self

    def framing(self) -> "Framing":
        """Return the framing that turns a file into a training image."""
        return replace(self.center_framing(self.resolution), crop=self.crop, flip=self.flip)
