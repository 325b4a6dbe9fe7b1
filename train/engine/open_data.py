"""The images of a run: which there are, which of them are used, and as what they are trained on."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from train.config.data import SourceConfig
from train.data.batches.buckets import Buckets, bucket_sizes, measure
from train.data.batches.images import Inputs
from train.data.sources.splits import Source, find_splits, take
from train.data.sources.streams import Stream, is_stream
from train.engine.run import AnyRun

LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_CAPTIONS_SEARCHED = 10_000  # images whose captions are looked through for words


def open_inputs(data: str, config: SourceConfig, *, captioned: bool = True) -> Inputs:
    """What --data names; captioned False accepts images without captions. Raises UserError as `find_splits` does."""
    columns = config.columns(captioned)
    if is_stream(data):
        stream = Stream(data, columns, held_out=config.validation_fraction, buffer=config.stream_buffer)
        return Inputs(Source(stream.training), Source(stream.held_out, "test"), stream)
    splits = find_splits(data, columns, (config.train_split, config.validation_split))
    how: dict[str, Any] = {
        "name": config.validation_split,
        "train": config.train_split,
        "fraction": config.validation_fraction,
    }
    return Inputs(take(splits, "train", **how), take(splits, "test", **how))


def select_images(inputs: Inputs, run: AnyRun, multiple: int = 1) -> Inputs:
    """What is used of them, told to the person who watches: images that are large enough, in buckets where these are wanted.

    multiple: what the networks need the sides of images to be a multiple of.
    """
    config = run.config.input
    if config.flip and (found := next(filter(LEFT_OR_RIGHT.search, inputs.source.captions(_CAPTIONS_SEARCHED)), None)):
        run.print(f"input.flip mirrors half of the images, but captions speak of left and right, e.g. {found[:100]!r}")
    if without := inputs.source.catalogue.uncaptioned:
        run.print(f"{without:,} of {len(inputs.source.catalogue):,} images have no caption")
    if config.min_size and inputs.stream is not None:
        raise UserError(f"input.min_size {config.min_size}: the sizes of a stream's images aren't known; leave it out")
    if config.buckets % multiple:
        raise UserError(f"input.buckets {config.buckets} isn't a multiple of {multiple}, which these networks need")
    if not (config.min_size or config.buckets):
        return inputs
    sizes = bucket_sizes(config.resolution, config.buckets, config.bucket_ratio) if config.buckets else []
    source, shapes = select_by_size(inputs.source, run)
    held_out = select_by_size(inputs.held_out, run)[0] if config.min_size else inputs.held_out
    if not sizes:
        return replace(inputs, source=source, held_out=held_out)
    buckets = Buckets.assigned(shapes, sizes, run.config.batch_size, run.config.seed)
    run.print(str(buckets))
    return replace(inputs, source=source, held_out=held_out, buckets=buckets)


def select_by_size(source: Source, run: AnyRun) -> tuple[Source, NDArray[np.int64]]:
    """The images of a source that can be read and that input.min_size lets in, and their width and height, (n, 2)."""
    config = run.config.input
    shapes, unreadable = measure(source, run.cache, config.max_pixels, run.config.workers, run.processes)
    run.damage.of(source.left_out).note(len(source) - len(unreadable), unreadable, whole=True)
    stays = shapes.min(1) >= max(1, config.min_size)
    if not stays.any():
        raise UserError(
            f"input.min_size {config.min_size}: none of the {len(source):,} images ({source.split}) is as large"
            if config.min_size
            else f"not one image of {source.place} can be read, e.g. {': '.join(unreadable[0])}"
        )
    if config.min_size:
        small = len(source) - int(stays.sum()) - len(unreadable)
        run.print(
            f"{small:,} of {len(source):,} images ({source.split}) have fewer than {config.min_size} pixels a side: left out"
        )
    return source if stays.all() else source.only_where(stays, unreadable), shapes[stays]
