"""Resolution of `--data`: the dataset's format, its splits, and the images that are held out.

    data/metadata.jsonl (or .csv)      one row per image: file_name, text; further rows add captions to it
    data/cat.png, data/cat.txt         no metadata: each non-empty line of the .txt is a caption
    data/cat/1.png, data/dog/1.png     with a template for captions: one folder per class
    data/*.parquet, hub ids            a column of images, one of captions; also what datasets' save_to_disk writes
    data/{000..099}.tar                WebDataset: 0001.jpg, 0001.txt or 0001.json, …

Splits are subfolders (train, validation or val, test), prefixes of file names (train-00000.parquet), or the splits of a
hub dataset.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from train.data.sources.caption_columns import caption_columns, join_columns
from train.data.sources.catalogue import MOST_HELD_OUT, Catalogue, Columns, Opener, Row, Splits
from train.data.sources.folders import find_folder, has_images
from train.data.sources.metadata import find_metadata
from train.data.sources.tables import find_tables
from train.data.sources.tars import find_tars
from train.data.sources.variants import TagVariants

Split = Literal["train", "validation", "test"]

_FINDERS: tuple[Callable[[str, Columns, Sequence[str]], Splits | None], ...] = (find_tars, find_tables)
"""Functions that find the splits of a format, tried in this order. Each returns None for another format.

If all return None and `--data` is a folder, it is read as a folder of images."""
_NAMES = ("train", "validation", "valid", "val", "dev", "test")
_HELD_OUT: dict[str, tuple[str, ...]] = {
    "validation": ("validation", "valid", "val", "dev", "test"),
    "test": ("test", "validation", "valid", "val", "dev"),
}


class Source:
    """Images of one split, by index, in the catalogue's order.

    Only the rows in `without` or `only` take memory.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        split: Split = "train",
        *,
        without: NDArray[np.int64] | None = None,
        only: NDArray[np.int64] | None = None,
        left_out: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        """without: rows left out, ascending. only: rows kept, in this order. Give at most one of the two.

        left_out: (name, reason) of entries that aren't rows; by default the catalogue's.
        """
        self.catalogue, self.split, self.only = catalogue, split, only
        self.repeats: NDArray[np.int64] | None = None  # number of times of each image in an epoch of training, (n,)
        self.variants: TagVariants | None = None
        self.left_out = tuple(catalogue.left_out if left_out is None else left_out)
        self.without = np.empty(0, np.int64) if without is None else without
        self._gaps = self.without - np.arange(len(self.without))

    def __len__(self) -> int:
        return len(self.catalogue) - len(self.without) if self.only is None else len(self.only)

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        if self.only is not None:
            return int(self.only[index])
        return int(index + np.searchsorted(self._gaps, index, side="right"))

    def __getitem__(self, index: int) -> Row:
        row = self.catalogue.row(self._row(index))
        return row if self.variants is None else self.variants(row)

    def __iter__(self) -> Iterator[Row]:
        return (self[k] for k in range(len(self)))

    def read(self, index: int) -> bytes:
        """Return the content of an image's file. Raises OSError, or DamagedImage if there is nothing to read."""
        return self.catalogue.read(self._row(index))

    def captions(self, limit: int | None = None) -> Iterator[str]:
        """Yield the captions of all images in turn, or of `limit` evenly spaced images."""
        n = len(self)
        count = n if limit is None else min(limit, n)
        return (text for k in range(count) for text in self[k * n // count].captions)

    def only_where(self, keep: NDArray[np.bool_], left_out: Sequence[tuple[str, str]] = ()) -> "Source":
        """Return a source of the images where `keep` (n,) is true. left_out: (name, reason) of removals to report."""
        rows = np.array([self._row(int(k)) for k in np.flatnonzero(keep)], np.int64)
        source = Source(self.catalogue, self.split, only=rows, left_out=(*self.left_out, *left_out))
        source.repeats = None if self.repeats is None else self.repeats[keep]
        source.variants = self.variants
        return source

    def repeated(self, counts: NDArray[np.int64]) -> "Source":
        """Return a source without the images whose count is 0; each other one appears `counts` (n,) times an epoch."""
        source = copy.copy(self)
        source.repeats = counts
        return source if counts.all() else source.only_where(counts > 0)

    def varied(self, variants: TagVariants) -> "Source":
        """Return a source of the same images, with variants of their captions."""
        source = copy.copy(self)
        source.variants = variants
        return source

    def with_held_out(self, held_out: "Source", indices: Sequence[int]) -> "Source":
        """Return a source of the images and of some that are held out of the same catalogue."""
        rows = np.array([held_out._row(k) for k in indices], np.int64)
        return Source(self.catalogue, self.split, without=np.setdiff1d(self.without, rows), left_out=self.left_out)

    @property
    def location(self) -> str:
        """Location of the dataset, for messages."""
        return self.catalogue.location

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on how the dataset was read."""
        return self.catalogue.notes

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and captions: equal for copies of a dataset at different locations."""
        rows = self.without if self.only is None else self.only
        selection = [self.only is None, hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()]
        return hashlib.sha256(json.dumps([self.catalogue.fingerprint, selection]).encode()).hexdigest()

    def __str__(self) -> str:
        notes = [f"{len(self.left_out):,} left out"] if self.left_out else []
        notes += [f"{self.catalogue.uncaptioned:,} without a caption"] if self.catalogue.uncaptioned else []
        return ", ".join([f"{len(self):,} images ({self.split}) in {self.location}", *notes])


def find_splits(data: str, columns: Columns, names: tuple[str, ...] = ()) -> Splits:
    """Return openers for the splits of `--data`, by name; "" if it has no splits. A split is opened once, on demand.

    names: names of splits besides the usual ones. Raises UserError if there is no dataset of a known format (with a
    list of what was searched for), for unreadable files, and for paths outside the folder.
    """
    if not data:
        raise UserError(
            "--data is missing: give a folder of captioned images, parquet or tar files, or the id of a hub dataset"
        )
    if weights := caption_columns(columns.caption):
        return join_columns(weights, lambda name: find_splits(data, replace(columns, caption=name), names))
    split_names = tuple(dict.fromkeys([*filter(None, names), *_NAMES]))
    is_folder = os.path.isdir(data)
    found: Splits | None = None
    if not (is_folder and find_metadata(Path(data).resolve(), columns)):
        tried = (find(data, columns, split_names) for find in _FINDERS)
        found = next((splits for splits in tried if splits is not None), None)
    if found and is_folder and has_images(Path(data), columns):
        raise UserError(
            f"--data {data}: the folder contains images and also tar or parquet files; choose one, e.g. '{data}/*.tar'"
        )
    if found is None and not is_folder:
        raise UserError(
            f"--data {data!r}: must be an existing folder, .parquet or .tar file, a pattern that matches such files, "
            "or the id of a hub dataset (owner/name)"
        )
    if found is None:
        found = find_folder(data, columns, split_names)
    return {name: cache(partial(_opened, opener, columns)) for name, opener in found.items()}


def _opened(opener: Opener, columns: Columns) -> Catalogue:
    catalogue = opener()
    if columns.captioned and len(catalogue) and catalogue.uncaptioned == len(catalogue):
        raise UserError(f"{catalogue.location}: the captions of all {len(catalogue):,} images are empty")
    return catalogue


def take(splits: Splits, split: Split, *, name: str = "", train: str = "train", fraction: float = 0.05) -> Source:
    """Return one split. If there is only a training split, a share of it is held out for validation and test.

    The held-out images are those whose names have the lowest hashes, 1 to 1000 of them, so that an image stays in
    its split when others are added (until 1000 are held out).

    name: name of the split for validation and test. train: name of the training split. Both replace the usual names.
    """
    if "" in splits and len(splits) > 1:
        raise UserError(
            f"--data: the names of some files or folders give their split ({_list(splits)}), others don't: "
            "rename them so that all do or none does"
        )
    held_out = (name,) if name else _HELD_OUT["validation" if split == "train" else split]
    own = next((n for n in held_out if n in splits and n != train), None)
    if split != "train" and own is not None:
        return Source(splits[own](), split)
    if name and name == train:
        raise UserError(f"--input.validation-split {name!r}: must not be the training split")
    if name and own is None:
        raise UserError(
            f"--input.validation-split {name!r}: there is no such split; the splits are: {_list(splits)}; "
            "without the option, some training images are held out"
        )
    if train in splits:
        catalogue = splits[train]()
    elif "" in splits and train == "train":
        catalogue = splits[""]()
    else:
        raise UserError(
            f"no split {train!r} to train on; the splits are: {_list(splits)}; choose one with --input.train-split"
        )
    if not len(catalogue):
        raise UserError(f"{catalogue.location} has no images for {split}")
    if own is not None:
        return Source(catalogue, split)
    if len(catalogue) < 2:
        raise UserError(f"{catalogue.location} has one image: at least two are needed, because one is held out")
    below = sum(value < fraction for value, _ in catalogue.lowest_hashes[:MOST_HELD_OUT])
    count = min(max(below, 1), len(catalogue) - 1)
    rows = np.sort(np.array([row for _, row in catalogue.lowest_hashes[:count]], np.int64))
    return Source(catalogue, split, without=rows) if split == "train" else Source(catalogue, split, only=rows)


def open_source(data: str | Path, split: Split, columns: Columns | None = None, *, fraction: float = 0.05) -> Source:
    """Open one split of `data`; see `take`. Raises as `find_splits`."""
    return take(find_splits(str(data), columns or Columns()), split, fraction=fraction)


def _list(splits: Splits) -> str:
    return ", ".join(filter(None, splits)) or "none"
