"""The two errors that end a command, each of which a script prints as one plain line."""


class UserError(ValueError):
    """Invalid input. The message quotes the value and what is accepted. Scripts print it and exit with status 2."""


class RunError(RuntimeError):
    """Failure while running (disk full, diverged). Scripts print it and exit with status 1."""


def one_line(said: object, most: int | None = None) -> str:
    """Return a message on one line, cut to `most` characters, or the error's class name if the message is empty."""
    line = " ".join(str(said).split())[:most]
    return line or (type(said).__name__ if isinstance(said, BaseException) else "")
