"""The output streams of a command, on which foreign text can't control the terminal."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import TextIOWrapper
from typing import Any, TextIO

from ldm.errors import is_printable, printable

_BAR = re.compile(
    r"\r|(?:\n|\x1b\[A)*"
)  # a progress bar's return to the start of its line, or its move to another line


class PrintableStream:
    """Stream that writes text as `printable` returns it. Only progress bars may move the cursor."""

    def __init__(self, unescaped: TextIO) -> None:
        self.unescaped = unescaped

    def write(self, text: str) -> int:
        """Write text, and return its length."""
        moves = _BAR.match(text)[0]  # type: ignore[index]  # matches any text
        self.unescaped.write(moves + printable(text[len(moves) :]))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def make_printable() -> None:
    """Let standard output and standard error write any text safely, here and in processes that are started here.

    Characters that the terminal's encoding doesn't have become escapes. Without this, printing one of them may end a
    command.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and not isinstance(stream, PrintableStream):
            setattr(sys, name, PrintableStream(stream))
    encoding = os.environ.get("PYTHONIOENCODING", "").partition(":")[0]
    os.environ["PYTHONIOENCODING"] = f"{encoding}:backslashreplace"


def unescaped(text: str) -> TextIO:
    """Return the stream that writes this text to standard output unchanged, also long lines, if it is printable."""
    stream = sys.stdout
    return stream.unescaped if isinstance(stream, PrintableStream) and is_printable(text) else stream


_LISTENERS: list[Callable[[str], None]] = []


def warn(line: str) -> None:
    """Print a warning to standard error, and pass it to the listeners."""
    print(f"warning: {line}", file=sys.stderr)
    for listener in tuple(_LISTENERS):
        listener(line)


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Call a function with each warning of this process."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


@contextmanager
def help_output(quoted: str) -> Iterator[None]:
    """Let `--help` write with colours, unless it quotes text that isn't printable."""
    stream = unescaped(quoted)
    if isinstance(stream, PrintableStream):
        os.environ["TERM"] = "dumb"  # no colours, because they would be escaped
    with redirect_stdout(stream):
        yield
