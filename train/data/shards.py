"""Rows of equal shape in files on disk, made once, verified at every start, read where they lie.

Rows lie in shards, NNNNN-KEY.npy. A shard's key is a hash of all it was made from: what the caller says the rows depend
on, and each row's own key (a picture's name, size and modification time; a caption). Beside it NNNNN-KEY.json holds the
SHA-256 of what was written, and what each row was made from. A shard is used only if its key is the one wanted and its
sum is right; others are made anew, and of those only the rows that no other shard in the folder has: a row is taken over
by its key or, as files are copied and touched, by the hash of its content. So an interrupted build goes on where it
was, added pictures cost only themselves, nothing stale or damaged is read, and sources with rows in common may share a
folder. Any of it may be deleted at any time.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.errors import RunError

Stored = Literal["float32", "float16"]
Bad = list[tuple[int, str]]
"""Rows that couldn't be made, and why. They are zeros."""


class Made(NamedTuple):
    """Some rows."""

    values: NDArray[Any]  # (b, *shape)
    contents: list[str]
    """Of each, a hash of all it was made from, besides what all rows depend on."""
    bad: list[str]
    """Of each, why it couldn't be made, or ""."""


class Rows(Protocol):
    """What rows are made of, and how."""

    @property
    def keys(self) -> Sequence[str]:
        """Of each row: changes when the row may have changed."""
        ...

    @property
    def likes(self) -> Sequence[str]:
        """Of each row: the same while it may still be the same row, so that it pays to compare contents."""
        ...

    def contents(self, rows: Sequence[int], /) -> list[str]:
        """As in Made, without making them."""
        ...

    def make(self, batches: Sequence[Sequence[int]], /) -> Iterator[Made]:
        """The rows of each batch in turn."""
        ...


_FORMAT = 2  # of the files; part of every key
_SHARD_BYTES, _SHARD_ROWS = 64 * 2**20, 4096  # of a shard, at most
_TRIED = 4  # batches from which on two are made twice, to measure their time
_HEADER = 128  # bytes of NumPy's own before the rows


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which process this is, how it waits for the others, and how it speaks. The default is one alone."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None
    say: Callable[[str], object] = print


@dataclass(frozen=True)
class Shards:
    """Rows in files. Nothing is kept in memory, nor any file open: the system's page cache does the first better.

    Reading was chosen over memory maps for its steady cost (a map pays by the page, most of all in a virtual machine),
    and because a file that was cut short gives an error instead of a crash.
    """

    paths: list[Path]
    per_shard: int
    shape: tuple[int, ...]
    dtype: Stored

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """These rows, (b, *shape) float32. Raises RunError when a file has changed its length under us."""
        out = np.empty((len(rows), *self.shape), self.dtype)
        raw = out.reshape(len(rows), math.prod(self.shape)).view(np.uint8)  # (b, bytes)
        shards, places = np.divmod(rows, self.per_shard)
        for shard in np.unique(shards).tolist():
            with self.paths[shard].open("rb", buffering=0) as file:
                for k in np.flatnonzero(shards == shard).tolist():
                    file.seek(_HEADER + int(places[k]) * raw.shape[1])
                    if file.readinto(raw[k]) != raw.shape[1]:
                        raise RunError(f"{self.paths[shard]} was cut short while in use: run the same command again")
        return torch.from_numpy(out).float()


class Shard(NamedTuple):
    """A file to be, and what it must hold."""

    path: Path
    key: str
    rows: range


class Known(NamedTuple):
    """Where a row lies that was made before."""

    path: Path
    place: int
    content: str
    bad: str


def open_shards(
    folder: Path, kind: str, depends_on: dict[str, Any], rows: Rows, shape: tuple[int, ...], dtype: Stored,
    processes: Processes, batch_size: int,
) -> tuple[Shards, Bad]:  # fmt: skip
    """The rows under `folder`, each of `shape`, and which of them are bad.

    Each process verifies every world-th shard, makes those that aren't right, and waits for the others. Nothing is made
    if nothing is missing. Raises RunError when there is no room on the disk.
    """
    depends_on = {"kind": kind, **depends_on, "shape": shape, "dtype": dtype, "format": _FORMAT}
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    folder = folder / f"{kind}-{key[:16]}"
    row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    per_shard = max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))
    shards = []
    for number, start in enumerate(range(0, len(rows.keys), per_shard)):
        own = rows.keys[start : start + per_shard]
        shard_key = hashlib.sha256(json.dumps([key, *own]).encode()).hexdigest()
        shards.append(Shard(folder / f"{number:05d}-{shard_key[:16]}.npy", shard_key, range(start, start + len(own))))

    mine = shards[processes.rank :: processes.world]
    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        sound = tqdm(
            pool.map(_sound, (s.path for s in mine), (s.key for s in mine)), f"checking {kind}", len(mine),
            leave=False, delay=2, disable=processes.rank != 0,
        )  # fmt: skip
        todo = [shard for shard, right in zip(mine, sound, strict=True) if not right]
    known = _known(folder) if todo else {}
    processes.barrier()  # nobody writes while others look
    if todo:
        _make(folder, kind, todo, rows, known, shape, dtype, processes, batch_size)
    processes.barrier()
    bad: Bad = []
    for shard in shards:
        about = _about(shard.path, shard.key)
        if about is None:
            raise RunError(f"{shard.path} is missing: the processes of a run must share the folder of the cache")
        bad += [(shard.rows[place], reason) for place, reason in about["bad"]]
    return Shards([s.path for s in shards], per_shard, shape, dtype), bad


def _make(
    folder: Path, kind: str, todo: Sequence[Shard], rows: Rows, known: dict[str, Known], shape: tuple[int, ...],
    dtype: Stored, processes: Processes, batch_size: int,
) -> None:  # fmt: skip
    """Write these shards, of rows that are known where possible."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {k: known[_short(rows.keys[k])] for s in todo for k in s.rows if _short(rows.keys[k]) in known}
    perhaps = [k for s in todo for k in s.rows if k not in found and _short(rows.likes[k]) in known]
    for k, content in zip(perhaps, rows.contents(perhaps), strict=True):
        if (like := known.get(f"{_short(rows.likes[k])} {content}")) is not None:
            found[k] = like
    missing = [[k for k in s.rows if k not in found] for s in todo]  # of each shard
    batches = [part[k : k + batch_size] for part in missing for k in range(0, len(part), batch_size)]
    count, total = sum(map(len, missing)), sum(len(s.rows) for s in todo)

    needed, room = total * math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if needed > room:
        raise RunError(f"cache {folder} needs {needed / 2**30:.1f} GiB more; {room / 2**30:.1f} GiB are free there")
    seconds = _trial(rows, batches) * count
    processes.say(
        f"cache {folder}: {total:,} rows to write{' by this process' if processes.world > 1 else ''}, "
        f"{needed / 2**20:,.1f} MiB; {count:,} to compute{f', about {duration(seconds)}' if seconds else ''}"
        + (f", {total - count:,} are known" if total > count else "")
    )
    _sweep(folder)
    made = rows.make(batches)
    with tqdm(total=count, desc=kind, unit="row", dynamic_ncols=True, disable=processes.rank != 0) as bar:
        for shard, part in zip(todo, missing, strict=True):
            values = np.zeros((len(shard.rows), *shape), dtype)
            contents, reasons = [""] * len(values), [""] * len(values)
            for k in (k for k in shard.rows if k in found):
                place = k - shard.rows.start
                values[place], contents[place], reasons[place] = _row(found[k]), found[k].content, found[k].bad
            for first in range(0, len(part), batch_size):
                ks = part[first : first + batch_size]
                for k, value, content, reason in zip(ks, *next(made), strict=True):
                    place = k - shard.rows.start
                    values[place], contents[place], reasons[place] = value, content, reason
                bar.update(len(ks))
            keys, likes = ([_short(of[k]) for k in shard.rows] for of in (rows.keys, rows.likes))
            _write(shard, values, {"keys": keys, "likes": likes, "contents": contents}, reasons)


def _trial(rows: Rows, batches: Sequence[Sequence[int]]) -> float:
    """Seconds a row takes, from the first batch made twice; 0 where there is too little to tell."""
    if len(batches) < _TRIED:
        return 0.0
    for _ in range(2):
        begun = time.perf_counter()
        next(rows.make(batches[:1]))
    return (time.perf_counter() - begun) / len(batches[0])


def duration(seconds: float) -> str:
    """A time for people: 4 s, 3 min 20 s, 2 h 5 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


def _known(folder: Path) -> dict[str, Known]:
    """The rows of the sound shards in a folder by key, by likeness, and by likeness and content."""
    known: dict[str, Known] = {}
    for path in sorted(folder.glob("*.npy")):
        if _sound(path) and (about := _about(path)) is not None:
            bad = dict(map(tuple, about["bad"]))
            each = zip(about["keys"], about["likes"], about["contents"], strict=True)
            for place, (key, like, content) in enumerate(each):
                known[key] = known[like] = known[f"{like} {content}"] = Known(path, place, content, bad.get(place, ""))
    return known


def _row(known: Known) -> NDArray[Any]:
    return np.load(known.path, mmap_mode="r", allow_pickle=False)[known.place]


def _short(key: str) -> str:
    """A key as it is kept."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:32]


def _write(shard: Shard, values: NDArray[Any], made_from: dict[str, list[str]], reasons: list[str]) -> None:
    """The rows, then what vouches for them; each whole or not at all."""
    _atomically(shard.path, lambda file: np.save(file, values, allow_pickle=False))
    if (header := shard.path.stat().st_size - values.nbytes) != _HEADER:
        raise RunError(f"{shard.path} has a header of {header} bytes where {_HEADER} were expected")
    bad = [[place, reason] for place, reason in enumerate(reasons) if reason]
    about = {"key": shard.key, "bad": bad, **made_from}
    about["sha256"] = _sum(shard.path, about)
    _atomically(shard.path.with_suffix(".json"), lambda file: file.write(json.dumps(about).encode()))


def _atomically(path: Path, write: Callable[[Any], object]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half written; not the last hour's, as another process may be writing."""
    for left in folder.glob(".tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _sum(path: Path, about: dict[str, Any]) -> str:
    """Of the file and of what is said about it."""
    with path.open("rb") as file:
        total = hashlib.file_digest(file, "sha256")
    total.update(json.dumps([about[name] for name in ("key", "bad", "keys", "likes", "contents")]).encode())
    return total.hexdigest()


def _about(path: Path, key: str = "") -> dict[str, Any] | None:
    """What the .json says, if its rows are there, and are those of this key where one is given."""
    try:
        about = json.loads(path.with_suffix(".json").read_bytes())
        return about if key in ("", about["key"]) and path.is_file() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _sound(path: Path, key: str = "") -> bool:
    about = _about(path, key)
    try:
        return about is not None and about["sha256"] == _sum(path, about)
    except (OSError, TypeError, KeyError):
        return False
