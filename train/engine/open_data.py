"""The images of a run: open the dataset, leave out images that are too small, and assign the others to buckets."""

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError, one_line
from ldm.files import read_regular
from train.config.data import SourceConfig
from train.data.batches.buckets import Buckets, bucket_sizes, measure, no_rectangles
from train.data.batches.images import Inputs
from train.data.sources.caption_columns import caption_columns
from train.data.sources.splits import Source, find_splits, take
from train.data.sources.streams import Stream, is_stream
from train.data.sources.variants import TagVariants

if TYPE_CHECKING:
    from train.engine.run import AnyRun

Copies = Literal["held_out", "one_side", "all"]
LEFT_OR_RIGHT = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_IN_FOLDER = re.compile(r"(?:.*/)?(\d{1,6})_[^/]*/")  # the innermost folder with a number, e.g. 10_cat/1.png
_CAPTIONS_SEARCHED = 10_000  # images whose captions are searched for "left" and "right"


def open_inputs(data: str, config: SourceConfig, *, captioned: bool = True) -> Inputs:
    """Open the training and held-out images of --data. Raises the errors of `find_splits`.

    captioned: whether images without captions are an error.
    """
    columns = config.columns(captioned)
    if is_stream(data):
        stream = Stream(data, columns, fraction=config.validation_fraction, buffer_size=config.stream_buffer)
        if caption_columns(columns.caption):
            raise UserError(
                f"--input.caption-column {columns.caption!r}: a stream's captions are in one column; download the data"
            )
        if config.duplicates:
            raise UserError(f"--input.duplicates {config.duplicates}: a stream's images can't be left out by name")
        if config.repeats:
            raise UserError(f"--input.repeats {config.repeats}: a stream's images can't be repeated; download the data")
        return Inputs(Source(stream.training), Source(stream.held_out, "test"), stream)
    splits = find_splits(data, columns, (config.train_split, config.validation_split))
    names: dict[str, Any] = {"name": config.validation_split, "train": config.train_split}
    share = config.validation_fraction
    source, held_out = (take(splits, split, **names, fraction=share) for split in ("train", "test"))
    notes: tuple[str, ...] = ()
    if config.duplicates:
        source, held_out, note = without_copies(source, held_out, config.duplicates, config.copies)
        notes = (note,)
    return Inputs(with_repeats(source, config.repeats) if config.repeats else source, held_out, notes=notes)


def without_copies(source: Source, held_out: Source, file: str, copies: Copies) -> tuple[Source, Source, str]:
    """Return the training and held-out images without copies on the other side, and a line on what was changed.

    file: duplicates.jsonl; its groups that share an image are one group. Held-out images of a group with training
    images are left out, or trained on too (one_side). all: of each group, only the first image is kept. Raises
    UserError for another file, or if it names no images of the dataset, or if no held-out image is left.
    """
    sides = {"train": source, "test": held_out}
    same = source.catalogue is held_out.catalogue  # else both may have an image of this name
    if copies == "one_side" and not same:
        raise UserError("--input.copies one_side: the dataset has its own splits; choose held_out or all")
    groups = _groups(file, same)
    named = set().union(*groups)
    where: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for side, images in sides.items():
        for k, row in enumerate(images):
            if (key := ("" if same else side, row.name)) in named:
                where.setdefault(key, []).append((side, k))
    if groups and not where:
        raise UserError(f"--input.duplicates {file}: names no image of {source.location}; inspect this dataset again")
    keep = {side: np.ones(len(images), bool) for side, images in sides.items()}
    reasons: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for group in groups:
        found = [(side, key[1], k) for key in group for side, k in where.get(key, ())]
        members = sorted(found, key=lambda member: (member[0] == "test", *member[1:]))
        trained = bool(members) and members[0][0] == "train"
        for side, name, k in members[1:]:
            if copies == "all" or (trained and side == "test"):
                keep[side][k] = False
                reasons[side].append((name, f"a copy of {members[0][1]} (--input.duplicates)"))
    if not keep["test"].any():
        raise UserError(f"--input.duplicates {file}: all held-out images are copies of training images")
    if copies == "one_side":
        moved = np.flatnonzero(~keep["test"]).tolist()
        note = f"--input.duplicates {file}: {len(moved):,} held-out images are trained on, as their copies are"
        return source.with_held_out(held_out, moved), held_out.only_where(keep["test"]), note
    kept = {s: images.only_where(keep[s], reasons[s]) if reasons[s] else images for s, images in sides.items()}
    note = (
        f"--input.duplicates {file}: left out {len(reasons['test']):,} held-out and {len(reasons['train']):,} training "
        "images, which are copies of others"
    )
    return kept["train"], kept["test"], note


def _groups(file: str, same: bool) -> list[set[tuple[str, str]]]:
    """Return the groups of a duplicates.jsonl as (side, name) pairs, side "train" or "test".

    same: whether both sides come from one folder without splits. Names are then unique and the side is "".
    """
    groups: dict[int, set[tuple[str, str]]] = {}
    owner: dict[tuple[str, str], int] = {}
    try:
        for number, line in enumerate(read_regular(file, 2**30).decode().splitlines()):
            entry = json.loads(line)
            group = {("" if same else side, str(name)) for side in ("train", "test") for name in entry[side]}
            for other in {owner[key] for key in group if key in owner}:
                group |= groups.pop(other)
            groups[number] = group
            owner.update(dict.fromkeys(group, number))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--input.duplicates {file}: can't be read ({one_line(error, 200)}); must be duplicates.jsonl, which "
            "inspect_data.py writes"
        ) from None
    return list(groups.values())


def with_repeats(source: Source, repeats: str) -> Source:
    """Return a source of training images with their numbers of repeats, without those that have 0.

    repeats: `folders`, or the column that the catalogue has read. Raises UserError if all numbers are 0, or if no
    folder gives one.
    """
    if repeats == "folders":
        found = (_IN_FOLDER.match(row.name) for row in source)
        counts = np.fromiter((int(match[1]) if match else 1 for match in found), np.int64, len(source))
        if (counts == 1).all():
            raise UserError(
                f"--input.repeats folders: no folder in {source.location} is named like 10_cat, with a number of "
                "repeats and _; rename the folders, or leave the option out"
            )
    else:
        counts = np.fromiter((row.repeats for row in source), np.int64, len(source))
    if not counts.any():
        raise UserError(f"--input.repeats {repeats}: all images have 0 repeats")
    return source.repeated(counts)


def reading_change(data: str, config: SourceConfig, reading: int, fingerprint: str) -> str:
    """Return how the reading of --data differs from an earlier version's, "" if its fingerprint wasn't this one."""
    try:
        before = open_inputs(data, replace(config, reading=reading), captioned=False)
        if before.fingerprint != fingerprint:
            return ""
        now = open_inputs(data, config, captioned=False)
    except UserError:
        return ""
    for what in ("source", "held_out"):
        old, new = getattr(before, what), getattr(now, what)
        if len(old) != len(new):
            return (
                f"{len(before.source):,} images for training and {len(before.held_out):,} held out, "
                f"now {len(now.source):,} and {len(now.held_out):,}"
            )
        for a, b in zip(old, new, strict=True):
            if a.name != b.name:
                return f"its images were called {a.name[-80:]!r}, …, now {b.name[-80:]!r}, …"
            if a.captions != b.captions:
                return f"{a.name[-80:]!r} had the caption {_quoted(a.captions)}, now {_quoted(b.captions)}"
    return "its files are now read by other rules"


def _quoted(captions: tuple[str, ...]) -> str:
    return " | ".join(repr(text[:60]) for text in captions[:3])


def select_images(inputs: Inputs, run: "AnyRun", multiple: int = 1) -> Inputs:
    """Leave out images below --input.min-size, and assign the others to buckets if --input.buckets is set.

    Prints what is left out, the buckets, and captions that don't suit the settings. multiple: number of which the
    networks need the sides of images to be a multiple. Raises UserError if no image is left or a setting can't be used.
    """
    config = run.config.input
    if config.tag_dropout or config.tag_shuffle:
        if inputs.stream is not None:
            raise UserError(
                "--input.tag-dropout, --input.tag-shuffle: a stream's captions can't be varied; download it"
            )
        variants = TagVariants(run.config.seed, config.tag_dropout, config.tag_shuffle, config.tag_variants)
        inputs = replace(inputs, source=inputs.source.varied(variants))
    if inputs.stream is None:
        run.damage.remove_repaired((inputs.source, inputs.held_out), config.max_pixels)
    for note in dict.fromkeys((*inputs.source.notes, *inputs.held_out.notes)):
        run.print(note)
    if left_out := set(inputs.source.left_out) | set(inputs.held_out.left_out):
        run.print(f"left out of the dataset: {len(left_out):,}, listed in {run.folder.damaged}")
    if config.flip and (found := next(filter(LEFT_OR_RIGHT.search, inputs.source.captions(_CAPTIONS_SEARCHED)), None)):
        run.print(
            f"--input.flip mirrors half of the images, but some captions contain left or right, e.g. {found[:100]!r}: "
            "these captions become wrong; leave --input.flip off"
        )
    if without := inputs.source.catalogue.uncaptioned:
        run.print(f"{without:,} of {len(inputs.source.catalogue):,} images have no caption")
    for note in inputs.notes:
        run.print(note)
    if (repeats := inputs.source.repeats) is not None:
        n, total = len(repeats), int(repeats.sum())
        run.print(
            f"--input.repeats {config.repeats}: an epoch has {total:,} examples of {n:,} images, which appear "
            f"{int(repeats.min()):,} to {int(repeats.max()):,} times"
            + ("; as all appear once, the option has no effect" if total == n else "")
        )
    if config.min_size and inputs.stream is not None:
        raise UserError(
            f"--input.min-size {config.min_size}: the sizes of a stream's images aren't known; leave this option out"
        )
    if config.buckets % multiple:
        raise UserError(f"--input.buckets {config.buckets}: must be a multiple of {multiple} for these networks")
    if not (config.min_size or config.buckets):
        return inputs
    sizes = bucket_sizes(config.resolution, config.buckets, config.bucket_ratio) if config.buckets else []
    source, shapes = select_by_size(inputs.source, run)
    held_out = select_by_size(inputs.held_out, run)[0] if config.min_size else inputs.held_out
    if not sizes:
        return replace(inputs, source=source, held_out=held_out)
    if warning := no_rectangles(config.resolution, config.buckets, config.bucket_ratio, multiple):
        run.print(warning)
    buckets = Buckets.assigned(shapes, sizes, run.config.batch_size, run.config.seed, source.repeats)
    run.print(str(buckets))
    return replace(inputs, source=source, held_out=held_out, buckets=buckets)


def select_by_size(source: Source, run: "AnyRun") -> tuple[Source, NDArray[np.int64]]:
    """Return a source's readable images of at least --input.min-size, and their width and height (n, 2).

    Prints how many are too small. Raises UserError if none is left.
    """
    config = run.config.input
    shapes, unreadable = measure(source, run.cache, config.max_pixels, run.config.workers, run.processes)
    run.damage.counter(source.left_out).count(len(source) - len(unreadable), unreadable, complete=True)
    kept = shapes.min(1) >= max(1, config.min_size)
    if not kept.any():
        raise UserError(
            f"--input.min-size {config.min_size}: none of the {len(source):,} images ({source.split}) is as large; "
            "give a smaller number"
            if config.min_size
            else f"none of the images in {source.location} can be read, e.g. {': '.join(unreadable[0])}"
        )
    if config.min_size:
        small = len(source) - int(kept.sum()) - len(unreadable)
        run.print(
            f"{small:,} of {len(source):,} images ({source.split}) are smaller than --input.min-size {config.min_size} "
            "and are left out"
        )
    return source if kept.all() else source.only_where(kept, unreadable), shapes[kept]
