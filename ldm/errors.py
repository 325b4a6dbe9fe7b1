"""The two errors that end a command, each of which a script prints as one plain line."""


class UserError(ValueError):
    """Invalid input. The message quotes the value and what is accepted. Scripts print it and exit with status 2."""


class RunError(RuntimeError):
    """Failure while running (disk full, diverged). Scripts print it and exit with status 1."""


def one_line(message: object, max_length: int | None = None) -> str:
    """Return a message on one line, truncated to `max_length` characters. An empty error gives its class name."""
    line = " ".join(str(message).split())[:max_length]
    return line or (type(message).__name__ if isinstance(message, BaseException) else "")
