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

MOST_HELD_OUT = 1000  # largest number of images held out of a training split
MAX_BYTES = 2**30  # largest accepted file of an image


class Row(NamedTuple):
    """An image's entry in the catalogue."""

    name: str
    """Name in the dataset, with "/" as separator. It appears in reports, and determines the row's split."""
    size: int
    """Size of the file in bytes."""
    changed_ns: int
    """Time of the last change of the file, or of the file that contains it: st_ctime_ns, which can't be set back.

    It changes with content, modification time, permissions and name. It is part of the caches' keys only."""
    captions: tuple[str, ...]
    """Captions, at least one; "" is the null condition."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Location of a row's image and captions."""

    image: str = ""
    """Column of the image or its file name (in tars: extension of the image); empty: the format's usual ones."""
    caption: str = ""
    """Column of the caption (in tars: extension, or key in the sample's .json); empty: text, else caption."""
    template: str = ""
    """Template that turns a class label into a caption, with {} for the label; empty: the captions are texts."""
    captioned: bool = True
    """Whether captions are required."""

    def of_label(self, label: str) -> str:
        """Return the caption of a class label; "golden_retriever" is written "golden retriever"."""
        label = label.encode(errors="replace").decode()
        return self.template.replace("{}", " ".join(label.replace("_", " ").split()))


class Catalogue(ABC):
    """Rows in the order of the dataset. A catalogue has no open files, so workers may share it."""

    location: str
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
    def lowest_hashes(self) -> list[tuple[float, int]]:
        """(hash, row) of the rows whose names have the lowest hashes, at most MOST_HELD_OUT + 1 of them, ascending."""
        return lowest_hashes(self)


Opener = Callable[[], Catalogue]
Splits = Mapping[str, Opener]
"""Openers by name of split; the name is "" for a dataset without splits."""


def decode_text(data: bytes) -> str:
    """Decode a text file: UTF-16 if it begins with its byte order mark, else UTF-8 or, if that fails, Windows-1252."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def fingerprint(rows: Iterator[Row] | Catalogue) -> str:
    """Return the fingerprint of rows; see `Catalogue.fingerprint`."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(os.fsencode(json.dumps([row.name, row.size, row.captions])) + b"\n")
    return digest.hexdigest()


def lowest_hashes(rows: Iterator[Row] | Catalogue) -> list[tuple[float, int]]:
    """Return (hash, row) of the rows with the lowest hashes; see `Catalogue.lowest_hashes`."""
    return heapq.nsmallest(MOST_HELD_OUT + 1, ((name_hash(row.name), k) for k, row in enumerate(rows)))


def name_hash(name: str) -> float:
    """Return the hash of a name, in [0, 1); it is the same in every dataset."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
