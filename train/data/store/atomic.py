"""Files and folders that are either whole or not there. Every fsync is here, and every rename but one (single files).

Content is written beside its place under a name that begins with a dot, synchronised, and renamed; then the folder
around it is synchronised. A process that is killed anywhere in between leaves the old content or the new.
"""

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import RunError, UserError


def _do(call: Callable[..., Any], *arguments: Any) -> Any:
    """Every fsync and rename, and every write of `write_new`, goes through here: a test can end the process at each."""
    return call(*arguments)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write into. On success it takes the place of `path`; on failure it goes.

    Raises RunError with a plain line for a full disk and for any other OSError; `path` is then as it was.
    """
    temporary = _beside(path, "tmp")
    with plain_errors(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                sync(file.fileno())
            _do(os.rename, temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)


@contextmanager
def atomic_folder(final: Path, *, needed: int | None = None) -> Iterator[Path]:
    """An empty folder beside `final` to write into. On success it takes the place of `final`; on failure it goes.

    needed: bytes, for the message when the disk is full.
    Raises RunError with a plain line for a full disk and for any other OSError; `final` is then as it was.
    """
    final = Path(final)
    temporary, aside = _beside(final, "tmp"), _beside(final, "old")
    with plain_errors(final, needed):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            recover(final)
            remove(temporary)
            temporary.mkdir()
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            _replace_folder(temporary, final)
        except BaseException:
            with suppress(OSError):
                recover(final)
                remove(temporary)
            raise
        sync(final.parent)
        sync(final.parent.parent)  # which may not have known the parent
        remove(temporary)  # now what was there before, under one name or the other
        remove(aside)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into that becomes `final`, which must be missing or empty, without fsync.

    For what is made again easily and has many files. Raises UserError where no folder can be made.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-")
    except OSError as error:
        raise UserError(f"can't make a folder in {final.parent}: {error.strerror}") from error
    with workplace as folder:
        whole = Path(folder, "whole")
        whole.mkdir()
        yield whole
        _do(os.rename, whole, final)


def write_new(path: Path, parts: Iterable[Any]) -> dict[str, str | int]:
    """Write bytes-like parts to a new file, without fsync. Returns the SHA-256 and the size of what was meant."""
    digest, size = hashlib.sha256(), 0
    with open(path, "xb", buffering=0) as file:
        for part in parts:
            view = memoryview(part)
            digest.update(view)
            size += len(view)
            while view:
                view = view[_do(file.write, view[: 2**24]) :]
    return {"sha256": digest.hexdigest(), "size": size}


def _replace_folder(new: Path, final: Path) -> None:
    """Put the folder `new` in the place of `final`, without fsync. What was there is then at `new` or `.old-…`.

    One step where Linux can exchange two names. Elsewhere `final` is missing for a moment, which `recover` mends.
    """
    if not os.path.lexists(final):
        _do(os.rename, new, final)
    elif not _do(_exchange, new, final):
        remove(_beside(final, "old"))
        _do(os.rename, final, _beside(final, "old"))
        _do(os.rename, new, final)


def recover(final: Path) -> None:
    """Bring `final` back if a process ended in the moment of `_replace_folder` in which it is missing."""
    if not os.path.lexists(final):
        with suppress(FileNotFoundError):
            _do(os.rename, _beside(final, "old"), final)


def recover_all(folder: Path, pattern: str) -> None:
    """`recover` for the names in a folder that match."""
    for aside in folder.glob(f".old-{pattern}"):
        recover(folder / aside.name.removeprefix(".old-"))


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of the names in a folder that match."""
    for leftover in (*folder.glob(f".tmp-{pattern}"), *folder.glob(f".old-{pattern}")):
        remove(leftover)


def retire(folder: Path) -> None:
    """Remove a folder: first its name, so that half of one is never found."""
    temporary = _beside(folder, "tmp")
    _do(os.rename, folder, temporary)
    remove(temporary)


def remove(path: Path) -> None:
    """Remove a file, a link, a folder with all that is in it, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(what: Path | int) -> None:
    """fsync of a file or folder, by its path or by the descriptor of one that is open."""
    if isinstance(what, int):
        _do(os.fsync, what)
        return
    descriptor = os.open(what, os.O_RDONLY)
    try:
        _do(os.fsync, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def plain_errors(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the system's errors while `path` is written into a RunError of one line. See `atomic_folder`."""
    try:
        yield
    except Exception as error:  # libraries in Rust raise types of their own, with the system's words
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            need = "" if needed is None else f"{needed / 1e6:.1f} MB needed, "
            free = shutil.disk_usage(path.parent).free / 1e6
            raise RunError(f"disk full while writing {path}: {need}{free:.1f} MB free") from error
        if isinstance(error, OSError):
            raise RunError(f"could not write {path}: {error}") from error
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step: renameat2(2) with RENAME_EXCHANGE. False, and nothing done, where it cannot."""
    with suppress(OSError, AttributeError):
        return ctypes.CDLL(None).renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0  # AT_FDCWD is -100
    return False


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{kind}-{final.name}")
