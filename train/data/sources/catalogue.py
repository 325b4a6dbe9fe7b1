"""Common interface of all dataset formats: rows in a fixed order, each an image's file and its captions.

Each format is read by one module (folders, tars, tables), which returns a `Catalogue`; train/data/sources/splits.py
selects splits from it.
"""

import codecs
import hashlib
import heapq
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

MOST_HELD_OUT = 1000
MAX_BYTES = 2**30  # largest accepted file of an image


class Row(NamedTuple):
    """An image's entry in the catalogue."""

    name: str
    """Name in the dataset, with "/" as separator. It appears in reports, and determines the row's split."""
    size: int
    """Size of the file in bytes."""
    mtime_ns: int
    """Modification time of the file, or of the file that contains it."""
    captions: tuple[str, ...]
    """Captions, at least one; "" is the null condition."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Location of a row's image and captions."""

    image: str = ""
    """Column that names or holds the image (in tars: extension of the image); empty: the format's usual ones."""
    caption: str = ""
    """Column of the caption (in tars: extension, or key in the sample's .json); empty: text, then caption."""
    template: str = ""
    """Template of a caption from a class label, with {} for the label; empty: captions are texts, not labels."""
    captioned: bool = True
    """Whether captions are required."""

    def of_label(self, label: str) -> str:
        """Return the caption of a class label; "golden_retriever" is written "golden retriever"."""
        label = label.encode(errors="replace").decode()
        return self.template.replace("{}", " ".join(label.replace("_", " ").split()))


class Catalogue(ABC):
    """Rows in the order of the dataset. A catalogue holds no open files, so workers may share it."""

    place: str
    """Location of the dataset, for messages."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Entries that aren't rows: (name, reason)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, k: int) -> Row:
        """Return row k, 0 ≤ k < len."""

    @abstractmethod
    def read(self, k: int) -> bytes:
        """Return the content of the image's file. Raises OSError, or DamagedImage if there is nothing to read."""

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))

    @cached_property
    def uncaptioned(self) -> int:
        """Number of rows without any caption except "" (no text)."""
        return sum(not any(row.captions) for row in self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and captions: equal for copies of a dataset at different locations."""
        return fingerprint(self)

    @cached_property
    def lowest(self) -> list[tuple[float, int]]:
        """(place, row) of the rows whose names have the lowest places, at most MOST_HELD_OUT + 1 of them, ascending."""
        return lowest(self)


Opener = Callable[[], Catalogue]
Splits = Mapping[str, Opener]
"""Openers by name of split; the name is "" for a dataset without splits."""


def text_of(data: bytes) -> str:
    """Decode a text file: UTF-8, UTF-16 if it begins with its byte order mark, or else Windows-1252."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def fingerprint(rows: Iterator[Row] | Catalogue) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(os.fsencode(json.dumps([row.name, row.size, row.captions])) + b"\n")
    return total.hexdigest()


def lowest(rows: Iterator[Row] | Catalogue) -> list[tuple[float, int]]:
    return heapq.nsmallest(MOST_HELD_OUT + 1, ((place(row.name), k) for k, row in enumerate(rows)))


def place(name: str) -> float:
    """Return a name's place in [0, 1), the same in every dataset."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little") / 2.0**64
