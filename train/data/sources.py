"""Captioned pictures in a folder: which there are, in what order, and which are held out.

Forms, as in Hugging Face's imagefolder:

    data/metadata.jsonl (or .csv)      a row a picture: file_name, text; several rows of one picture are its captions
    data/train/metadata.jsonl …        the same in a folder a split: train, validation or val, test
    data/cat.png, data/cat.txt         no metadata: each non-empty line of the .txt is a caption

Nothing is opened but metadata and .txt files. What a row names must lie inside the folder, links followed.
"""

import csv
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.errors import UserError

Split = Literal["train", "validation", "test"]

_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTIONS = ("text", "caption")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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


class Row(NamedTuple):
    """A picture as listed: its path inside the folder with "/" between, and what the file system says of it."""

    name: str
    size: int
    mtime_ns: int
    captions: tuple[str, ...]


class Strings:
    """A sequence of str in two arrays: small, and shared with forked workers without a copy."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [os.fsencode(s) for s in strings]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

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
        nearest = np.argsort(_places([self.names[k] for k in range(len(self))]), kind="stable")[:count]
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
    at_top = _metadata(root) is not None
    hold_out, folder = True, root
    if at_top or not present:
        rows, missing = _list(root, *columns, captioned)
        if present and (parted := [r for r in rows if r.name.partition("/")[0] in present]):
            inside, hold_out = _choose(root, split, present)
            rows = [r for r in parted if r.name.startswith(f"{inside}/")]
            missing = [m for m in missing if m.startswith(f"{inside}/")]
    else:
        inside, hold_out = _choose(root, split, present)
        folder = Path(os.path.realpath(root / inside))
        if not folder.is_relative_to(root):
            raise UserError(f"{root / inside} is a link that leads out of {root}: give --data the folder it leads to")
        rows, missing = _list(folder, *columns, captioned)
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
        raise UserError(f"{root} has no train/ (it has {', '.join(f'{f}/' for f in present)}): add it, or give one of these as --data")
    return "train", not any(f in present for f in _FOLDERS["validation"])


def _places(names: list[str]) -> NDArray[np.float64]:
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


def _list(folder: Path, image_column: str, caption_column: str, captioned: bool) -> tuple[list[Row], list[str]]:
    """The rows of a folder, and the names of missing files."""
    metadata = _metadata(folder)
    if metadata is None:
        return _list_texts(folder, captioned), []
    captions: dict[str, list[str]] = {}
    for name, texts in _read_metadata(metadata, image_column, caption_column, captioned):
        captions.setdefault(name, []).extend(texts)
    if not captions:
        raise UserError(f"{metadata} has no rows: a row a picture is expected, with {image_column!r} and a caption")
    files = dict(_scan(folder))
    rows, missing = [], []
    for name, texts in captions.items():
        found = files.get(name) or _look(folder, name)
        if found is None:
            missing.append(name)
        else:
            rows.append(Row(name, *found, tuple(t for t in texts if t) or ("",)))
    if not rows:
        raise UserError(f"none of the {len(missing):,} files that {metadata} names is in {folder}, e.g. {missing[0][:200]!r}")
    return rows, missing


def _list_texts(folder: Path, captioned: bool) -> list[Row]:
    """Pictures with a .txt beside them."""
    files = {name: found or _look(folder, name) for name, found in _scan(folder)}
    names = [name for name, found in files.items() if found and name.lower().endswith(_SUFFIXES)]
    looked_for = "metadata.jsonl, metadata.csv, or a .txt beside each picture"
    if not names:
        raise UserError(f"no pictures in {folder}: looked for {looked_for} ({', '.join(s[1:] for s in _SUFFIXES)})")
    beside = {name: f"{os.path.splitext(name)[0]}.txt" for name in names}
    if captioned and not any(files.get(text) for text in beside.values()):
        raise UserError(f"{folder} has {len(names):,} pictures but no captions: looked for {looked_for}")
    rows = []
    for name in names:
        lines = _read(folder / beside[name]).splitlines() if files.get(beside[name]) else []
        rows.append(Row(name, *(files[name] or (0, 0)), tuple(filter(None, map(str.strip, lines))) or ("",)))
    return rows


def _metadata(folder: Path) -> Path | None:
    for name in _METADATA:
        if (folder / name).is_file():
            if not (path := Path(os.path.realpath(folder / name))).is_relative_to(folder):
                raise UserError(f"{folder / name} is a link that leads out of {folder}: copy the file into it")
            return path
    return None


def _read_metadata(
    path: Path, image_column: str, caption_column: str, captioned: bool
) -> Iterator[tuple[str, list[str]]]:
    """Each row's file name and captions."""
    column: str | None = None
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}, row {number}"
        if number == 1:
            wanted = (caption_column,) if caption_column else _CAPTIONS
            column = next((c for c in wanted if c in row), None)
            absent = [image_column] if image_column not in row else []
            absent += [" or ".join(wanted)] if captioned and column is None else []
            if absent:
                raise UserError(f"{where} has no column {', '.join(absent)}; it has: {', '.join(map(str, row))[:300]}")
        yield _safe_name(row.get(image_column), where, image_column), _captions(row.get(column or ""), where)


def _captions(value: Any, where: str) -> list[str]:
    texts = value if isinstance(value, list) else ["" if value is None else value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: caption {str(value)[:80]!r} is not text (nor a list of texts)")
    return [text.encode(errors="replace").decode().strip() for text in texts]


def _safe_name(name: Any, where: str, column: str) -> str:
    """A path inside the folder, written one way."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: {column} {str(name)[:80]!r} is not a file name")
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.anchor or "\0" in name or ".." in (*posix.parts, *windows.parts):
        raise UserError(f"{where}: {column} {name[:200]!r} leads out of the folder; names inside it are accepted")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{where}: {column} {name[:200]!r} is not a file name") from None
    return str(posix)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as lines:
            if path.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(lines), 1):  # noqa: B007  told below
                    yield row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number} holds a {type(row).__name__}, not an object of columns")
                    yield row
    except UserError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} can't be read near line {number}: {error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _scan(folder: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Name inside the folder → (size, mtime_ns) of each file; None for links, which aren't followed. No hidden ones."""
    pending = [""]
    while pending:
        under = pending.pop()
        with os.scandir(folder / under) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                if entry.is_symlink():
                    yield under + entry.name, None
                elif entry.is_dir():
                    pending.append(f"{under}{entry.name}/")
                elif entry.is_file():
                    about = entry.stat()
                    yield under + entry.name, (about.st_size, about.st_mtime_ns)


def _look(folder: Path, name: str) -> tuple[int, int] | None:
    """(size, mtime_ns) of a file that is a link or beyond one; None if there is no such file."""
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(folder):
        raise UserError(f"{(folder / name)!s:.300} is a link that leads out of {folder}: copy the file into it")
    try:
        about = real.stat()
    except OSError:
        return None
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None
