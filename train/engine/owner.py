"""The process that trains in a folder: who it is, and whether it still runs.

A process number alone isn't enough, because systems use numbers again; so the time at which the process started is
part of the identity.
"""

import json
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter

from ldm.files import read_regular


@dataclass(frozen=True)
class Owner:
    """Identity of a process."""

    pid: int
    started: str
    """Start of the process, in the system's own unit."""
    host: str
    """Name of the machine."""

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the identity of a running process of this machine."""
        return cls(pid, _state(pid)[1], platform.node())

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the process whose identity is in a file; None if the file is missing or has other content."""
        with suppress(OSError, ValueError, RecursionError):
            return TypeAdapter(cls).validate_python(json.loads(read_regular(path, 2**16)))
        return None

    def text(self) -> str:
        """Return the content of a file for `read`."""
        return json.dumps(asdict(self)) + "\n"

    @property
    def runs(self) -> bool:
        """Whether the process still runs, on this machine. Of other machines' processes, nothing is known."""
        if self.host != platform.node() or self.pid <= 0 or not self.started:
            return False
        state, started = _state(self.pid)
        return started == self.started and state != "Z"  # a zombie has ended

    def has_open(self, path: Path) -> bool | None:
        """Return whether the process has this file open; None if this user may not see its files."""
        try:
            wanted = path.stat()
            if not Path("/proc/self").exists():
                return _named_by_lsof(self.pid, path)
            return any(_is_same(entry.path, wanted) for entry in os.scandir(f"/proc/{self.pid}/fd"))
        except PermissionError:
            return None
        except OSError:
            return False


def _is_same(path: str, wanted: os.stat_result) -> bool:
    with suppress(OSError):  # closed since then
        return os.path.samestat(os.stat(path), wanted)
    return False


def _named_by_lsof(pid: int, path: Path) -> bool | None:
    with suppress(OSError, subprocess.TimeoutExpired):
        shown = subprocess.run(["lsof", "-a", "-p", str(pid), "-F", "n"], capture_output=True, text=True, timeout=5)
        return f"n{path.resolve()}" in shown.stdout.splitlines()
    return None


def _state(pid: int) -> tuple[str, str]:
    """Return the state of a process, as one letter, and its start; empty texts if there is none."""
    proc = Path("/proc", str(pid), "stat")
    with suppress(OSError, ValueError, IndexError):
        if Path("/proc/self").exists():
            fields = proc.read_text().rpartition(")")[2].split()  # the name before it may contain anything
            return fields[0], fields[19]
        words = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
        shown = subprocess.run(words, capture_output=True, text=True, timeout=5, env=os.environ | {"LC_ALL": "C"})
        state, _, started = shown.stdout.strip().partition(" ")
        return state[:1], started.strip()
    return "", ""
