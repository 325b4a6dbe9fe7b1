"""Files and folders that are either complete or missing.

Content is written beside its final place under a name that begins with a dot, synchronised, and renamed; then the
parent folder is synchronised. A process that is killed at any moment leaves the old content or the new. All fsyncs of
the project are here. All renames are here too, except that of a single-file model.
"""

import ctypes
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import RunError, UserError

_FULL = re.compile(r"No space left|^\d+ requested and \d+ written$")  # NumPy's message has no errno


def _do(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function. All fsyncs, renames and writes of `write_new` go through here, so that tests can stop there."""
    return call(*arguments)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing. On success it replaces `path`; on failure it is removed.

    Raises RunError with one line for a full disk and for any other OSError; `path` is then unchanged.
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


def write_text(path: Path, text: str) -> None:
    """Write a text file as `atomic_file` does."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(final: Path, *, needed: int | None = None) -> Iterator[Path]:
    """Create an empty folder beside `final` for writing. On success it replaces `final`; on failure it is removed.

    needed: bytes, for the message if the disk is full. Raises RunError with one line for a full disk and for any other
    OSError; `final` is then unchanged.
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
        sync(final.parent.parent)  # the parent may be new in it
        remove(temporary)  # the previous content, now under one of these two names
        remove(aside)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Create a folder for writing that becomes `final`, which must be missing or empty. There is no fsync.

    For many files that are easily made again. Raises UserError if the folder can't be created, and RunError with one
    line for a full disk and for any other OSError.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-")
    except OSError as error:
        raise UserError(f"can't create a folder in {final.parent}: {error.strerror}") from error
    with temporary as folder, plain_errors(final):
        content = Path(folder, "content")
        content.mkdir()
        yield content
        _do(os.rename, content, final)


def write_new(path: Path, parts: Iterable[Any]) -> dict[str, str | int]:
    """Write bytes-like parts to a new file, without fsync. Returns SHA-256 and size of the intended content."""
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
    """Replace the folder `final` with `new`, without fsync. The previous content is then at `new` or `.old-…`.

    On Linux this is one step, an exchange of names. Elsewhere `final` is missing for a moment, which `recover` repairs.
    """
    if not os.path.lexists(final):
        _do(os.rename, new, final)
    elif not _do(_exchange, new, final):
        remove(_beside(final, "old"))
        _do(os.rename, final, _beside(final, "old"))
        _do(os.rename, new, final)


def recover(final: Path) -> None:
    """Restore `final` if a process ended during `_replace_folder` while it was missing."""
    if not os.path.lexists(final):
        with suppress(FileNotFoundError):
            _do(os.rename, _beside(final, "old"), final)


def recover_all(folder: Path, pattern: str) -> None:
    """Call `recover` for all matching names in a folder."""
    for aside in folder.glob(f".old-{pattern}"):
        recover(folder / aside.name.removeprefix(".old-"))


def clean_up(folder: Path) -> None:
    """Complete or remove what killed processes left in a folder that no other process writes to."""
    recover_all(folder, "*")
    sweep(folder, "*")


def sweep(folder: Path, pattern: str) -> None:
    """Remove the leftovers of killed processes for all matching names in a folder."""
    for leftover in (*folder.glob(f".tmp-{pattern}"), *folder.glob(f".old-{pattern}")):
        remove(leftover)


def retire(folder: Path) -> None:
    """Remove a folder; rename it first, so that a half-removed one is never found."""
    temporary = _beside(folder, "tmp")
    _do(os.rename, folder, temporary)
    remove(temporary)


def rename(old: Path, new: Path) -> None:
    """Rename a file or folder within its parent folder."""
    _do(os.rename, old, new)
    sync(new.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(what: Path | int) -> None:
    """Call fsync on a file or folder, given by path or by open descriptor."""
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
    """Convert system errors while `path` is written into a RunError of one line. See `atomic_folder`."""
    try:
        yield
    except Exception as error:  # libraries in Rust raise their own types, with the system's message
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error)):
            need = "" if needed is None else f"{needed / 1e6:.1f} MB needed, "
            free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free / 1e6
            raise RunError(f"disk full while writing {path}: {need}{free:.1f} MB free") from error
        if isinstance(error, OSError) or "(os error " in str(error):
            raise RunError(f"{path} can't be written: {error}") from error
        raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step: renameat2(2) with RENAME_EXCHANGE. Returns False, without effect, if unsupported."""
    with suppress(OSError, AttributeError):
        return ctypes.CDLL(None).renameat2(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0  # AT_FDCWD is -100
    return False


def _beside(final: Path, kind: str) -> Path:
    return final.with_name(f".{kind}-{final.name}")
