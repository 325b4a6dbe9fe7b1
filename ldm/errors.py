"""The two ways a command ends badly, so that a script can say each in one plain line."""


class UserError(ValueError):
    """Bad input: names the value and says what would be accepted. Scripts print it and exit with status 2."""


class RunError(RuntimeError):
    """A failure while running (disk full, diverged). Scripts print it and exit with status 1."""


def one_line(said: object, most: int | None = None) -> str:
    """What an error or a library says, without line breaks, cut to `most` characters; the error's kind if it says nothing."""
    line = " ".join(str(said).split())[:most]
    return line or (type(said).__name__ if isinstance(said, BaseException) else "")
