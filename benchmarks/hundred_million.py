"""Measure the cost of a dataset of 100 million images before the first batch: seconds to open and to seek, and memory.

Writes the index of 10,000 tars (sparse files) of 10,000 images each, 13 GB in a temporary folder, then measures in a
separate process. Takes some minutes:

    python benchmarks/hundred_million.py
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from train.commands.main import command
from train.config.load import overlay
from train.data.order.permutation import index_at
from train.data.sources.catalogue import MOST_HELD_OUT, Columns
from train.data.sources.tar_index import RECORD, Segment, Writer, checksum, stat_parts
from train.data.sources.tars import find_tars, index_folder

SIZE = 40_000  # bytes per image
LINE = '["%09d.jpg", 40000, ["a caption of usual length, of an image that is not there, number %09d"]]\n'


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure the opening of an index with many rows."""

    tars: int = 10_000
    """Number of tar files."""
    rows: int = 10_000
    """Images per tar file."""
    folder: str = ""
    """Folder for the temporary files; empty: the system's."""
    measure: str = ""
    """Folder of the tars to measure; used by the script itself."""


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def write(folder: Path, tars: int, rows: int) -> None:
    paths = [str(folder / "tars" / f"{k:05d}.tar") for k in range(tars)]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(rows * (SIZE + 1024))
    index = index_folder(str(folder / "tars"), Columns())
    index.mkdir(parents=True)
    length = len(LINE % (0, 0))
    lines = np.frombuffer((LINE % (0, 0)).encode() * rows, np.uint8).reshape(rows, length).copy()
    places = [k for k in range(length) if (LINE % (0, 0))[k] != (LINE % (111_111_111, 111_111_111))[k]]
    records = np.zeros(rows, RECORD)
    records["line"], records["image"] = np.arange(rows) * length, np.arange(rows) * (SIZE + 1024)
    records["length"] = length
    started = [checksum(int(r["line"]), int(r["image"]), b"") for r in records]
    with Writer(index) as writer:
        for part in tqdm(stat_parts(paths), "writing"):
            lines[:, places] = np.tile(digits(part.path, rows), 2)
            data = lines.tobytes()
            at = range(0, len(data), length)
            records["crc"] = [zlib.crc32(data[a : a + length], crc) for a, crc in zip(at, started, strict=True)]
            writer.rows.write(records.tobytes())
            writer.lines.write(data)
            writer.finish_part(Segment(part, rows, len(data), 0, []))
        writer.commit([(k / tars / rows, k) for k in range(MOST_HELD_OUT + 1)])


def digits(path: str, rows: int) -> NDArray[Any]:
    """Return the digits of each row's number as characters (rows, 9)."""
    numbers = int(Path(path).stem) * rows + np.arange(rows)
    return (numbers[:, None] // 10 ** np.arange(8, -1, -1) % 10 + ord("0")).astype(np.uint8)


def measure(data: str) -> None:
    before, peak = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    started = time.perf_counter()
    splits = find_tars(data, Columns(), ())
    assert splits is not None
    catalogue: Any = splits[""]()
    seconds = time.perf_counter() - started
    n = len(catalogue)
    print(f"open: {seconds:.2f} s, {n:,} rows, {len(catalogue.index.segments):,} tars")
    started = time.perf_counter()
    rows = [catalogue.row(int(k)) for k in index_at(3 * n + 12345 + np.arange(64), n, 0)]
    print(f"a batch of 64 at position 3 · {n:,} + 12,345: {time.perf_counter() - started:.4f} s, e.g. {rows[0]}")
    random = np.random.default_rng(0).integers(n, size=10_000).tolist()
    for cold in (True, False):
        if cold:
            for path in catalogue.index.folder.iterdir():
                with open(path, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        right = sum(catalogue.row(k).name == f"{k:09d}.jpg" for k in random)
        rate = len(random) / (time.perf_counter() - started)
        where = "from disk" if cold else "in the page cache"
        print(f"random rows {where}: {rate:,.0f} per second; {right:,} of 10,000 correct")
    now, most = resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"resident: {now:.0f} MiB, {now - before:.0f} beyond the imports; at most {most:.0f} MiB (imports {peak:.0f})"
    )


@command
def main() -> None:
    o = overlay(Options, Options())
    if o.measure:
        measure(o.measure)
        return
    with tempfile.TemporaryDirectory(prefix="hundred-million-", dir=o.folder or None) as name:
        os.environ["XDG_CACHE_HOME"] = name
        (Path(name) / "tars").mkdir()
        started = time.perf_counter()
        write(Path(name), o.tars, o.rows)
        size = sum(path.stat().st_size for path in Path(name).rglob("*.*") if path.suffix != ".tar")
        print(f"written: {size / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s")
        subprocess.run([sys.executable, __file__, "--measure", f"{name}/tars"], check=True)


if __name__ == "__main__":
    main()
