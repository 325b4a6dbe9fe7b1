"""The two errors that end a command, each of which a script prints as one plain line."""


class UserError(ValueError):
    """Invalid input. The message quotes the value and what is accepted. Scripts print it and exit with status 2."""


class RunError(RuntimeError):
    """Failure while running (disk full, diverged). Scripts print it and exit with status 1."""


def one_line(message: object, most: int | None = None) -> str:
    """Return a message on one line, cut to `most` characters, or the error's class name if the message is empty."""
    line = " ".join(str(message).split())[:most]
    return line or (type(message).__name__ if isinstance(message, BaseException) else "")
