"""The pictures of a run: which there are, which of them are used, and as what they are trained on."""

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Any

from ldm.errors import UserError
from train.config.data import DataConfig, SourceConfig
from train.data.batches.buckets import Buckets, assign, bucket_sizes, measure
from train.data.batches.draws import Draws
from train.data.batches.pictures import PictureDataset, StreamDataset
from train.data.batches.records import Drawn
from train.data.sources.splits import Source, find_splits, take
from train.data.sources.streams import Stream, is_stream
from train.engine.run import AnyRun

SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_READ = 10_000  # pictures whose captions are looked through for words


@dataclass(frozen=True)
class Inputs:
    """Training and held-out pictures. Of a stream, `source` are the first pictures of it, for what needs some at hand."""

    source: Source
    held_out: Source
    stream: Stream | None = None
    buckets: Buckets | None = None
    """Of the training pictures, where they aren't squares."""

    @property
    def fingerprint(self) -> str:
        parts = (self.source.fingerprint if self.stream is None else self.stream.fingerprint, self.held_out.fingerprint)
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def prepared(self, run: AnyRun, multiple: int = 1) -> "Inputs":
        """What is used of it, told to the person who watches: pictures that are large enough, in buckets where these are wanted.

        multiple: what the networks need the sides of pictures to be a multiple of.
        """
        config = run.config.input
        if config.flip and (found := next(filter(SIDES.search, self.source.captions(_READ)), None)):
            run.say(
                f"input.flip mirrors half of the pictures, but captions speak of left and right, e.g. {found[:100]!r}"
            )
        if without := self.source.catalogue.uncaptioned:
            run.say(f"{without:,} of {len(self.source.catalogue):,} pictures have no caption")
        used = self
        if config.min_size:
            if self.stream is not None:
                raise UserError(
                    f"input.min_size {config.min_size}: the sizes of a stream's pictures aren't known; leave it out"
                )
            used = replace(self, source=large_enough(self.source, run), held_out=large_enough(self.held_out, run))
        if not config.buckets:
            return used
        source, buckets = build_buckets(used.source, run, multiple)
        return replace(used, source=source, buckets=buckets)

    def pictures(
        self, config: DataConfig, seed: int, draws: Draws[Drawn] | None = None
    ) -> PictureDataset[Drawn] | StreamDataset[Drawn]:
        """What is trained on."""
        if self.stream is None:
            return PictureDataset(self.source, config.framing(), seed, buckets=self.buckets, draws=draws)
        return StreamDataset(self.stream, config.framing(), seed, draws=draws)


def open_inputs(data: str, config: SourceConfig, *, captioned: bool = True) -> Inputs:
    """What --data names; captioned False accepts pictures without captions. Raises UserError as `find_splits` does."""
    columns = config.columns(captioned)
    if is_stream(data):
        stream = Stream(data, columns, held_out=config.validation_fraction, buffer=config.stream_buffer)
        return Inputs(Source(stream.training), Source(stream.held_out, "test"), stream)
    splits = find_splits(data, columns, (config.train_split, config.validation_split))
    how: dict[str, Any] = {
        "name": config.validation_split, "train": config.train_split, "fraction": config.validation_fraction
    }  # fmt: skip
    return Inputs(take(splits, "train", **how), take(splits, "test", **how))


def large_enough(source: Source, run: AnyRun) -> Source:
    """The pictures of a source that input.min_size lets in."""
    config = run.config.input
    shapes, unreadable = measure(source, run.cache, config.max_pixels, run.config.workers, run.processes)
    run.damage.of(source.left_out).note(len(source) - len(unreadable), unreadable, whole=True)
    stays = shapes.min(1) >= config.min_size
    if not stays.any():
        raise UserError(
            f"input.min_size {config.min_size}: none of the {len(source):,} pictures ({source.split}) is as large"
        )
    small = len(source) - int(stays.sum()) - len(unreadable)
    run.say(
        f"{small:,} of {len(source):,} pictures ({source.split}) have fewer than {config.min_size} pixels a side: left out"
    )
    return source.only_where(stays, unreadable)


def build_buckets(source: Source, run: AnyRun, multiple: int) -> tuple[Source, Buckets]:
    """The buckets of a source's readable pictures. multiple: what the networks need the sides to be a multiple of."""
    config = run.config.input
    if config.buckets % multiple:
        raise UserError(f"input.buckets {config.buckets} isn't a multiple of {multiple}, which these networks need")
    sizes = bucket_sizes(config.resolution, config.buckets, config.bucket_ratio)
    shapes, unreadable = measure(source, run.cache, config.max_pixels, run.config.workers, run.processes)
    run.damage.of(source.left_out).note(len(source) - len(unreadable), unreadable, whole=True)
    readable = shapes.min(1) > 0
    if not readable.any():
        raise UserError(f"not one picture of {source.place} can be read, e.g. {': '.join(unreadable[0])}")
    if unreadable:
        source, shapes = source.only_where(readable, unreadable), shapes[readable]
    of = assign(shapes, sizes, least=run.config.batch_size)
    buckets = Buckets(sizes, of, run.config.batch_size, run.config.seed)
    joined = len(set(assign(shapes, sizes).tolist())) - len(set(of.tolist()))
    few = f"; {joined} shapes with less than a batch of pictures joined others" if joined else ""
    run.say(f"{buckets}{few}")
    return source, buckets
