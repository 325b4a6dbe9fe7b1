"""Catalogue of WebDataset tars on local disks: the list of tars, and the offset of each image in its tar."""

import glob
import hashlib
import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import TypeVar

from ldm.errors import RunError, UserError
from train.data.images import MAX_BYTES
from train.data.images.decode import DamagedImage
from train.data.sources.catalogue import Catalogue, Columns, Row, Splits, split_named, split_prefix
from train.data.sources.tar_index import LeftOut, LocatedRow, Part, ReadAgain, open_index
from train.data.sources.text import guess_encoding, guess_note
from train.data.sources.webdataset import DAMAGE, Header, Scattered, image_extensions, read_samples, unclear_texts

Result = TypeVar("Result")

REMOTE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")
"""Pattern of the beginning of a stream's address; see train/data/sources/streams.py."""

_MOST_LISTED = 100  # samples left out of a tar that are listed by name
_MOST_NOTES = 5  # notes on a dataset, one per tar
CAPTION_FILES = "a .txt, .caption, .json or .cls beside each image"
_MOST_TARS = 1_000_000
_BRACES = re.compile(r"\{(?:(\d{1,18})\.\.(\d{1,18})|([^{}]*,[^{}]*))\}")  # those without braces inside
_SAMPLES = 1000  # caption files from which an encoding is guessed
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Tars(Catalogue):
    """Images in local tars, through an index in the user's cache (train/data/sources/tar_index.py).

    A row's name is its image's name in the tar: the same as in a folder into which the tars are unpacked.
    """

    def __init__(self, location: str, paths: Sequence[str], columns: Columns, split: str = "") -> None:
        """Raises UserError if a file isn't a tar, or if there is no image or no required caption."""
        self.location = location
        try:
            self.index = open_index(index_folder(location, columns, split), paths, partial(_rows, columns))
        except OSError as error:
            raise RunError(f"{error.filename or location} can't be read: {error.strerror}") from None
        entries = [entry for segment in self.index.segments for entry in segment.left_out]
        self.left_out = tuple(entry for entry in entries if entry[0])
        self.notes = tuple(dict.fromkeys(note for name, note in entries if not name))[:_MOST_NOTES]
        self.fingerprint, self.lowest_hashes = self.index.fingerprint, self.index.lowest_hashes
        self.uncaptioned = self.index.uncaptioned
        if not len(self):
            reason = f"; e.g. {': '.join(self.left_out[0])}" if self.left_out else ""
            extensions = ", ".join(image_extensions(columns))
            raise UserError(f"no images in {location}: looked for members with the extensions {extensions}{reason}")
        if columns.captioned and self.uncaptioned == len(self):
            reason = f"; e.g. {': '.join(self.left_out[0])}" if self.left_out else ""
            raise UserError(f"{location} has {len(self):,} images but no captions: looked for {CAPTION_FILES}{reason}")

    def __len__(self) -> int:
        return len(self.index)

    def row(self, k: int) -> Row:
        return self.index[k][2]

    def read(self, k: int) -> bytes:
        part, offset, row = self.index[k]
        if row.size > MAX_BYTES:
            raise DamagedImage(row.name, f"{row.size:,} bytes; up to {MAX_BYTES:,} are accepted")
        # Opened for each read, because a dataset may have more tars than a process may have open files.
        with open(part.path, "rb", buffering=0) as tar:
            info = os.fstat(tar.fileno())
            content = os.pread(tar.fileno(), row.size, offset)
        if (info.st_size, info.st_mtime_ns, len(content)) != (part.size, part.mtime_ns, row.size):
            raise RunError(f"{part.path} was changed while in use: run the same command again")
        return content


def index_folder(location: str, columns: Columns, split: str = "") -> Path:
    """Return the index folder of a split. Its name is a hash of the request, so tars may be added or removed."""
    request = [os.path.abspath(location), split, *columns.identity()]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ldm" / "index" / hashlib.sha256(os.fsencode(json.dumps(request))).hexdigest()[:32]


def find_tars(data: str, columns: Columns, names: Sequence[str]) -> Splits | None:
    """Return the splits of tars: a .tar, a glob, a pattern with braces, or a folder with tars; None for anything else.

    names: names of the possible splits. A tar belongs to the split whose folder contains it, or whose name begins the
    tar's name ("train-0001.tar", not "training.tar"); others belong to "". Sorted by path. Raises UserError for files
    that don't exist or are compressed; the returned openers raise the same errors as `Tars`.
    """
    if REMOTE.match(data) or (paths := _paths(data, columns, names)) is None:
        return None
    base = data if os.path.isdir(data) else os.path.commonpath([os.path.dirname(path) for path in paths])
    splits: dict[str, list[str]] = {}
    for path in paths:
        inside = os.path.relpath(path, base).split(os.sep)
        folder = split_named(inside[0], names, columns.reading) if len(inside) > 1 else ""
        split = folder or split_prefix(inside[-1], names, columns.reading)
        splits.setdefault(split, []).append(path)
    return {split: partial(Tars, data, tars, columns, split) for split, tars in splits.items()}


def _paths(data: str, columns: Columns, names: Sequence[str]) -> list[str] | None:
    """Return the tars' absolute paths, sorted; None if `data` doesn't name tars."""
    if os.path.isdir(data):
        inside = (name for name in os.listdir(data) if split_named(name, names, columns.reading))
        folders = [data, *(os.path.join(data, name) for name in inside)]
        found = [os.path.join(folder, f) for folder in folders if os.path.isdir(folder) for f in os.listdir(folder)]
        tars = [f for f in found if f.lower().endswith(".tar") and os.path.isfile(f)]
        return sorted(map(os.path.abspath, tars)) or None
    patterns = [data] if os.path.lexists(data) else expand(data)
    if not all(pattern.lower().endswith(".tar") for pattern in patterns):
        if any(pattern.lower().endswith(_COMPRESSED) for pattern in patterns):
            raise UserError(
                f"--data {data!r} is compressed: unpack it to a .tar, or stream it with --data 'pipe:gzip -dc FILE'"
            )
        return None
    paths = set()
    for pattern in patterns:
        matched = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        if not matched:
            raise UserError(f"--data {data!r}: {pattern!r} doesn't exist")
        paths |= {os.path.abspath(path) for path in matched}
    if others := [path for path in sorted(paths) if not os.path.isfile(path)]:
        raise UserError(f"--data {data!r}: {others[0]!r} is not a file; read a pipe with --data 'pipe:cat {others[0]}'")
    return sorted(paths)


def expand(pattern: str) -> list[str]:
    """Expand braces like a shell: a{08..10}.tar is a08.tar, a09.tar and a10.tar; {a,b}.tar is a.tar and b.tar."""
    patterns, expanded = [pattern], False
    while not expanded:
        before, patterns, expanded = patterns, [], True
        for one in before:
            choices = [_choices(*found.groups()) for found in _BRACES.finditer(one)]
            if len(patterns) + math.prod(map(len, choices)) > _MOST_TARS:
                raise UserError(f"{pattern!r} expands to more than {_MOST_TARS:,} files")
            if found := _BRACES.search(one):
                expanded = False
                patterns += [one[: found.start()] + choice + one[found.end() :] for choice in choices[0]]
            else:
                patterns.append(one)
    return list(dict.fromkeys(patterns))


def _choices(first: str, last: str, listed: str | None) -> Sequence[str]:
    """Return the texts that a pair of braces stands for, except that a range has at most one more than is accepted."""
    if listed is not None:
        return listed.split(",")
    a, b = int(first), int(last)
    width = max(len(first), len(last)) if any(re.match("0.", n) for n in (first, last)) else 0
    numbers = range(a, b + 1) if b >= a else range(a, b - 1, -1)
    return [f"{k:0{width}d}" for k in numbers[: _MOST_TARS + 1]]


def _rows(columns: Columns, part: Part, left_out: LeftOut) -> Iterator[LocatedRow]:
    """Yield a tar's rows for the index. Raises UserError for a file that isn't a tar.

    If the members of a sample aren't adjacent, raises ReadAgain with a note. In the second call the note is in
    `left_out`, and the members are collected.
    """
    shard, unlisted, count = os.path.basename(part.path), 0, 0
    scattered = bool(left_out)

    def leave_out(name: str, reason: str) -> None:
        nonlocal unlisted
        if len(left_out) < _MOST_LISTED:
            left_out.append((f"{shard}/{name}", reason))
        else:
            unlisted += 1

    with open(part.path, "rb") as file:
        start = file.read(6)
        file.seek(0)
        if program := next((name for magic, name in _MAGIC.items() if start.startswith(magic)), ""):
            raise UserError(
                f"{part.path} is compressed ({program}): unpack it, or stream it with "
                f"--data 'pipe:{program} -dc {part.path}'"
            )
        try:
            tar = tarfile.TarFile(fileobj=file, tarinfo=Header, encoding="utf-8", errors="surrogateescape")
        except DAMAGE as error:
            raise UserError(f"{part.path} is not a tar file ({error}); WebDataset's .tar files are accepted") from None
        with tar:

            @cache
            def guess() -> str:
                texts = _opened_again(part.path, lambda again: list(islice(unclear_texts(again, columns), _SAMPLES)))
                encoding = guess_encoding(text for _, text in texts)
                if encoding:
                    left_out.append(("", guess_note(shard, encoding, *texts[0])))
                return encoding

            try:
                for sample in read_samples(tar, columns, leave_out, scattered=scattered, guess=guess):
                    count += 1
                    yield sample.offset, Row(sample.name, sample.size, part.changed_ns, sample.captions, sample.repeats)
            except Scattered:
                raise ReadAgain(f"{shard}: the files of a sample aren't adjacent; they were collected") from None
            except DAMAGE as error:
                left_out.append((shard, f"damaged or truncated after {count:,} images: {error}"))
    if unlisted:
        left_out.append((shard, f"{unlisted:,} more samples"))


def _opened_again(path: str, use: Callable[[tarfile.TarFile], Result]) -> Result:
    """Return what a function returns for a tar that is opened once more, and from its beginning."""
    with tarfile.TarFile(path, tarinfo=Header, encoding="utf-8", errors="surrogateescape") as tar:
        return use(tar)
