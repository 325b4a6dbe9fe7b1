"""What every form of a data set looks like to the rest: rows in a fixed order, each a picture's file and its captions.

A form is read by one module (folders, tars, tables) and is a `Catalogue` afterwards; train/data/sources/splits.py takes
splits out of it.
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
MAX_BYTES = 2**30  # of a picture's file


class Row(NamedTuple):
    """A picture as listed."""

    name: str
    """Name in the data set, with "/" between: what reports show, and what decides on which side of a split it is."""
    size: int
    """Bytes of its file."""
    mtime_ns: int
    """When the file, or what holds it, was last changed."""
    captions: tuple[str, ...]
    """At least one; "" is the null condition."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a row's picture and captions are."""

    image: str = ""
    """Column that names or holds the picture (in tars: extension of the picture); empty: the form's usual ones."""
    caption: str = ""
    """Column of the caption (in tars: extension, or key in the sample's .json); empty: text, then caption."""
    template: str = ""
    """A caption made of a class label, with {} for the label; empty: captions are texts, not labels."""
    captioned: bool = True
    """False accepts pictures that have no captions."""

    def of_label(self, label: str) -> str:
        """The caption of a class label: "golden_retriever" is spoken "golden retriever"."""
        label = label.encode(errors="replace").decode()
        return self.template.replace("{}", " ".join(label.replace("_", " ").split()))


class Catalogue(ABC):
    """Rows in the order in which the data set has them. Holds no open files, so that workers may share it."""

    place: str
    """Where it lies, for messages."""
    left_out: tuple[tuple[str, str], ...] = ()
    """What was named or found and is no row: (name, reason)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, k: int) -> Row:
        """Row k, 0 ≤ k < len."""

    @abstractmethod
    def read(self, k: int) -> bytes:
        """The picture's file. Raises OSError, or DamagedPicture where there is none to read."""

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))

    @cached_property
    def uncaptioned(self) -> int:
        """Rows with no caption but ""."""
        return sum(not any(row.captions) for row in self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and captions: equal for copies of a set, wherever they lie."""
        return fingerprint(self)

    @cached_property
    def lowest(self) -> list[tuple[float, int]]:
        """(place, row) of the rows whose names have the lowest places, at most MOST_HELD_OUT + 1 of them, ascending."""
        return lowest(self)


Opener = Callable[[], Catalogue]
Splits = Mapping[str, Opener]
"""By the names of the splits that a data set has; "" for one that has none."""


def text_of(data: bytes) -> str:
    """A text file's text: UTF-8, or UTF-16 if it begins with its mark; what is neither is read as Windows-1252."""
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
    """A name's own place in [0, 1), the same in every data set."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little") / 2.0**64
