"""The two ways a command ends badly, so that a script can say each in one plain line."""


class UserError(ValueError):
    """Bad input: names the value and says what would be accepted. Scripts print it and exit with status 2."""


class RunError(RuntimeError):
    """A failure while running (disk full, diverged). Scripts print it and exit with status 1."""
