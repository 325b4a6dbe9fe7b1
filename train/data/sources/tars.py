"""Catalogue of WebDataset tars on local disks: the list of tars, and the offset of each image in its tar."""

import glob
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ldm.errors import RunError, UserError
from train.data.images.decode import DamagedImage
from train.data.sources.catalogue import MAX_BYTES, Catalogue, Columns, Row, Splits
from train.data.sources.tar_index import LeftOut, LocatedRow, Part, open_index
from train.data.sources.webdataset import DAMAGE, IMAGES, Header, read_samples

REMOTE = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")
"""Pattern of the beginning of a stream's address; see train/data/sources/streams.py."""

_MOST_LISTED = 100  # samples left out of a tar that are listed by name
CAPTION_FILES = "a .txt, .json or .cls beside each image"
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
        self.left_out = tuple(entry for segment in self.index.segments for entry in segment.left_out)
        self.fingerprint, self.lowest_hashes = self.index.fingerprint, self.index.lowest_hashes
        self.uncaptioned = self.index.uncaptioned
        if not len(self):
            reason = f"; e.g. {': '.join(self.left_out[0])}" if self.left_out else ""
            raise UserError(
                f"no images in {location}: looked for members with the extensions {', '.join(IMAGES)}{reason}"
            )
        if columns.captioned and self.uncaptioned == len(self):
            raise UserError(f"{location} has {len(self):,} images but no captions: looked for {CAPTION_FILES}")

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
    request = [os.path.abspath(location), split, columns.image, columns.caption, columns.template]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ldm" / "index" / hashlib.sha256(os.fsencode(json.dumps(request))).hexdigest()[:32]


def find_tars(data: str, columns: Columns, names: Sequence[str]) -> Splits | None:
    """Return the splits of tars: a .tar, a glob, a pattern with braces, or a folder with tars; None for anything else.

    names: names of the possible splits. A tar belongs to the split whose folder contains it, or whose name begins the
    tar's name ("train-0001.tar", not "training.tar"); others belong to "". Sorted by path. Raises UserError for files
    that don't exist or are compressed; the returned openers raise the same errors as `Tars`.
    """
    if REMOTE.match(data) or (paths := _paths(data, names)) is None:
        return None
    base = data if os.path.isdir(data) else os.path.commonpath([os.path.dirname(path) for path in paths])
    prefix = re.compile(f"({'|'.join(map(re.escape, names))})(?![A-Za-z])")
    splits: dict[str, list[str]] = {}
    for path in paths:
        inside = os.path.relpath(path, base).split(os.sep)
        named = prefix.match(inside[-1])
        split = inside[0] if len(inside) > 1 and inside[0] in names else named[1] if named else ""
        splits.setdefault(split, []).append(path)
    return {split: partial(Tars, data, tars, columns, split) for split, tars in splits.items()}


def _paths(data: str, names: Sequence[str]) -> list[str] | None:
    """Return the tars' absolute paths, sorted; None if `data` doesn't name tars."""
    if os.path.isdir(data):
        folders = [data, *(os.path.join(data, name) for name in names)]
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
    if not (found := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)):
        return [pattern]
    first, last, listed = found.groups()
    if listed is None:
        a, b = int(first), int(last)
        if abs(a - b) >= 10**6:
            raise UserError(f"{found[0]!r} expands to {abs(a - b) + 1:,} files; up to 1,000,000 are accepted")
        width = max(len(first), len(last)) if any(re.match("0.", n) for n in (first, last)) else 0
        choices = [f"{k:0{width}d}" for k in range(a, b + (1 if b >= a else -1), 1 if b >= a else -1)]
    else:
        choices = listed.split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return list(dict.fromkeys(path for choice in choices for path in expand(before + choice + after)))


def _rows(columns: Columns, part: Part, left_out: LeftOut) -> Iterator[LocatedRow]:
    """Yield a tar's rows for the index. Raises UserError for a file that isn't a tar."""
    shard, unlisted, count = os.path.basename(part.path), 0, 0

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
            try:
                for sample in read_samples(tar, columns, leave_out):
                    count += 1
                    yield sample.offset, Row(sample.name, sample.size, part.changed_ns, sample.captions)
            except DAMAGE as error:
                left_out.append((shard, f"damaged or truncated after {count:,} images: {error}"))
    if unlisted:
        left_out.append((shard, f"{unlisted:,} more samples"))
