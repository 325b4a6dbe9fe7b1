"""Rows of equal shape in files on disk, made once, verified at every start, read where they lie.

Rows lie in shards, NNNNN-KEY.npy. A shard's key is a hash of all it was made from: what the caller says the rows depend
on, and each row's own key. Beside it NNNNN-KEY.json holds the SHA-256 of what was written. A shard is used only if its
key is the one wanted and its sum is right; others are made anew. So an interrupted build goes on where it was, nothing
stale or damaged is read, and sources with rows in common may share a folder. Any of it may be deleted at any time.
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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.errors import RunError

Stored = Literal["float32", "float16"]
Bad = list[tuple[int, str]]
"""Rows that couldn't be made, and why. They are zeros."""
Make = Callable[[Sequence[range], Callable[[int], object]], Iterator[tuple[NDArray[Any], Bad]]]
"""Given ranges of rows and a callback for progress, yields each range's values (len, *shape) and bad rows."""

_FORMAT = 1  # of the files; part of every key
_SHARD_BYTES, _SHARD_ROWS = 64 * 2**20, 4096  # of a shard, at most
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


def open_shards(
    folder: Path,
    kind: str,
    depends_on: dict[str, Any],
    row_keys: Sequence[str],
    shape: tuple[int, ...],
    dtype: Stored,
    make: Make,
    processes: Processes,
) -> tuple[Shards, Bad]:
    """The rows under `folder`, and which of them are bad.

    Each process verifies every world-th shard, makes those that aren't right, and waits for the others. `make` isn't
    called if nothing is missing. Raises RunError when there is no room on the disk.
    """
    depends_on = {"kind": kind, **depends_on, "shape": shape, "dtype": dtype, "format": _FORMAT}
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    folder = folder / f"{kind}-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    per_shard = max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))
    shards = []
    for number, start in enumerate(range(0, len(row_keys), per_shard)):
        own = row_keys[start : start + per_shard]
        shard_key = hashlib.sha256(json.dumps([key, *own]).encode()).hexdigest()
        shards.append(Shard(folder / f"{number:05d}-{shard_key[:16]}.npy", shard_key, range(start, start + len(own))))

    mine = shards[processes.rank :: processes.world]
    quiet = processes.rank != 0
    with ThreadPoolExecutor(4) as pool:  # hashing lets other threads run
        sound = tqdm(pool.map(_sound, mine), f"checking {kind}", len(mine), leave=False, delay=2, disable=quiet)
        todo = [shard for shard, right in zip(mine, sound, strict=True) if not right]
    if todo:
        count, damaged = sum(len(s.rows) for s in todo), sum(_about(s) is not None for s in todo)
        room, needed = shutil.disk_usage(folder).free, count * row_bytes
        of = f"{len(todo)} of {len(mine)} shards" + (" of this process" if processes.world > 1 else "")
        processes.say(
            f"cache {folder}: making {of} ({len(todo) - damaged} missing or stale, {damaged} damaged): "
            f"{count:,} rows, {needed / 2**20:,.1f} MiB"
        )
        if needed > room:
            raise RunError(f"cache {folder} needs {needed / 2**30:.1f} GiB more; {room / 2**30:.1f} GiB are free there")
        _sweep(folder)
        with tqdm(total=count, desc=kind, unit="row", dynamic_ncols=True, disable=quiet) as bar:
            for shard, (values, bad) in zip(todo, make([s.rows for s in todo], bar.update), strict=True):
                _write(shard, values, bad)
    processes.barrier()
    all_bad: Bad = []
    for shard in shards:
        about = _about(shard)
        if about is None:
            raise RunError(f"{shard.path} is missing: the processes of a run must share the folder of the cache")
        all_bad += [(row, reason) for row, reason in about["bad"]]
    return Shards([s.path for s in shards], per_shard, shape, dtype), all_bad


def _write(shard: Shard, values: NDArray[Any], bad: Bad) -> None:
    """The rows, then what vouches for them; each whole or not at all."""
    _atomically(shard.path, lambda file: np.save(file, values, allow_pickle=False))
    if (header := shard.path.stat().st_size - values.nbytes) != _HEADER:
        raise RunError(f"{shard.path} has a header of {header} bytes where {_HEADER} were expected")
    about = {"key": shard.key, "bad": bad, "sha256": _sum(shard.path, bad)}
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


def _sum(path: Path, bad: Bad) -> str:
    """Of the file and of the list of its bad rows."""
    with path.open("rb") as file:
        total = hashlib.file_digest(file, "sha256")
    total.update(json.dumps(bad).encode())
    return total.hexdigest()


def _about(shard: Shard) -> dict[str, Any] | None:
    """What the .json says, if it speaks of this key and its rows are there."""
    try:
        about = json.loads(shard.path.with_suffix(".json").read_bytes())
        return about if about["key"] == shard.key and shard.path.is_file() else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _sound(shard: Shard) -> bool:
    about = _about(shard)
    try:
        return about is not None and about["sha256"] == _sum(shard.path, about["bad"])
    except (OSError, TypeError, KeyError):
        return False
