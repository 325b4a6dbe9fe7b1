"""Index of a dataset's rows on disk: 100 million rows take no memory, and the index opens in a moment.

A folder contains one or more generations G of:

    G.parts    one JSON line per part (a tar): its path, size and times, how much of the two other files is about it,
               and the entries that are left out
    G.lines    one line per row, JSON of [name, size, captions] and, if not 1, repeats; the SHA-256 of this
               file is the dataset's fingerprint
    G.rows     one record per row: offset of the row's line from the first line of its part, offset of the image in
               the part, length of the line, and a CRC-32 over all of these and the line
    about.json name of the complete generation, with the statistics of all its rows

about.json is written last and renamed into place, so an index is either complete or missing. A part's rows and lines
don't refer to other parts. So rows of unchanged parts are reused from an older or unfinished generation, if their
checksums are right. Rows are read with pread; docs/adr/0005 says why.
"""

import atexit
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import struct
import tempfile
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from tqdm import tqdm

from ldm.errors import RunError
from train.data.sources.catalogue import Row, line_of, lowest_hashes
from train.data.store.atomic import atomic_file, sync

_FORMAT = 1
_RECORD = struct.Struct("<QQII")  # line, image, length of the line, CRC-32
RECORD = np.dtype([("line", "<u8"), ("image", "<u8"), ("length", "<u4"), ("crc", "<u4")])
"""NumPy type of a record."""
_KINDS = ("rows", "lines", "parts")
# Errors that can be raised while a damaged file is read.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)

LocatedRow = tuple[int, Row]
"""Offset of a row's image in its part, and the row."""
LeftOut = list[tuple[str, str]]
Read = Callable[["Part", LeftOut], Iterator[LocatedRow]]
"""Reader of a part's rows, in its order; it adds (name, reason) of what it leaves out, and notes under the name ""."""


class Part(NamedTuple):
    """A file that contains images, and its state."""

    path: str
    size: int
    mtime_ns: int
    changed_ns: int
    """Time of the last change, which can't be set back (st_ctime_ns)."""


class Segment(NamedTuple):
    """The entries of a part in an index."""

    part: Part
    rows: int
    line_bytes: int
    uncaptioned: int
    left_out: LeftOut


class ReadAgain(Exception):
    """Error of a reader that reads the part in another way if the error's text is in `left_out`, under the name ""."""


class NoValidIndex(Exception):
    """Error for a folder without a complete index of these parts in their current state."""


def stat_parts(paths: Iterable[str]) -> list[Part]:
    """Return the parts with their current size and times."""
    found = ((path, os.stat(path)) for path in paths)
    return [Part(path, info.st_size, info.st_mtime_ns, info.st_ctime_ns) for path, info in found]


class TarIndex:
    """Rows of parts, in order. When it is copied to another process, the copy opens the files again."""

    def __init__(self, folder: Path, parts: Sequence[Part]) -> None:
        """Raises NoValidIndex if the folder has no complete index of these parts."""
        try:
            about = json.loads((folder / "about.json").read_bytes())
            if about.pop("sum") != _about_hash(about) or about["format"] != _FORMAT:
                raise NoValidIndex
            self.folder, self.generation = folder, str(about["generation"])
            listed = (folder / f"{self.generation}.parts").read_bytes()
            self.segments = list(map(_segment, listed.splitlines()))
            if about["parts"] != hashlib.sha256(listed).hexdigest() or [s.part for s in self.segments] != list(parts):
                raise NoValidIndex
            self.fingerprint: str = about["fingerprint"]
            self.lowest_hashes = [(float(value), int(k)) for value, k in about["lowest"]]
            self.uncaptioned = sum(s.uncaptioned for s in self.segments)
            self.rows = np.cumsum([0, *(s.rows for s in self.segments)], dtype=np.int64)  # rows before each part
            self.lines = np.cumsum([0, *(s.line_bytes for s in self.segments)], dtype=np.int64)
        except _UNREADABLE:
            raise NoValidIndex from None
        self._files: tuple[int, ...] = ()
        try:
            sizes = [os.fstat(file).st_size for file in self._open()]
        except OSError:
            raise NoValidIndex from None
        if sizes != [int(self.rows[-1]) * _RECORD.size, int(self.lines[-1])]:
            raise NoValidIndex

    def __len__(self) -> int:
        return int(self.rows[-1])

    def __getitem__(self, k: int) -> tuple[Part, int, Row]:
        """Return row k with its part and its image's offset there. Raises RunError if the index is damaged."""
        if not 0 <= k < len(self):
            raise IndexError(f"row {k} of {len(self)}")
        number = int(np.searchsorted(self.rows, k, side="right")) - 1
        segment = self.segments[number]
        try:
            rows, lines = self._files or self._open()
            record = os.pread(rows, _RECORD.size, k * _RECORD.size)
            start, length = _extent(record, segment)
            line = os.pread(lines, length, int(self.lines[number]) + start)
            return segment.part, *_verified(record, line, start, segment.part)
        except FileNotFoundError:
            raise RunError(f"the index {self.folder} was replaced while in use: run the same command again") from None
        except (ValueError, TypeError, RecursionError, OverflowError):
            (self.folder / "about.json").unlink(missing_ok=True)
            raise RunError(f"the index {self.folder} is damaged: run the same command again to rebuild it") from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": ()}

    def _open(self) -> tuple[int, ...]:
        paths = [self.folder / f"{self.generation}.{kind}" for kind in ("rows", "lines")]
        with contextlib.ExitStack() as opened:
            files = []
            for path in paths:
                files.append(os.open(path, os.O_RDONLY))
                opened.callback(os.close, files[-1])
            weakref.finalize(self, opened.pop_all().close)
        self._files = tuple(files)
        return self._files


def open_index(folder: Path, paths: Sequence[str], read: Read) -> TarIndex:
    """Open the index of these parts; one process creates or updates it if needed, while others wait.

    If the folder isn't writable, the index is built in a temporary folder for this process, with a warning. Raises
    OSError for parts that can't be read, RunError for a full disk, and the errors of `read`.
    """
    with contextlib.suppress(NoValidIndex):
        return TarIndex(folder, stat_parts(paths))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("ab")
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, however the process ends
    except OSError as error:
        temporary = Path(tempfile.mkdtemp(prefix="ldm-index-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        warnings.warn(
            f"{folder} isn't writable ({error.strerror}): every run rebuilds the index of {len(paths):,} tar files, "
            f"now in {temporary}; to keep it, set XDG_CACHE_HOME to a writable folder",
            stacklevel=2,
        )
        return open_index(temporary, paths, read)
    with lock:
        parts = stat_parts(paths)
        with contextlib.suppress(NoValidIndex):
            return TarIndex(folder, parts)
        try:
            _build(folder, parts, read)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise RunError(
                    f"disk full while writing the index {folder}: free some space, "
                    "or set XDG_CACHE_HOME to a folder on another disk"
                ) from None
            raise
        return TarIndex(folder, parts)


class Writer:
    """Writer of a new generation, in a folder that no other process writes to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.generation = folder, secrets.token_hex(8)
        self.rows, self.lines, self.parts = ((folder / f"{self.generation}.{kind}").open("w+b") for kind in _KINDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files. Uncommitted entries stay, and the next writer can reuse them."""
        for file in (self.rows, self.lines, self.parts):
            file.close()

    def add(self, part: Part, located: Iterable[LocatedRow], left_out: LeftOut) -> None:
        """Add a part. If `located` raises, the files are restored to their state before the call."""
        ends = self.rows.tell(), self.lines.tell()
        rows = length = uncaptioned = 0
        try:
            for image, row in located:
                line = line_of(row)
                self.rows.write(_RECORD.pack(length, image, len(line), checksum(length, image, line)))
                self.lines.write(line)
                rows, length, uncaptioned = rows + 1, length + len(line), uncaptioned + (not any(row.captions))
        except BaseException:
            for file, end in zip((self.rows, self.lines), ends, strict=True):
                file.seek(end)
                file.truncate()
            raise
        self.finish_part(Segment(part, rows, length, uncaptioned, left_out))

    def finish_part(self, segment: Segment) -> None:
        """List a part as complete, after its records and lines have been written."""
        self.parts.write(json.dumps(segment).encode() + b"\n")
        for file in (self.rows, self.lines, self.parts):
            file.flush()

    def commit(self, lowest: list[tuple[float, int]] | None = None) -> None:
        """Make this generation the folder's index, and remove all others. lowest: Catalogue.lowest_hashes, if known."""
        hashes = []
        for file in (self.lines, self.parts):
            file.seek(0)
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        if lowest is None:
            self.lines.seek(0)
            lowest = lowest_hashes(_row(line, 0) for line in self.lines)
        about = {
            "format": _FORMAT,
            "generation": self.generation,
            "fingerprint": hashes[0],
            "parts": hashes[1],
            "lowest": lowest,
        }
        for file in (self.rows, self.lines, self.parts):
            sync(file.fileno())
        with atomic_file(self.folder / "about.json") as new:
            new.write(json.dumps({**about, "sum": _about_hash(about)}).encode())
        for path in self.folder.iterdir():
            if path.suffix[1:] in _KINDS and path.stem != self.generation:
                path.unlink(missing_ok=True)


def checksum(line_start: int, image: int, line: bytes | memoryview) -> int:
    """Return the CRC-32 of a row: the offsets of its line and of its image, and the line."""
    return zlib.crc32(line, zlib.crc32(struct.pack("<QQ", line_start, image)))


def _build(folder: Path, parts: Sequence[Part], read: Read) -> None:
    reusable = _reusable_parts(folder)
    total = sum(part.size for part in parts)
    bar = tqdm(total=total, desc="reading tars", unit="B", unit_scale=True, leave=False, delay=2)
    with bar, Writer(folder) as writer:
        for part in parts:
            start, left_out = bar.n, LeftOut()
            if part in reusable:
                generation, first_row, first_byte, segment = reusable[part]
                with contextlib.suppress(*_UNREADABLE):
                    writer.add(
                        part, _copied_rows(folder / generation, first_row, first_byte, segment), segment.left_out
                    )
                    bar.update(part.size)
                    continue
            try:
                writer.add(part, _with_progress(read(part, left_out), bar), left_out)
            except ReadAgain as note:
                left_out[:] = [("", str(note))]
                writer.add(part, _with_progress(read(part, left_out), bar), left_out)
            bar.update(start + part.size - bar.n)
        writer.commit()


def _with_progress(located: Iterator[LocatedRow], bar: Any) -> Iterator[LocatedRow]:
    start = bar.n
    for image, row in located:
        bar.update(start + image - bar.n)
        yield image, row


def _reusable_parts(folder: Path) -> dict[Part, tuple[str, int, int, Segment]]:
    """Return the parts that the folder's generations contain.

    Each has the name of its generation, its first row there, the first byte of its lines, and its segment.
    """
    reusable = {}
    complete = ""
    with contextlib.suppress(*_UNREADABLE):
        complete = json.loads((folder / "about.json").read_bytes())["generation"]
    generations = sorted(folder.glob("*.parts"), key=lambda p: (p.stem == complete, p.stat().st_size))
    for path in generations[:-2]:  # left by repeated crashes
        for kind in _KINDS:
            path.with_suffix(f".{kind}").unlink(missing_ok=True)
    for path in generations[-2:]:
        rows = lines = 0
        with contextlib.suppress(*_UNREADABLE):  # the last line may be incomplete
            for segment in map(_segment, path.read_bytes().splitlines()):
                reusable[segment.part] = path.stem, rows, lines, segment
                rows, lines = rows + segment.rows, lines + segment.line_bytes
    return reusable


def _copied_rows(generation: Path, first_row: int, first_byte: int, segment: Segment) -> Iterator[LocatedRow]:
    with generation.with_suffix(".rows").open("rb") as rows, generation.with_suffix(".lines").open("rb") as lines:
        rows.seek(first_row * _RECORD.size)
        lines.seek(first_byte)
        end = 0
        for _ in range(segment.rows):
            record = rows.read(_RECORD.size)
            start, end = end, end + len(line := lines.readline(segment.line_bytes))
            yield _verified(record, line, start, segment.part)
        if end != segment.line_bytes:
            raise ValueError("lines are missing")


def _extent(record: bytes, segment: Segment) -> tuple[int, int]:
    """Return the offset of a row's line in the lines of its part, and its length."""
    if len(record) != _RECORD.size:
        raise ValueError("truncated")
    start, _, length, _ = _RECORD.unpack(record)
    if start + length > segment.line_bytes:
        raise ValueError("line outside its part")
    return start, length


def _verified(record: bytes, line: bytes, start: int, part: Part) -> LocatedRow:
    """Return an image's offset and its row. Raises ValueError for a wrong checksum or an image outside its part."""
    if len(record) != _RECORD.size or line[-1:] != b"\n":
        raise ValueError("truncated")
    line_start, image, length, crc = _RECORD.unpack(record)
    intact = (line_start, length, crc) == (start, len(line), checksum(line_start, image, line))
    row = _row(line, part.changed_ns) if intact else None
    if row is None or not 0 <= image <= image + row.size <= part.size:
        raise ValueError("wrong checksum")
    return image, row


def _row(line: bytes, changed_ns: int) -> Row:
    name, size, captions, *repeats = json.loads(line)
    return Row(name, size, changed_ns, tuple(captions), *repeats)


def _segment(line: bytes) -> Segment:
    part, rows, line_bytes, uncaptioned, left_out = json.loads(line)
    return Segment(
        Part(*part), int(rows), int(line_bytes), int(uncaptioned), [(name, reason) for name, reason in left_out]
    )


def _about_hash(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
