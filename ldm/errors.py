"""The two errors that end a command, each of which a script prints as one plain line; and how foreign text is printed.

Captions, file names, keys of archives and configurations may contain anything. `printable` is the one place that makes
such text safe to print; the streams of all commands use it (train/output.py).
"""

import re

_LONGEST_MESSAGE, _LONGEST_LINE = 2000, 5000
# Control characters, except for tab and line break; marks that reorder text; line separators; halves of characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Invalid input. The message quotes the value and what is accepted. Scripts print it and exit with status 2."""


class RunError(RuntimeError):
    """Failure while running (disk full, diverged). Scripts print it and exit with status 1."""


def one_line(message: object, max_length: int = _LONGEST_MESSAGE) -> str:
    """Return a message on one line of at most `max_length` printable characters. An empty error gives its class."""
    line = printable(" ".join(str(message).split()), max_length)
    return line or (type(message).__name__ if isinstance(message, BaseException) else "")


def printable(text: str, max_length: int = _LONGEST_LINE) -> str:
    """Return text with control characters as escapes, so that it can't control a terminal or reorder other text.

    The middle of a line of more than `max_length` characters is left out.
    """
    return "\n".join(_cut(_UNPRINTABLE.sub(_escape, line), max_length) for line in text.split("\n"))


def is_printable(text: str) -> bool:
    """Return whether `printable` changes nothing but the length of text."""
    return _UNPRINTABLE.search(text) is None


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def _cut(line: str, length: int) -> str:
    if len(line) <= length:
        return line
    mark = f" … ({len(line):,} characters) … "
    kept = max(0, length - len(mark))
    return line[: kept - kept // 4] + mark + line[len(line) - kept // 4 :]
