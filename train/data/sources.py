"""Captioned pictures in a folder: which there are, in what order, and which are held out.

Forms, as in Hugging Face's imagefolder:

    data/metadata.jsonl (or .csv)      a row a picture: file_name, text; several rows of one picture are its captions
    data/train/metadata.jsonl …        the same in a folder a split: train, validation or val, test
    data/cat.png, data/cat.txt         no metadata: each non-empty line of the .txt is a caption
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError
from train.data.listing import Row, find_metadata, list_pictures

Split = Literal["train", "validation", "test"]

_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val", "test"),
    "test": ("test", "validation", "val"),
}
_MOST_HELD_OUT = 1000


@dataclass(frozen=True, slots=True)
class Record:
    """A picture and its captions: at least one; "" is the null condition."""

    path: Path
    captions: tuple[str, ...]


class Strings:
    """A sequence of str in two arrays: small, and shared with forked workers without a copy."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [os.fsencode(s) for s in strings]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())


class Source:
    """Pictures in the order of their names: `source[index]` is a Record.

    missing: files that the metadata names and that aren't there. uncaptioned: pictures with no caption but "".
    """

    def __init__(self, folder: Path, split: Split, rows: Iterable[Row], missing: tuple[str, ...] = ()) -> None:
        rows = sorted(rows)
        self.folder, self.split, self.missing = folder, split, missing
        self.names = Strings(r.name for r in rows)
        self.sizes = np.array([r.size for r in rows], np.int64)
        self.mtimes_ns = np.array([r.mtime_ns for r in rows], np.int64)
        self.texts = Strings(text for r in rows for text in r.captions)
        self.first_text = np.cumsum([0, *(len(r.captions) for r in rows)])
        self.uncaptioned = sum(not any(r.captions) for r in rows)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        return Record(self.folder / self.names[index], self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """Of one picture."""
        return tuple(self.texts[k] for k in range(self.first_text[index], self.first_text[index + 1]))

    def row(self, index: int) -> Row:
        """All that is known of one picture."""
        return Row(self.names[index], int(self.sizes[index]), int(self.mtimes_ns[index]), self.captions(index))

    def sample(self, count: int) -> "Source":
        """`count` of the pictures (all, if there are fewer), spread over the source, always the same ones."""
        nearest = np.argsort(_places(self.names), kind="stable")[:count]
        return Source(self.folder, self.split, [self.row(int(k)) for k in nearest])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, sizes and captions: equal for copies of a set, wherever they lie."""
        total = hashlib.sha256()
        for k in range(len(self)):
            total.update(os.fsencode(json.dumps([self.names[k], int(self.sizes[k]), self.captions(k)])) + b"\n")
        return total.hexdigest()

    def __str__(self) -> str:
        notes = [f"{len(self.missing):,} files named in the metadata are missing"] if self.missing else []
        notes += [f"{self.uncaptioned:,} without a caption"] if self.uncaptioned else []
        return ", ".join([f"{len(self):,} pictures ({self.split}) in {self.folder}", *notes])


def open_source(
    data: str | Path,
    split: Split,
    *,
    image_column: str = "file_name",
    caption_column: str = "",
    validation_fraction: float = 0.05,
    captioned: bool = True,
) -> Source:
    """The pictures of one split of a folder.

    Where the folder has no split but train, a share of it is held out as validation and test: those whose names hash
    lowest, 1 to 1000 of them, so that a picture keeps its side when others are added. caption_column "" tries `text`,
    then `caption`. captioned False accepts pictures that have no captions.

    Raises UserError for a folder that holds nothing of the kind (saying what was looked for), for metadata that can't
    be read, and for a row or a link that leads out of the folder.
    """
    if not str(data):
        raise UserError("--data is missing: a folder of captioned pictures")
    if not Path(data).is_dir():
        raise UserError(f"--data {str(data)!r} is not a folder")
    root = Path(data).resolve()
    columns = (image_column, caption_column)
    present = [f for f in ("train", "validation", "val", "test") if (root / f).is_dir()]
    at_top = find_metadata(root) is not None
    hold_out, folder = True, root
    if at_top or not present:
        rows, missing = list_pictures(root, *columns, captioned)
        if present and (parted := [r for r in rows if r.name.partition("/")[0] in present]):
            inside, hold_out = _choose(root, split, present)
            rows = [r for r in parted if r.name.startswith(f"{inside}/")]
            missing = [m for m in missing if m.startswith(f"{inside}/")]
    else:
        inside, hold_out = _choose(root, split, present)
        folder = Path(os.path.realpath(root / inside))
        if not folder.is_relative_to(root):
            raise UserError(f"{root / inside} is a link that leads out of {root}: give --data the folder it leads to")
        rows, missing = list_pictures(folder, *columns, captioned)
    if not rows:
        raise UserError(f"{folder}: the metadata names no pictures for {split}")
    if hold_out:
        held_out = _held_out([r.name for r in rows], validation_fraction, folder)
        rows = [r for r, held in zip(rows, held_out, strict=True) if held == (split != "train")]
    return Source(folder, split, rows, tuple(missing))


def _choose(root: Path, split: Split, present: list[str]) -> tuple[str, bool]:
    """The folder of a split, and whether it has to be shared with held-out pictures."""
    own = [f for f in _FOLDERS[split] if f in present]
    if split != "train" and own:
        return own[0], False
    if "train" not in present:
        others = ", ".join(f"{f}/" for f in present)
        raise UserError(f"{root} has no train/ (it has {others}): add it, or give one of these as --data")
    return "train", not any(f in present for f in _FOLDERS["validation"])


def _places(names: Iterable[str]) -> NDArray[np.float64]:
    """Each name's own place in [0, 1)."""
    digests = b"".join(hashlib.blake2b(os.fsencode(name), digest_size=8).digest() for name in names)
    return np.frombuffer(digests, "<u8") / 2.0**64


def _held_out(names: list[str], fraction: float, folder: Path) -> NDArray[np.bool_]:
    if len(names) < 2:
        raise UserError(f"{folder} has one picture: at least two are needed, as one is held out")
    places = _places(names)
    count = int(np.clip((places < fraction).sum(), 1, min(_MOST_HELD_OUT, len(names) - 1)))
    held_out = np.zeros(len(names), bool)
    held_out[np.argsort(places, kind="stable")[:count]] = True
    return held_out
