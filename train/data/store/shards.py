"""Rows of equal shape in files on disk, computed once, verified at every start, and read on demand.

A folder holds the rows that depend on the same settings. Rows lie in shards of three files, which never change:

    NAME.npy    the rows, in any order
    NAME.idx    a record per row: digests of its key, its weak key and its content
    NAME.json   the checksums of both, and the rows that couldn't be made; written last

The key (an image's place, name, size and modification time; a caption) finds a row without reading what it is made
from. As files are copied and touched, a row that isn't found by its key is searched by its weak key (name and size) and
the hash of its content. The result is stored as an alias, which has only an .idx and a .json. Rows that aren't found
are computed and added. So an interrupted build keeps its finished shards, added images need only their own rows,
nothing stale or damaged is read, and sources may share a folder. All of it may be deleted at any time.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import secrets
import shutil
import time
import zlib
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
from train.data.store.atomic import atomic_file
from train.data.store.row_index import Digests, Index, listing, locate, sum_of

Stored = Literal["float32", "float16"]
Bad = list[tuple[int, str]]
"""Rows that couldn't be made, with the reason. Their values are zeros."""


class Made(NamedTuple):
    """A batch of computed rows."""

    values: NDArray[Any]  # (b, *shape)
    contents: Digests
    """Digest of the content that each row was made from, besides what all rows depend on; 0 if that is its key."""
    bad: list[str]
    """Reason why each row couldn't be made, or an empty text."""


class Rows(Protocol):
    """Computation of rows, and the keys that identify them."""

    @property
    def keys(self) -> Digests:
        """Digest of each row, which changes if the row may have changed."""
        ...

    @property
    def ambiguous(self) -> NDArray[np.bool_]:
        """Rows whose key isn't unique, so that only their contents distinguish them."""
        ...

    def weak_keys(self, rows: NDArray[np.int64], /) -> Digests:
        """Return the weak key of these rows, which stays the same while a row may be the same.

        Contents are compared only for rows with equal weak keys.
        """
        ...

    def contents(self, rows: NDArray[np.int64], /) -> Digests:
        """Return the content digests of these rows (see `Made.contents`), without computing the rows."""
        ...

    def make(self, batches: Sequence[NDArray[np.int64]], /) -> Iterator[Made]:
        """Yield the rows of each batch in turn."""
        ...


_FORMAT = 3  # of the files; part of the folder's name
_SHARD_BYTES, _SHARD_ROWS = 64 * 2**20, 4096  # largest size of a shard
_TRIAL = 2.0  # seconds of work from which the total time is estimated
_HEADER = 128  # bytes of NumPy's header before the rows


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Rank of this process, and how it waits for the others and prints. The default is a single process."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None
    say: Callable[[str], object] = print


@dataclass(frozen=True)
class Shards:
    """Rows in files. Memory holds only their positions, and no file stays open: the system's page cache does the rest.

    Plain reads have a steadier cost than memory maps (which pay per page, most of all in a virtual machine), and a file
    that was cut short gives an error instead of a crash.
    """

    paths: list[Path]
    file: NDArray[np.int32]  # (n,) index into `paths` of each row
    place: NDArray[np.int32]  # (n,) place of each row in its file
    shape: tuple[int, ...]
    dtype: Stored

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """Return these rows, (b, *shape) float32. Raises RunError if a file was cut short or removed while in use."""
        out = np.empty((len(rows), *self.shape), self.dtype)
        raw = out.reshape(len(rows), math.prod(self.shape)).view(np.uint8)  # (b, bytes)
        files, places = self.file[rows], self.place[rows]
        order = np.lexsort((places, files)).tolist()
        for number, own in itertools.groupby(order, files.__getitem__):
            path = self.paths[number]
            try:
                with path.open("rb", buffering=0) as file:
                    for k in own:
                        at = _HEADER + int(places[k]) * raw.shape[1]
                        if os.preadv(file.fileno(), [raw[k]], at) != raw.shape[1]:
                            raise RunError(f"{path} was cut short while in use: run the same command again")
            except FileNotFoundError:
                raise RunError(f"{path} was removed while in use: run the same command again") from None
        return torch.from_numpy(out).float()


def open_shards(
    folder: Path,
    kind: str,
    depends_on: dict[str, Any],
    rows: Rows,
    shape: tuple[int, ...],
    dtype: Stored,
    processes: Processes,
    batch_size: int,
) -> tuple[Shards, Bad]:
    """Open the rows under `folder`, each of `shape`. Returns them, and which of them are bad.

    The processes share the work of comparing, verifying and computing, and wait for each other after each of the three.
    Nothing is computed if nothing is missing. Raises RunError if there is no room on the disk.
    """
    depends_on = {"kind": kind, **depends_on, "shape": shape, "dtype": dtype, "format": _FORMAT}
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    folder = folder / f"{kind}-{key[:16]}"
    index = Index(folder)
    keys = _own_keys(rows, index)
    found = index.find(keys)

    processes.barrier()  # so that all processes see the same files
    _recognise(folder, rows, keys, np.flatnonzero(found < 0), index, processes)
    processes.barrier()
    index, found = _look(folder, keys, index, found)
    _verify(folder, kind, index, found, processes)
    processes.barrier()
    index, found = _look(folder, keys, index, found)
    missing = np.flatnonzero(found < 0)
    if len(missing):
        folder.mkdir(parents=True, exist_ok=True)
        needed, room = len(missing) * math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
        if needed > room:
            raise RunError(f"cache {folder} needs {needed / 2**30:.1f} GiB more; {room / 2**30:.1f} GiB are free there")
    processes.barrier()
    if len(missing):
        _make(folder, kind, rows, keys, missing, shape, dtype, processes, batch_size)
    processes.barrier()
    index, found = _look(folder, keys, index, found)
    if (found < 0).any():
        raise RunError(
            f"{folder} lacks {(found < 0).sum():,} of {len(keys):,} rows: the processes of a run must share the folder "
            "of the cache, and no other run write to it at the same moment; if it was that, run the same command again"
        )
    file, place = index.file[found], index.place[found]
    at = file.astype(np.int64) << 32 | place
    bad = np.flatnonzero(np.isin(at, list(index.bad))).tolist() if index.bad else []
    paths = [folder / f"{name}.npy" for name in index.sums]
    return Shards(paths, file, place, shape, dtype), [(k, index.bad[int(at[k])]) for k in bad]


def _own_keys(rows: Rows, index: Index) -> Digests:
    """Return the keys of rows, combined with the content where a key alone is ambiguous."""
    keys, ambiguous = rows.keys, np.flatnonzero(rows.ambiguous | index.ambiguous(rows.keys))
    if len(ambiguous):
        keys = keys.copy()
        keys[ambiguous] ^= rows.contents(ambiguous)
    return keys


def _look(folder: Path, keys: Digests, index: Index, found: NDArray[np.int64]) -> tuple[Index, NDArray[np.int64]]:
    """Read the folder again, after other processes may have written."""
    if listing(folder) == index.listing:  # names are never reused
        return index, found
    index = Index(folder)
    return index, index.find(keys)


def _recognise(
    folder: Path, rows: Rows, keys: Digests, unknown: NDArray[np.int64], index: Index, processes: Processes
) -> None:
    """Write aliases for those unknown rows whose content is known."""
    if not len(index.weak_keys):
        return  # first build: nothing to compare
    perhaps = unknown[np.isin(rows.weak_keys(unknown)[:, 0], index.weak_keys)]
    mine = np.array_split(perhaps, processes.world)[processes.rank]
    weak_keys, contents = rows.weak_keys(mine), rows.contents(mine)
    known = index.find_content(weak_keys ^ contents) >= 0
    if known.any():
        _write(folder, np.stack([keys[mine], weak_keys, contents], 1)[known])


def _verify(folder: Path, kind: str, index: Index, found: NDArray[np.int64], processes: Processes) -> None:
    """Remove the damaged ones of the shards in use. Each shard belongs to one process, whatever the others see."""
    held = locate(index.id[found[found >= 0]], index.id[: len(index.file)]) >= 0  # all copies: any may be read later
    used = set(np.unique(index.file[held]).tolist())
    own = {name for name in index.listing if zlib.crc32(name.encode()) % processes.world == processes.rank}
    mine = [name for k, name in enumerate(index.sums) if k in used and name in own]

    def sound(name: str) -> bool:
        try:
            return index.sums[name] == _sum(folder / f"{name}.npy")
        except FileNotFoundError:
            return False

    with ThreadPoolExecutor(4) as pool:  # threads, as hashing releases the interpreter lock
        bar = tqdm(
            pool.map(sound, mine), f"checking {kind}", len(mine), leave=False, delay=2, disable=processes.rank != 0
        )
        unsound = [name for name, right in zip(mine, bar, strict=True) if not right]
    if wrong := len(unsound) + len(own.intersection(index.unsound)):
        processes.say(f"cache {folder}: shards that aren't as they were written: {wrong}; they are made anew")
    for name in (*unsound, *own.intersection(index.unsound)):
        _remove(folder, name)


def _make(
    folder: Path,
    kind: str,
    rows: Rows,
    keys: Digests,
    missing: NDArray[np.int64],
    shape: tuple[int, ...],
    dtype: Stored,
    processes: Processes,
    batch_size: int,
) -> None:
    """Write this process's share of the missing rows."""
    mine = np.array_split(missing, processes.world)[processes.rank]
    if not len(mine):
        return
    _sweep(folder)
    row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    per_shard = max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))
    shards = [mine[k : k + per_shard] for k in range(0, len(mine), per_shard)]
    batches = [[own[k : k + batch_size] for k in range(0, len(own), batch_size)] for own in shards]
    made = rows.make([batch for of_shard in batches for batch in of_shard])
    first, seconds = _tried(made, len(batches[0]), len(mine))
    processes.say(
        f"cache {folder}: {len(missing):,} rows to make, {len(missing) * row_bytes / 2**20:,.1f} MiB"
        + (f", about {duration(seconds)}" if seconds else "")
    )
    made = itertools.chain(first, made)
    with tqdm(total=len(mine), desc=kind, unit="row", dynamic_ncols=True, disable=processes.rank != 0) as bar:
        for own, of_shard in zip(shards, batches, strict=True):
            values, contents, bad = np.empty((len(own), *shape), dtype), np.empty((len(own), 2), np.uint64), []
            begin = 0
            for batch in of_shard:
                part = slice(begin, begin := begin + len(batch))
                values[part], contents[part], reasons = next(made)
                bad += [(part.start + k, reason) for k, reason in enumerate(reasons) if reason]
                bar.update(len(batch))
            _write(folder, np.stack([keys[own], rows.weak_keys(own), contents], 1), values, bad)


def _tried(made: Iterator[Made], most: int, count: int) -> tuple[list[Made], float]:
    """Return the first batches, and the estimated seconds for the rest of `count` rows; 0 if there is no estimate."""
    first = [next(made)]  # warm-up
    started = time.perf_counter()
    for batch in itertools.islice(made, most - 1):  # these fit into memory, as their shard will
        first.append(batch)
        if time.perf_counter() - started > _TRIAL:
            break
    seconds, timed = time.perf_counter() - started, sum(len(batch.bad) for batch in first[1:])
    return first, seconds / timed * (count - timed - len(first[0].bad)) if timed else 0.0


def duration(seconds: float) -> str:
    """Format a time for people: 4 s, 3 min 20 s, 2 h 5 min."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


def _write(
    folder: Path, records: Digests, values: NDArray[Any] | None = None, bad: Sequence[tuple[int, str]] = ()
) -> None:
    """Write a shard or, without values, an alias, completely or not at all.

    records: (n, 3, 2) key, weak key, content.
    """
    name, raw = secrets.token_hex(8), records.astype("<u8").tobytes()
    try:
        about = {"rows": "", "index": hashlib.sha256(raw).hexdigest(), "bad": list(bad)}
        if values is not None:
            path = folder / f"{name}.npy"
            with atomic_file(path) as file:
                np.save(file, values, allow_pickle=False)
            if (header := path.stat().st_size - values.nbytes) != _HEADER:
                raise RunError(f"{path} has a header of {header} bytes where {_HEADER} were expected")
            about["rows"] = _sum(path)
        with atomic_file(folder / f"{name}.idx") as file:
            file.write(raw)
        about["sum"] = sum_of(about)
        with atomic_file(folder / f"{name}.json") as file:
            file.write(json.dumps(about).encode())
    except BaseException:
        _remove(folder, name)
        raise


def _sweep(folder: Path) -> None:
    """Remove unfinished files of killed processes, but not the last hour's, as another process may be writing."""
    for left in folder.iterdir():
        whole = left.suffix == ".json" or left.with_suffix(".json").exists()
        with contextlib.suppress(FileNotFoundError):
            if (left.name.startswith(".tmp-") or not whole) and time.time() - left.stat().st_mtime > 3600:
                left.unlink()


def _remove(folder: Path, name: str) -> None:
    for suffix in ("json", "idx", "npy"):  # the .json first, as it vouches for the others
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
