"""Reading of files that others made: only regular files, up to a limit, so that reading always ends."""

import errno
import io
import json
import os
import select
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

LARGEST_TEXT = 2**24
"""Largest accepted size of a file of settings, of prompts or of a tokenizer, in bytes."""
_MOST_LAYERS, _MOST_ENTRIES, _LARGEST_NUMBER = 1000, 1000, 2**20
_AT_ONCE = 2**14  # bytes; files that grow, or don't state a size, take several reads
_PIPE_SECONDS = 10.0  # longest wait for a pipe's next bytes


def open_regular(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading. Raises OSError for anything else, e.g. a pipe, which might never end."""
    descriptor = _open(path)
    try:
        _require_regular(descriptor, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, limit: int = LARGEST_TEXT, *, pipe: bool = False) -> bytes:
    """Return the content of a regular file of up to `limit` bytes. Raises OSError for anything else.

    pipe: accept the output of another command too, e.g. from the shell's <(…), if it arrives without long pauses.
    """
    descriptor = _open(path)
    try:
        if pipe and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return _read_pipe(descriptor, path, limit)
        size = _require_regular(descriptor, path)
        parts, left = [], limit + 1 if size <= limit else 0
        while part := os.read(descriptor, min(left, max(size + 1, _AT_ONCE))):  # memory for the file, not for the limit
            parts.append(part)
            left -= len(part)
        content = b"".join(parts)
        if max(size, len(content)) > limit:
            raise OSError(errno.EFBIG, f"it has {max(size, len(content)):,} bytes; up to {limit:,} are accepted", path)
        return content
    finally:
        os.close(descriptor)


def read_json(path: str | Path, limit: int = LARGEST_TEXT) -> dict[str, Any]:
    """Return the object in a JSON file. Raises OSError, or ValueError if it contains something else."""
    try:
        value = json.loads(read_regular(path, limit))
    except RecursionError:
        raise ValueError("it isn't JSON: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, but is a {type(value).__name__}")
    return value


def require_plausible(config: Any, name: str = "config.json") -> None:
    """Raise ValueError if a network's configuration has a number beyond any use, which would fill the memory or hang.

    config: its JSON content, or a part of it. name: the part, for the message.
    """
    match config:
        case dict():
            for key, value in config.items():
                require_plausible(value, str(key))
        case list():
            if len(config) > _MOST_ENTRIES:
                raise ValueError(f"{name} has {len(config):,} entries; up to {_MOST_ENTRIES:,} are accepted")
            for value in config:
                require_plausible(value, name)
        case int():
            most = _MOST_LAYERS if "layers" in name else _LARGEST_NUMBER
            if abs(config) > most:
                raise ValueError(f"{name} {str(config)[:30]}: up to {most:,} is accepted")


def _open(path: str | Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe doesn't wait
    except ValueError:
        raise OSError(errno.EINVAL, "its name contains a NUL character", str(path)) from None


def _require_regular(descriptor: int, path: str | Path) -> int:
    """Return the size of an open file. Raises OSError if it isn't a regular file."""
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a regular file", path)
    return status.st_size


def _read_pipe(descriptor: int, path: str | Path, limit: int) -> bytes:
    """Return all that is written to a pipe. Raises OSError if nothing arrives for a while, or too much arrives."""
    content, wait = b"", select.poll()
    wait.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + _PIPE_SECONDS
    while len(content) <= limit:
        # Without a writer, a pipe is at its end at once; before the first bytes, the writer may not have opened it yet.
        if not wait.poll(max(0, 1000 * (deadline - time.monotonic()))) or time.monotonic() > deadline:
            raise OSError(errno.ETIME, f"it is a pipe to which nothing was written for {_PIPE_SECONDS:g} s", path)
        part = b""
        with suppress(BlockingIOError):
            part = os.read(descriptor, 2**16)
            if not part and content:
                return content
        if part:
            content, deadline = content + part, time.monotonic() + _PIPE_SECONDS
        else:
            time.sleep(0.01)
    raise OSError(errno.EFBIG, f"more than {limit:,} bytes arrive from this pipe", path)
