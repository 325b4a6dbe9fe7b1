"""Common interface of all dataset formats: rows in a fixed order, each an image's file and its captions.

Each format is read by one module (folders, tars, tables), which returns a `Catalogue`; train/data/sources/splits.py
selects splits from it.
"""

import codecs
import hashlib
import heapq
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ldm.errors import UserError
from train.data.order.rng import weighted_choice

MOST_HELD_OUT = 1000  # largest number of images held out of a training split
MOST_REPEATS = 1_000_000  # largest number of repeats of an image in an epoch
READING = 2
"""Version of the rules by which folders, tars and captions are read; a run may be continued with older ones.

1: until November 2026. 2: more forms of captions, splits in any case, lines end at line feeds only, encodings are
guessed from all captions, files of systems (@eaDir, …) are ignored, a tar's members may be in any order.
"""


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
    repeats: int = 1
    """Number of times that the image appears in an epoch of training, from `Columns.repeats`."""
    weights: tuple[float, ...] = ()
    """Weights of the captions in the random choice of one of them; empty: all are equally likely."""

    def choose(self, u: float) -> int:
        """Return the caption that a random number in [0, 1) chooses."""
        return weighted_choice(self.weights, u) if self.weights else int(u * len(self.captions))


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
    from_names: bool = False
    """Whether the names of files are the captions (with a template: the labels)."""
    whole_files: bool = False
    """Whether a caption file is one caption instead of one per line."""
    encoding: str = ""
    """Encoding of text that isn't UTF-8; empty: guessed."""
    follow_links: bool = False
    """Whether links and paths may lead out of the dataset's folder."""
    reading: int = READING
    """Version of the rules of reading, 1 or 2."""
    numbered: bool = False
    """Whether the names of class folders begin with a number of repeats, which isn't part of the label."""
    repeats: str = ""
    """Column (in tars: key in the sample's .json) of the number of repeats; empty: no column."""

    def identity(self) -> list[object]:
        """Return what determines how tars are read; unchanged since the first version for what that had."""
        first: list[object] = [self.image, self.caption, self.template]
        if self.reading > 1:
            first += [self.from_names, self.whole_files, self.encoding, self.reading]
        return [*first, {"repeats": self.repeats}] if self.repeats else first

    def texts(self, content: str) -> list[str]:
        """Return the captions in the content of a caption file."""
        if self.whole_files:
            return [content.strip()]
        lines = content.splitlines() if self.reading == 1 else content.split("\n")
        return [line.strip() for line in lines]

    def of_name(self, stem: str) -> str:
        """Return the caption that a file's name gives, without its extension; "a_red-dog" is "a red-dog"."""
        stem = " ".join(stem.encode(errors="replace").decode().replace("_", " ").split())
        return self.template.replace("{}", stem) if self.template else stem

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
    notes: tuple[str, ...] = ()
    """Lines on how the dataset was read: what was guessed, and which files were seen and not read."""

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

_SYSTEM = {"@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "$recycle.bin", "lost+found"}
_SYSTEM |= {"system volume information", "thumbs.db", "desktop.ini", "icon\r"}


def ignored(name: str, reading: int = READING) -> bool:
    """Return whether a file or folder is hidden, or belongs to a system (macOS, Windows, NAS) and not the dataset."""
    return name.startswith((".", "__MACOSX")) or (reading > 1 and name.lower() in _SYSTEM)


def split_named(name: str, names: Sequence[str], reading: int = READING) -> str:
    """Return the split, one of `names`, whose name a folder or file has, in upper or lower case; "" if none."""
    if name in names:
        return name
    lower = name.lower()
    return lower if reading > 1 and lower in names else ""


def split_prefix(name: str, names: Sequence[str], reading: int = READING) -> str:
    """Return the split, one of `names`, that begins a file's name ("train-0001.tar", not "training.tar"), or ""."""
    flags = re.IGNORECASE if reading > 1 else 0
    found = re.match(f"({'|'.join(map(re.escape, names))})(?![A-Za-z])", name, flags) if names else None
    return split_named(found[1], names, reading) if found else ""


def decode_text(data: bytes) -> str:
    """Decode a text file as reading 1 does.

    It is UTF-16 if it begins with its byte order mark, else UTF-8 or, if that fails, Windows-1252.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def repeat_count(value: object) -> int:
    """Return the number of repeats that a column's value gives; 1 for an empty one. Raises ValueError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return 1
    number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    if not (number.is_integer() and 0 <= number <= MOST_REPEATS):
        raise ValueError
    return int(number)


def require_column(column: str, columns: Iterable[str], where: str) -> None:
    """Raise UserError if the column of repeats is missing."""
    if column not in (names := [str(name) for name in columns]):
        raise UserError(
            f"--input.repeats {column}: {where} has no such column; its columns are: {', '.join(names)[:300]}; "
            "name one of them, or set --input.repeats folders for folders such as 10_cat"
        )


def line_of(row: Row) -> bytes:
    """Return the row's line in an index, of which fingerprints are made."""
    repeats = [row.repeats] if row.repeats != 1 else []
    return os.fsencode(json.dumps([row.name, row.size, row.captions, *repeats])) + b"\n"


def fingerprint(rows: Iterator[Row] | Catalogue) -> str:
    """Return the fingerprint of rows; see `Catalogue.fingerprint`."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(line_of(row))
    return digest.hexdigest()


def lowest_hashes(rows: Iterator[Row] | Catalogue) -> list[tuple[float, int]]:
    """Return (hash, row) of the rows with the lowest hashes; see `Catalogue.lowest_hashes`."""
    return heapq.nsmallest(MOST_HELD_OUT + 1, ((name_hash(row.name), k) for k, row in enumerate(rows)))


def name_hash(name: str) -> float:
    """Return the hash of a name, in [0, 1); it is the same in every dataset."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
