"""Index of the rows in a folder of shards, by digests of the content they are made from (see shards.py)."""

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
"""Digests, (n, 2): 16 bytes each."""


def digests(texts: Iterable[str]) -> Digests:
    """Return the digest of each text."""
    out = bytearray()
    for text in texts:
        out += hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:16]
    return _from_bytes(out)


def digest(content: bytes) -> Digests:
    """Return the digest of one content, (2,)."""
    return _from_bytes(hashlib.sha256(content).digest()[:16])[0]


def image_keys(source: Source) -> Digests:
    """Return the digest of each image's place, split, name, size and time. Other splits may have equal names."""
    place = f"{os.path.abspath(source.place)}\0{source.split}"
    return digests(f"{place}\0{row.size}\0{row.mtime_ns}\0{row.name}" for row in source)


def repeated(keys: Digests) -> NDArray[np.bool_]:
    """Return which keys occur more than once, (n,)."""
    found = np.zeros(len(keys), bool)
    for each in equal(keys):
        found[each] = True
    return found


class Index:
    """Index of a folder's shards: a record of each row, first the stored rows, then aliases of these."""

    def __init__(self, folder: Path) -> None:
        self.listing = listing(folder)
        self.sums: dict[str, str] = {}  # by shard: checksum of its rows
        self.unsound: list[str] = []  # shards with a wrong checksum
        self.bad: dict[int, str] = {}  # reasons, by file << 32 | place
        key, id, weak_keys, counts, aliases = bytearray(), bytearray(), bytearray(), [0], []
        for name in self.listing:
            try:
                about = json.loads((folder / f"{name}.json").read_bytes())
                raw = (folder / f"{name}.idx").read_bytes()
                right = about["sum"] == sum_of(about) and about["index"] == hashlib.sha256(raw).hexdigest()
            except OSError:  # another process may just be removing it
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
            weak_keys += records[:, 1, 0].tobytes()
        self.file = np.repeat(np.arange(-1, len(self.sums), dtype=np.int32), counts)  # (m,) shard of each row
        self.place = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
        self.weak_keys = np.frombuffer(weak_keys, np.uint64)  # (m,) first half of each weak key
        self.key, self.id = _from_bytes(key), _from_bytes(id)  # (m + aliases, 2); id: weak key ^ content
        for records in aliases:
            ids = records[:, 1] ^ records[:, 2]
            there = self.find_content(ids) >= 0  # aliases of missing rows would hide the rows that replace them
            self.key, self.id = np.concatenate([self.key, records[there, 0]]), np.concatenate([self.id, ids[there]])

    def find(self, keys: Digests) -> NDArray[np.int64]:
        """Return the row of each key, or -1."""
        known = locate(self.key, keys)
        aliased = np.flatnonzero(known >= len(self.file))
        known[aliased] = self.find_content(self.id[known[aliased]])
        return known

    def find_content(self, ids: Digests) -> NDArray[np.int64]:
        """Return the row of each id (weak key ^ content), or -1."""
        return locate(self.id[: len(self.file)], ids)

    def ambiguous(self, keys: Digests) -> NDArray[np.bool_]:
        """Return which keys stand for several contents."""
        one, other = equal(self.key)
        several = (self.id[one] != self.id[other]).any(1)
        return np.isin(keys[:, 0], self.key[one[several], 0])


def equal(keys: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of equal keys, in pairs. Compares half of each digest: rarely, different keys seem equal."""
    order = np.argsort(keys[:, 0])
    same = np.flatnonzero(keys[order[1:], 0] == keys[order[:-1], 0])
    return order[same], order[same + 1]


def locate(table: Digests, requested: Digests) -> NDArray[np.int64]:
    """Return the place in the table of each requested digest, or -1."""
    found = np.full(len(requested), -1)
    order = np.argsort(table[:, 0])
    halves = table[order, 0]
    for k in range(0, len(requested) if len(table) else 0, 2**16):  # in parts, to save memory
        part = requested[k : k + 2**16]
        at = order[np.minimum(np.searchsorted(halves, part[:, 0]), len(table) - 1)]
        found[k : k + 2**16] = np.where((table[at] == part).all(1), at, -1)
    return found


def listing(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.json"))


def _from_bytes(raw: bytes | bytearray) -> Digests:
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def sum_of(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([about["rows"], about["index"], about["bad"]]).encode()).hexdigest()
