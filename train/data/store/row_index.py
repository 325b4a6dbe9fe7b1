"""Index of the rows in a folder of shards, by digests of what they are computed from (see shards.py)."""

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
    """Return the digest of a file's content, (2,)."""
    return _from_bytes(hashlib.sha256(content).digest()[:16])[0]


def image_keys(source: Source) -> Digests:
    """Return the digest of each image's location, split, name, size and time of change, (n, 2).

    The split is included because two splits may have equal names.
    """
    location = f"{os.path.abspath(source.location)}\0{source.split}"
    return digests(f"{location}\0{row.size}\0{row.changed_ns}\0{row.name}" for row in source)


def duplicated(keys: Digests) -> NDArray[np.bool_]:
    """Return whether each key occurs more than once, (n,)."""
    found = np.zeros(len(keys), bool)
    for places in equal_pairs(keys):
        found[places] = True
    return found


class ShardIndex:
    """Index of a folder's shards: a record per stored row, then a record per alias of a stored row."""

    def __init__(self, folder: Path) -> None:
        self.listing = listing(folder)
        self.file_hashes: dict[str, str] = {}  # by shard: hash of its .npy
        self.damaged: list[str] = []  # shards with a wrong hash
        self.foreign: dict[str, str] = {}  # shards of another folder, and its name
        self.bad: dict[int, str] = {}  # reasons, by shard << 32 | slot
        key, content_id, weak_keys, counts, aliases = bytearray(), bytearray(), bytearray(), [0], []
        unread = bytearray()  # content IDs of rows whose files couldn't be read
        for name in self.listing:
            try:
                about = json.loads((folder / f"{name}.json").read_bytes())
                raw = (folder / f"{name}.idx").read_bytes()
                intact = about["sum"] == about_hash(about) and about["index"] == hashlib.sha256(raw).hexdigest()
                records = np.frombuffer(raw, "<u8").reshape(-1, 3, 2)
                bad = [(int(slot), str(reason)) for slot, reason in about["bad"]]
                intact &= all(0 <= slot < len(records) for slot, _ in bad)
            except OSError:  # another process may be removing it now
                continue
            except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
                intact = False
            if not intact:
                self.damaged.append(name)
                continue
            if (made_for := about.get("for", folder.name)) != folder.name:  # earlier versions didn't write it
                self.foreign[name] = str(made_for)
                continue
            if not about["rows"]:
                aliases.append(records)
                continue
            self.bad |= {len(self.file_hashes) << 32 | slot: reason for slot, reason in bad}
            for slot, reason in bad:
                if (records[slot, 2] == digests([reason])[0]).all():
                    unread += (records[slot, 1] ^ records[slot, 2]).tobytes()
            self.file_hashes[name] = about["rows"]
            counts.append(len(records))
            key += records[:, 0].tobytes()
            content_id += (records[:, 1] ^ records[:, 2]).tobytes()
            weak_keys += records[:, 1, 0].tobytes()
        self.shard = np.repeat(np.arange(-1, len(self.file_hashes), dtype=np.int32), counts)  # (m,) shard of each row
        self.slot = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])  # (m,) row within the shard
        self.weak_keys = np.frombuffer(weak_keys, np.uint64)  # (m,) first half of each weak key
        self.key, self.content_id = _from_bytes(key), _from_bytes(content_id)  # (m + aliases, 2) each
        for records in aliases:
            ids = records[:, 1] ^ records[:, 2]
            stored = self.find_content(ids) >= 0  # an alias of a missing row would hide the row that replaces it
            self.key = np.concatenate([self.key, records[stored, 0]])
            self.content_id = np.concatenate([self.content_id, ids[stored]])
        self._unread = _from_bytes(unread)

    def find(self, keys: Digests) -> NDArray[np.int64]:
        """Return the row of each key, or -1."""
        known = locate(self.key, keys)
        aliased = np.flatnonzero(known >= len(self.shard))
        known[aliased] = self.find_content(self.content_id[known[aliased]])
        return known

    def find_content(self, ids: Digests) -> NDArray[np.int64]:
        """Return the row of each content ID, or -1. The ID is a row's weak key XOR the digest of its file's content."""
        return locate(self.content_id[: len(self.shard)], ids)

    def ambiguous(self, keys: Digests) -> NDArray[np.bool_]:
        """Return whether each key belongs to several contents, or to a file that couldn't be read, (n,).

        Such a file is tried again, because it may be readable now although it is unchanged: for another user, or after
        its folder's permissions or the disk were mended.
        """
        one, other = equal_pairs(self.key)
        several = (self.content_id[one] != self.content_id[other]).any(1)
        unread = np.isin(self.content_id[:, 0], self._unread[:, 0])
        return np.isin(keys[:, 0], np.concatenate([self.key[one[several], 0], self.key[unread, 0]]))


def equal_pairs(keys: Digests) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the indices of equal keys, in pairs.

    Only the first half of each digest is compared, so in rare cases different keys are reported as equal.
    """
    order = np.argsort(keys[:, 0])
    same = np.flatnonzero(keys[order[1:], 0] == keys[order[:-1], 0])
    return order[same], order[same + 1]


def locate(table: Digests, requested: Digests) -> NDArray[np.int64]:
    """Return the index in the table of each requested digest, or -1."""
    found = np.full(len(requested), -1)
    order = np.argsort(table[:, 0])
    halves = table[order, 0]
    for k in range(0, len(requested) if len(table) else 0, 2**16):  # in parts, to save memory
        part = requested[k : k + 2**16]
        at = order[np.minimum(np.searchsorted(halves, part[:, 0]), len(table) - 1)]
        found[k : k + 2**16] = np.where((table[at] == part).all(1), at, -1)
    return found


def listing(folder: Path) -> list[str]:
    """Return the names of a folder's shards and aliases, sorted."""
    return sorted(path.stem for path in folder.glob("*.json"))


def _from_bytes(raw: bytes | bytearray) -> Digests:
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


def about_hash(about: dict[str, Any]) -> str:
    """Return the hash of a shard's .json, without its own entry `sum`."""
    return hashlib.sha256(json.dumps([about["rows"], about["index"], about["bad"]]).encode()).hexdigest()
