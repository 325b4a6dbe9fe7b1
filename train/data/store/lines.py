"""Read a file of lines that a process may have been writing when it ended, and that somebody may have changed."""

from pathlib import Path

from ldm.errors import UserError
from ldm.files import read_regular

_LARGEST = 2**31


def read_lines(path: Path) -> list[bytes]:
    """Return the lines of a file; none if there is no file. Raises UserError if it can't be read."""
    try:
        content = read_regular(path, _LARGEST)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; move it away, or repair it") from None
    return content.removesuffix(b"\n").split(b"\n") if content else []
