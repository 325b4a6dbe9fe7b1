"""Which rows a folder of shards holds, and where, by digests of what they are made from (see shards.py)."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.sources.splits import Source

Digests = NDArray[np.uint64]
"""(n, 2): 16 bytes each."""


def digests(texts: Iterable[str]) -> Digests:
    """Return the digest of each text."""
    out = bytearray()
    for text in texts:
        out += hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]
    return _from_bytes(out)


def digest(content: bytes) -> Digests:
    """Return the digest of one content, (2,)."""
    return _from_bytes(hashlib.sha256(content).digest()[:16])[0]


def picture_keys(source: Source) -> Digests:
    """Return the digest of each picture's place, name, size and time. On either side of a split others may have these too."""
    place = f"{os.path.abspath(source.place)}\0{source.split}"
    return digests(f"{place}\0{row.size}\0{row.mtime_ns}\0{row.name}" for row in source)


def doubled(keys: Digests) -> NDArray[np.bool_]:
    """Those that another is equal to."""
    found = np.zeros(len(keys), bool)
    for each in equal(keys):
        found[each] = True
    return found


class Index:
    """What is known in a folder: of each row its record, first of those that are there, then of aliases to such."""

    def __init__(self, folder: Path) -> None:
        self.listing = listing(folder)
        self.sums: dict[str, str] = {}  # of shards' rows
        self.unsound: list[str] = []  # what has not the sum it should have
        self.bad: dict[int, str] = {}  # why, by file << 32 | place
        key, id, like, counts, aliases = bytearray(), bytearray(), bytearray(), [0], []
        for name in self.listing:
            try:
                about = json.loads((folder / f"{name}.json").read_bytes())
                raw = (folder / f"{name}.idx").read_bytes()
                right = about["sum"] == sum_of(about) and about["index"] == hashlib.sha256(raw).hexdigest()
            except OSError:  # it may be another's that is just being removed
                continue
            except (ValueError, TypeError, KeyError):
                right = False
            if not right:
                self.unsound.append(name)
                continue
            records = np.frombuffer(raw, "<u8").reshape(-1, 3, 2)
            if not about["rows"]:
                aliases.append(records)
                continue
            self.bad |= {len(self.sums) << 32 | place: reason for place, reason in about["bad"]}
            self.sums[name] = about["rows"]
            counts.append(len(records))
            key += records[:, 0].tobytes()
            id += (records[:, 1] ^ records[:, 2]).tobytes()
            like += records[:, 1, 0].tobytes()
        self.file = np.repeat(np.arange(-1, len(self.sums), dtype=np.int32), counts)  # (m,) of the rows
        self.place = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
        self.like = np.frombuffer(like, np.uint64)  # (m,) half of each
        self.key, self.id = _from_bytes(key), _from_bytes(id)  # (m + aliases, 2); id: likeness ^ content
        for records in aliases:
            ids = records[:, 1] ^ records[:, 2]
            there = self.find_content(ids) >= 0  # those of what is gone would hide what is made anew
            self.key, self.id = np.concatenate([self.key, records[there, 0]]), np.concatenate([self.id, ids[there]])

    def find(self, keys: Digests) -> NDArray[np.int64]:
        """Return the row of each key, or -1."""
        known = locate(self.key, keys)
        aliased = np.flatnonzero(known >= len(self.file))
        known[aliased] = self.find_content(self.id[known[aliased]])
        return known

    def find_content(self, ids: Digests) -> NDArray[np.int64]:
        """Return the row of each likeness ^ content, or -1."""
        return locate(self.id[: len(self.file)], ids)

    def ambiguous(self, keys: Digests) -> NDArray[np.bool_]:
        """Keys that stand for several contents."""
        one, other = equal(self.key)
        several = (self.id[one] != self.id[other]).any(1)
        return np.isin(keys[:, 0], self.key[one[several], 0])


def equal(keys: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of equal ones, in pairs. Half of a digest tells them apart; where it doesn't, it only seems that they are."""
    order = np.argsort(keys[:, 0])
    same = np.flatnonzero(keys[order[1:], 0] == keys[order[:-1], 0])
    return order[same], order[same + 1]


def locate(table: Digests, wanted: Digests) -> NDArray[np.int64]:
    """Return the place in the table of each that is wanted, or -1."""
    found = np.full(len(wanted), -1)
    order = np.argsort(table[:, 0])
    halves = table[order, 0]
    for k in range(0, len(wanted) if len(table) else 0, 2**16):  # so that little memory is needed besides
        part = wanted[k : k + 2**16]
        at = order[np.minimum(np.searchsorted(halves, part[:, 0]), len(table) - 1)]
        found[k : k + 2**16] = np.where((table[at] == part).all(1), at, -1)
    return found


def listing(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def _from_bytes(raw: bytes | bytearray) -> Digests:
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def sum_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([about["rows"], about["index"], about["bad"]]).encode()).hexdigest()
