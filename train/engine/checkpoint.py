"""Checkpoints: folders that are either complete or absent, in formats that can't carry code.

    checkpoints/step-00001000/state.safetensors   the tensors, named by their path in the tree
                              state.json          the tree: everything else, and where each tensor belongs
                              manifest.json       the step; SHA-256 and size of the two other files

A checkpoint is committed as an atomic folder (train/data/store/atomic.py) and read back; only then are old ones pruned.
A process that is killed at any moment leaves either the old state or the new one.
"""

import functools
import hashlib
import json
import logging
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.errors import RunError, UserError, one_line
from train.data.store.atomic import atomic_folder, plain_errors, recover_all, remove, rename, retire, sweep, write_new

Checksums = dict[str, dict[str, str | int]]  # name of a file → its "sha256" and "size"

_log = logging.getLogger(__name__)
_TENSORS, _TREE, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_ASIDE = "diverged-"  # prefix of checkpoints whose weights give no finite loss
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.bool: "BOOL",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
# Errors that can be raised while a foreign or damaged file is read.
_UNREADABLE = (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError, struct.error)


# -- a tree in two files --


@dataclass(frozen=True, slots=True)
class PackedTree:
    """A tree in the form in which its two files store it."""

    state: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    def write(self, folder: Path) -> Checksums:
        """Write the tree into an existing folder, without fsync. Returns the checksums of the intended content."""
        text = json.dumps(self.state, allow_nan=False, separators=(",", ":")).encode()
        return {
            _TENSORS: write_new(folder / _TENSORS, _safetensors(self.tensors)),
            _TREE: write_new(folder / _TREE, [text]),
        }


def pack_tree(tree: Any) -> PackedTree:
    """Prepare a tree for writing.

    A tree is None, a bool, int, float, str or strided tensor, or a list, tuple or dict (keys str or int) of trees.
    `load_tree` restores it bit for bit: types, dtypes, strides of dense tensors, NaN bits, and shared tensors. Two
    things change: tensors are on the CPU without gradient, and subclasses of dict become dict. Raises TypeError for any
    other value, with its path in the tree.
    """
    tensors: dict[str, Tensor] = {}
    packed = _pack(tree, "state", tensors, {})
    # Fused optimizers walk memory in order, unchecked: moments need the same strides as their weights.
    strides = {name: list(torch.empty_like(t, device="meta").stride()) for name, t in tensors.items()}
    return PackedTree({"tree": packed, "strides": strides}, tensors)


@contextmanager
def of_this_run(checkpoint: "LatestCheckpoint") -> Iterator[None]:
    """Turn the errors of restoring a checkpoint of something else into a RunError."""
    try:
        yield
    except (UserError, RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except (*_UNREADABLE, ArithmeticError, AssertionError) as error:
        raise RunError(
            f"{checkpoint.folder} is intact, but its content doesn't fit this run ({one_line(error, 300)}): restore it "
            "from a copy, move it away to continue from an earlier one, or choose another --out"
        ) from error


def load_tree(folder: Path) -> Any:
    """Load the tree that a `PackedTree` wrote, without running code from it. Raises RunError for any other content."""
    folder, tensors = Path(folder), {}
    try:
        state = json.loads((folder / _TREE).read_bytes())
        with safe_open(folder / _TENSORS, framework="pt") as file:
            for name, stride in state["strides"].items():
                view = file.get_tensor(name)  # of the file: copied, so that pruning can free the disk space
                tensors[name] = torch.empty_strided(view.shape, stride, dtype=view.dtype).copy_(view)
        return _unpack(state["tree"], tensors)
    except _UNREADABLE as error:
        raise RunError(f"{folder} does not contain a valid saved state: {error}") from error


def _pack(value: Any, path: str, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> Any:
    """Convert a value to JSON, where an object has one key, its type. `names` has the tensors already packed."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack("<d", value).hex()}
    if kind in (list, tuple):
        items = [_pack(item, f"{path}/{i}", tensors, names) for i, item in enumerate(value)]
        return items if kind is list else {"tuple": items}
    if isinstance(value, dict):
        if wrong := [key for key in value if type(key) not in (str, int)]:
            raise TypeError(f"{path} has the key {wrong[0]!r}: only str and int keys can be saved")
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors, names)] for key, item in value.items()]}
    dense = kind in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
    if dense and value.dtype in _DTYPES:
        identity = (value.device, value.data_ptr() or id(value), value.dtype, value.shape, value.stride())
        name = names.setdefault(identity, _unused_name(path, tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    details = f" ({value.dtype}, {value.layout}, {value.device})" if isinstance(value, Tensor) else ""
    raise TypeError(f"{path} is a {kind.__name__}{details}, which cannot be saved (see pack_tree for what can)")


def _unused_name(path: str, tensors: dict[str, Tensor]) -> str:
    name = path.encode("utf-8", "backslashreplace").decode()
    return _unused_name(name + "'", tensors) if name in tensors else name  # the keys 1 and "1" have the same path


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    match value:
        case {"dict": pairs}:
            return {key: _unpack(item, tensors) for key, item in pairs}
        case {"tuple": items}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"tensor": name}:
            return tensors[name]
        case {"float": bits}:
            return struct.unpack("<d", bytes.fromhex(bits))[0]
        case list():
            return [_unpack(item, tensors) for item in value]
        case None | bool() | int() | float() | str():
            return value
    raise ValueError(f"{_TREE} contains the unknown entry {str(value)[:80]}")


def _safetensors(tensors: dict[str, Tensor]) -> Iterator[Any]:
    """Yield the content of a safetensors file, one tensor at a time: a copy of all would double the memory."""
    tensors = dict(
        sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    )  # widest types first, which keeps all tensors aligned
    header, end = {}, 0
    for name, t in tensors.items():
        begin, end = end, end + t.nbytes
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for t in tensors.values():
        yield t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


# -- the checkpoints of a run --


@dataclass(frozen=True, slots=True)
class LatestCheckpoint:
    """The newest valid checkpoint of a run."""

    step: int
    folder: Path
    invalid: tuple[str, ...] = ()
    """Newer checkpoints that were skipped as invalid, each with the reason."""


class Checkpoints:
    """Checkpoints of a run. The newest `keep` (2 or more) valid ones are kept. Only one process at a time may save."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 2:
            raise ValueError(f"keep is {keep}: must be at least 2")
        self.folder, self.keep = Path(folder), keep

    def save(self, step: int, tree: Any) -> Path:
        """Commit a tree (see `pack_tree`) as the checkpoint of `step`, then prune. Returns its folder.

        Replaces an existing checkpoint of that step. Raises RunError on failure; all earlier checkpoints are then
        intact.
        """
        if step < 0:
            raise ValueError(f"step is {step}: must be at least 0")
        packed = pack_tree(tree)
        final = self.folder / f"step-{step:08d}"
        with plain_errors(final):
            recover_all(self.folder, "step-*")
            sweep(self.folder, "step-*")
            if os.path.lexists(final) and (fault := _fault(step, final)):
                _log.warning("checkpoint %s was not valid (%s) and is replaced", final, fault)
            with atomic_folder(final, needed=packed.nbytes) as folder:
                manifest = {"step": step, "files": packed.write(folder)}
                write_new(folder / _MANIFEST, [json.dumps(manifest).encode()])
            if fault := _known_fault(step, final, _stamp(final)):
                raise RunError(
                    f"checkpoint {final} can't be read back as it was written ({fault}): check the disk, then run the "
                    "same command again; earlier checkpoints are intact"
                )
            self._prune(final)
        return final

    def newest_step(self) -> int:
        """Return the step of the newest checkpoint, which isn't verified; 0 if there is none."""
        return next((step for step, _ in self._committed()), 0)

    def latest(self, before: float = math.inf) -> LatestCheckpoint | None:
        """Return the newest valid checkpoint, verified from its files; None if none was ever committed.

        before: only checkpoints of earlier steps are considered. Raises RunError, which lists each checkpoint and its
        fault, if there are some and none is valid.
        """
        recover_all(self.folder, "step-*")
        invalid: list[str] = []
        for step, folder in self._committed():
            if step >= before:
                continue
            fault = _fault(step, folder)
            if fault is None:
                return LatestCheckpoint(step, folder, tuple(invalid))
            invalid.append(f"{folder.name}: {fault}")
            _log.warning("checkpoint %s is not valid (%s) and is skipped", folder, fault)
        if invalid and before == math.inf:
            raise RunError(
                f"no checkpoint in {self.folder} is valid ({'; '.join(invalid)}): move this folder away to start from "
                "step 0"
            )
        return None

    def load(self, checkpoint: LatestCheckpoint) -> Any:
        """Return the saved tree, with tensors on the CPU. Raises RunError if the files don't contain one."""
        return load_tree(checkpoint.folder)

    def set_aside(self, after: int) -> list[Path]:
        """Rename the valid checkpoints of later steps, so that no run continues from them. Returns their new folders.

        They are removed when the next checkpoint is committed.
        """
        moved = []
        for step, folder in self._committed():
            if step > after and _known_fault(step, folder, _stamp(folder)) is None:
                moved.append(folder.with_name(f"{_ASIDE}{folder.name}"))
                remove(moved[-1])
                rename(folder, moved[-1])
        return moved

    def _committed(self) -> list[tuple[int, Path]]:
        """Return step and folder of each checkpoint, newest first."""
        folders = {p.name: p for p in self.folder.glob("step-*") if re.fullmatch("step-[0-9]{8,}", p.name)}
        return sorted(((int(name[5:]), folder) for name, folder in folders.items()), reverse=True)

    def _prune(self, new: Path) -> None:
        """Remove valid checkpoints beyond the newest `keep`. Invalid ones aren't counted and aren't removed."""
        valid = [f for step, f in self._committed() if _known_fault(step, f, _stamp(f)) is None]
        for folder in valid[self.keep :]:
            if folder != new:
                retire(folder)
        for folder in self.folder.glob(f"{_ASIDE}step-*"):
            remove(folder)


def _fault(step: int, folder: Path) -> str | None:
    """Return why a folder isn't a valid checkpoint of `step`, or None if it is. Reads only a checkpoint's files."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return "not a plain folder"
        _checksum(folder / _MANIFEST, limit=2**16)
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        if manifest["step"] != step or set(manifest["files"]) != {_TENSORS, _TREE}:
            return f"{_MANIFEST} does not belong to step {step}"
        for name, expected in manifest["files"].items():
            if _checksum(folder / name) != expected:
                return f"{name} has changed since it was written"
        json.loads((folder / _TREE).read_bytes())
        with safe_open(folder / _TENSORS, framework="pt"):
            return None
    except FileNotFoundError as error:
        return f"{Path(error.filename or folder).name} is missing"
    except _UNREADABLE as error:
        return f"unreadable: {error}"


@functools.lru_cache
def _known_fault(step: int, folder: Path, stamp: object) -> str | None:
    """Return `_fault`, cached for each state of the files, so that pruning needn't read gigabytes again."""
    return _fault(step, folder)


def _stamp(folder: Path) -> object:
    """Return names, inodes, sizes and times of a folder's files: if a file changes, so does the result."""
    with suppress(OSError), os.scandir(folder) as entries:
        stats = ((entry.name, entry.stat(follow_symlinks=False)) for entry in entries)
        return frozenset((name, s.st_ino, s.st_size, s.st_ctime_ns) for name, s in stats)
    return None


def _checksum(path: Path, limit: float = math.inf) -> dict[str, str | int]:
    """Return SHA-256 and size of a plain file, read from the disk, not the page cache, if the system allows."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        raise ValueError(f"{path.name} is not a plain file, or is larger than expected")
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": status.st_size}
