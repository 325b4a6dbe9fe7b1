"""What is done about pictures that can't be read: count, list, go on, or stop when they are too many."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import RunError

_FEW = 100  # examples below which the share of damaged ones says nothing yet


class Damage:
    """Counts pictures that can't be read, lists each once in a report, and stops when they are too many.

    A line of the report is {"file", "reason"}. One object a process; all may share the report.
    """

    def __init__(self, report: Path, most: float = 0.1, say: Callable[[str], None] = print) -> None:
        """most: the share of pictures that may be damaged."""
        self.report, self.most, self.say = report, most, say
        self.seen = self.bad = 0
        self.listed = _listed(report)

    def note(self, readable: int, damaged: Iterable[tuple[str, str]], *, whole: bool = False) -> None:
        """So many pictures were read, and these (name, reason) weren't. whole: these are all the pictures there are.

        Raises RunError when too many are damaged: of all more than their share, of some more than chance would explain.
        """
        damaged = list(damaged)
        self.seen += readable + len(damaged)
        self.bad += len(damaged)
        if not damaged:
            return
        self.list(damaged, "can't read", "; another picture stands in")
        expected = self.most * (self.seen if whole else max(self.seen, _FEW))
        if self.bad > expected + (0 if whole else 3 * math.sqrt(expected)):
            raise RunError(
                f"{self.bad:,} of {self.seen:,} pictures can't be read, more than the share of {self.most:g} that "
                f"--input.max-damaged allows; {self.report} lists them"
            )

    def list(self, found: Iterable[tuple[str, str]], what: str = "left out", then: str = "") -> None:
        """Add (name, reason) to the report, those that aren't there yet, and say the first."""
        found = list(found)
        if all(name in self.listed for name, _ in found):
            return
        self.listed |= _listed(self.report)  # other processes write there too
        new = {name: reason for name, reason in found if name not in self.listed}
        if new and not self.listed:
            name, reason = next(iter(new.items()))
            self.say(f"{what} {name!r} ({reason}){then}. All such are listed in {self.report}")
        self.listed |= set(new)
        lines = "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in new.items())
        self.report.parent.mkdir(parents=True, exist_ok=True)
        torn = self.report.is_file() and self.report.read_bytes()[-1:] not in (b"", b"\n")  # by a crash
        with open(self.report, "ab") as file:  # appended at once: processes don't mix their lines
            file.write(("\n" * torn + lines).encode())


@dataclass(frozen=True)
class DamageReport:
    """A report of pictures that can't be read, with a count for each source."""

    path: Path
    most: float
    """The share of a source's pictures that may be damaged."""
    say: Callable[[str], None]
    main: bool = True
    """Whether this process lists what sources leave out."""

    def of(self, left_out: Iterable[tuple[str, str]]) -> Damage:
        """A count for a source, which left out these (name, reason) itself."""
        damage = Damage(self.path, self.most, self.say)
        if self.main:
            damage.list(left_out)
        return damage


def _listed(report: Path) -> set[str]:
    """The files in a report, which may be missing, or cut short by a crash."""
    names = set()
    for line in report.read_text(encoding="utf-8").splitlines() if report.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            names.add(json.loads(line)["file"])
    return names
