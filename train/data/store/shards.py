"""Rows of equal shape in files on disk, computed once, verified at every start, and read on demand.

All rows in a folder depend on the same settings. They are stored in shards of three files, which never change:

    NAME.npy    the rows, in any order
    NAME.idx    a record per row: digests of its key, its weak key and its content
    NAME.json   the hashes of both, the rows that couldn't be computed, and the folder's name; written last

The key (a caption; or an image's location, name, size and time of change) identifies a row without reading its file.
It changes if a file is copied or touched. So if no row has the key, the row is looked up by its weak key (the image's
name and size) and by the digest of its file's content. If it is found, its new key is stored as an alias, which has
only an .idx and a .json. Rows that aren't found are computed and added. So an interrupted build keeps its finished
shards, added images need only their own rows, nothing stale or damaged is read, and sources may share a folder. The
folder may be deleted at any time.
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
from train.data.store.row_index import Digests, ShardIndex, about_hash, listing, locate

Stored = Literal["float32", "float16"]
Bad = list[tuple[int, str]]
"""Rows that couldn't be computed, with the reason. Their values are zeros."""


class ComputedRows(NamedTuple):
    """A batch of computed rows."""

    values: NDArray[Any]  # (b, *shape)
    contents: Digests
    """Digest of the content that each row was computed from, (b, 2); 0 if the key itself is such a digest."""
    bad: list[str]
    """Reason why each row couldn't be computed, or an empty text."""


class Rows(Protocol):
    """Computation of the rows of a cache, and the keys that identify them."""

    @property
    def keys(self) -> Digests:
        """Key of each row, a digest, (n, 2). A row that may have changed, e.g. whose file is newer, has a new key."""
        ...

    @property
    def ambiguous(self) -> NDArray[np.bool_]:
        """Whether each row's key isn't unique, so that only its content identifies it, (n,)."""
        ...

    def weak_keys(self, rows: NDArray[np.int64], /) -> Digests:
        """Return the weak keys of these rows, (b, 2): digests of an image's name and size, without reading the file.

        Rows with different weak keys are different. Contents are compared only for rows with equal weak keys.
        """
        ...

    def contents(self, rows: NDArray[np.int64], /) -> Digests:
        """Return the content digests of these rows (see `ComputedRows.contents`), without computing the rows."""
        ...

    def compute(self, batches: Sequence[NDArray[np.int64]], /) -> Iterator[ComputedRows]:
        """Yield the rows of each batch in turn."""
        ...


_FORMAT = 3  # version of the files' format; part of the folder's name
_SHARD_BYTES, _SHARD_ROWS = 64 * 2**20, 4096  # largest size of a shard
_TRIAL_SECONDS = 2.0  # time spent on the first batches, from which the total time is estimated
_HEADER_BYTES = 128  # size of NumPy's header before the rows


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Rank of this process, and its functions for waiting and printing. The default is a single process."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], object] = lambda: None
    print: Callable[[str], object] = print


@dataclass(frozen=True)
class Shards:
    """Rows in files. Only their positions are in memory, and no file stays open: the system caches the files' pages.

    Reads have a steadier cost than memory maps, whose cost is per page and especially high in a virtual machine. Also,
    a truncated file raises an error instead of crashing the process.
    """

    paths: list[Path]
    shard: NDArray[np.int32]  # (n,) index into `paths` for each row
    slot: NDArray[np.int32]  # (n,) index of each row within its file
    shape: tuple[int, ...]
    dtype: Stored

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """Return these rows, (b, *shape) float32. Raises RunError if a file was truncated or removed while in use."""
        out = np.empty((len(rows), *self.shape), self.dtype)
        raw = out.reshape(len(rows), math.prod(self.shape)).view(np.uint8)  # (b, bytes)
        shards, slots = self.shard[rows], self.slot[rows]
        order = np.lexsort((slots, shards)).tolist()
        for number, group in itertools.groupby(order, shards.__getitem__):
            path = self.paths[number]
            try:
                with path.open("rb", buffering=0) as file:
                    for k in group:
                        at = _HEADER_BYTES + int(slots[k]) * raw.shape[1]
                        if os.preadv(file.fileno(), [raw[k]], at) != raw.shape[1]:
                            raise RunError(f"{path} was truncated while in use: run the same command again")
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
    """Open the rows under `folder`, each of `shape`, and compute the missing ones. Returns them, and the bad ones.

    depends_on: what all rows depend on; other settings use another subfolder. batch_size: rows per call of
    `Rows.compute`. The processes share the work of comparing, verifying and computing, and wait for each other after
    each of the three. Raises RunError if the disk hasn't enough space.
    """
    depends_on = {"kind": kind, **depends_on, "shape": shape, "dtype": dtype, "format": _FORMAT}
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    folder = folder / f"{kind}-{key[:16]}"
    index = ShardIndex(folder)
    keys = _unambiguous_keys(rows, index)
    found = index.find(keys)

    processes.barrier()  # so that all processes see the same files
    _write_aliases(folder, rows, keys, np.flatnonzero(found < 0), index, processes)
    processes.barrier()
    index, found = _refresh(folder, keys, index, found)
    _verify(folder, kind, index, found, shape, dtype, processes)
    processes.barrier()
    index, found = _refresh(folder, keys, index, found)
    missing = np.flatnonzero(found < 0)
    if len(missing):
        folder.mkdir(parents=True, exist_ok=True)
        needed, free = len(missing) * math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
        if needed > free:
            raise RunError(
                f"cache {folder} needs {needed / 2**30:.1f} GiB more, but its disk has only {free / 2**30:.1f} GiB "
                "free: free some space"
            )
    processes.barrier()
    if len(missing):
        _compute(folder, kind, rows, keys, missing, shape, dtype, processes, batch_size)
    processes.barrier()
    index, found = _refresh(folder, keys, index, found)
    if (found < 0).any():
        raise RunError(
            f"cache {folder}: {(found < 0).sum():,} of {len(keys):,} rows are missing after the build: all processes "
            "of a run must share this folder, and no other run may write to it at that time; run the same command again"
        )
    shard, slot = index.shard[found], index.slot[found]
    at = shard.astype(np.int64) << 32 | slot
    bad = np.flatnonzero(np.isin(at, list(index.bad))).tolist() if index.bad else []
    paths = [folder / f"{name}.npy" for name in index.file_hashes]
    return Shards(paths, shard, slot, shape, dtype), [(k, index.bad[int(at[k])]) for k in bad]


def _unambiguous_keys(rows: Rows, index: ShardIndex) -> Digests:
    """Return the keys of rows; an ambiguous key is combined with the digest of the row's content."""
    keys, ambiguous = rows.keys, np.flatnonzero(rows.ambiguous | index.ambiguous(rows.keys))
    if len(ambiguous):
        keys = keys.copy()
        keys[ambiguous] ^= rows.contents(ambiguous)
    return keys


def _refresh(
    folder: Path, keys: Digests, index: ShardIndex, found: NDArray[np.int64]
) -> tuple[ShardIndex, NDArray[np.int64]]:
    """Read the folder again if its files have changed, and find the keys in it."""
    if listing(folder) == index.listing:  # names are never reused
        return index, found
    index = ShardIndex(folder)
    return index, index.find(keys)


def _write_aliases(
    folder: Path, rows: Rows, keys: Digests, unknown: NDArray[np.int64], index: ShardIndex, processes: Processes
) -> None:
    """Write an alias for each row of unknown key whose content is known. The processes share the work."""
    if not len(index.weak_keys):
        return  # first build: nothing to compare
    candidates = unknown[np.isin(rows.weak_keys(unknown)[:, 0], index.weak_keys)]
    own = np.array_split(candidates, processes.world)[processes.rank]
    weak_keys, contents = rows.weak_keys(own), rows.contents(own)
    known = index.find_content(weak_keys ^ contents) >= 0
    if known.any():
        _write(folder, np.stack([keys[own], weak_keys, contents], 1)[known])


def _verify(
    folder: Path,
    kind: str,
    index: ShardIndex,
    found: NDArray[np.int64],
    shape: tuple[int, ...],
    dtype: Stored,
    processes: Processes,
) -> None:
    """Remove damaged shards among those in use, and those of another folder.

    Only a shard's name decides which process verifies it.
    """
    stored = index.content_id[: len(index.shard)]
    in_use = locate(index.content_id[found[found >= 0]], stored) >= 0  # all copies of a row: any may be read later
    used = set(np.unique(index.shard[in_use]).tolist())
    own = {name for name in index.listing if zlib.crc32(name.encode()) % processes.world == processes.rank}
    to_verify = [name for k, name in enumerate(index.file_hashes) if k in used and name in own]

    counts = dict(zip(index.file_hashes, np.bincount(index.shard, minlength=len(index.file_hashes)), strict=True))

    def is_intact(name: str) -> bool:
        path = folder / f"{name}.npy"
        try:
            if index.file_hashes[name] != _file_hash(path):
                return False
            rows = np.load(path, mmap_mode="r", allow_pickle=False)  # only the header is read
            return (rows.shape, rows.dtype) == ((counts[name], *shape), np.dtype(dtype))
        except (FileNotFoundError, EOFError, ValueError, TypeError, OverflowError):
            return False

    with ThreadPoolExecutor(4) as pool:  # threads, because hashing releases the interpreter lock
        intact = pool.map(is_intact, to_verify)
        total, quiet = len(to_verify), processes.rank != 0
        bar = tqdm(intact, f"checking {kind}", total, leave=False, delay=2, disable=quiet)
        damaged = [name for name, ok in zip(to_verify, bar, strict=True) if not ok]
    damaged += own.intersection(index.damaged)
    if damaged:
        processes.print(f"cache {folder}: damaged shards: {len(damaged)}; their rows are computed again")
    foreign = own.intersection(index.foreign)
    if foreign:
        other = index.foreign[min(foreign)][:80]
        processes.print(
            f"cache {folder}: shards of another cache, {other!r}: {len(foreign)}; their rows are computed again"
        )
    for name in (*damaged, *foreign):
        _remove(folder, name)


def _compute(
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
    """Compute and write this process's share of the missing rows."""
    own = np.array_split(missing, processes.world)[processes.rank]
    if not len(own):
        return
    _sweep(folder)
    row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    per_shard = max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))
    shards = [own[k : k + per_shard] for k in range(0, len(own), per_shard)]
    batches = [[shard[k : k + batch_size] for k in range(0, len(shard), batch_size)] for shard in shards]
    computed = rows.compute(list(itertools.chain.from_iterable(batches)))
    first, seconds = _estimate(computed, len(batches[0]), len(own))
    processes.print(
        f"cache {folder}: {len(missing):,} rows to compute, {len(missing) * row_bytes / 2**20:,.1f} MiB"
        + (f", about {duration(seconds)}" if seconds else "")
    )
    computed = itertools.chain(first, computed)
    with tqdm(total=len(own), desc=kind, unit="row", dynamic_ncols=True, disable=processes.rank != 0) as bar:
        for shard, shard_batches in zip(shards, batches, strict=True):
            values, contents, bad = np.empty((len(shard), *shape), dtype), np.empty((len(shard), 2), np.uint64), []
            start = 0
            for batch in shard_batches:
                part = slice(start, start := start + len(batch))
                values[part], contents[part], reasons = next(computed)
                bad += [(part.start + k, reason) for k, reason in enumerate(reasons) if reason]
                bar.update(len(batch))
            _write(folder, np.stack([keys[shard], rows.weak_keys(shard), contents], 1), values, bad)


def _estimate(computed: Iterator[ComputedRows], most: int, count: int) -> tuple[list[ComputedRows], float]:
    """Return the first batches, and the estimated seconds for the rest of `count` rows; 0 if there is no estimate.

    most: largest number of batches, those of the first shard, which fits into memory.
    """
    first = [next(computed)]  # warm-up
    started = time.perf_counter()
    for batch in itertools.islice(computed, most - 1):
        first.append(batch)
        if time.perf_counter() - started > _TRIAL_SECONDS:
            break
    seconds, timed = time.perf_counter() - started, sum(len(batch.bad) for batch in first[1:])
    return first, seconds / timed * (count - timed - len(first[0].bad)) if timed else 0.0


def duration(seconds: float) -> str:
    """Format a time: 4 s, 3 min 20 s, 2 h 5 min."""
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
        about = {"rows": "", "index": hashlib.sha256(raw).hexdigest(), "bad": list(bad), "for": folder.name}
        if values is not None:
            path = folder / f"{name}.npy"
            with atomic_file(path) as file:
                np.save(file, values, allow_pickle=False)
            if (header := path.stat().st_size - values.nbytes) != _HEADER_BYTES:
                raise RunError(f"{path} has a header of {header} bytes, but {_HEADER_BYTES} were expected")
            about["rows"] = _file_hash(path)
        with atomic_file(folder / f"{name}.idx") as file:
            file.write(raw)
        about["sum"] = about_hash(about)
        with atomic_file(folder / f"{name}.json") as file:
            file.write(json.dumps(about).encode())
    except BaseException:
        _remove(folder, name)
        raise


def _sweep(folder: Path) -> None:
    """Remove files that killed processes left unfinished; not those of the last hour, which may still be written."""
    for path in folder.iterdir():
        finished = path.suffix == ".json" or path.with_suffix(".json").exists()
        with contextlib.suppress(FileNotFoundError):
            if (path.name.startswith(".tmp-") or not finished) and time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def _remove(folder: Path, name: str) -> None:
    for suffix in ("json", "idx", "npy"):  # the .json first: without it, the others count as unfinished
        (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
