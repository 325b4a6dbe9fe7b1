"""Handling of images that can't be read: count them, list them, and stop if there are too many."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import RunError

_FEW = 100  # below this number of examples, the share of damaged ones isn't meaningful


class Damage:
    """Counter of images that can't be read. It lists each once in a report, and stops if there are too many.

    A line of the report is {"file", "reason"}. Each process has its own counter; all may share the report.
    """

    def __init__(self, report: Path, most: float = 0.1, say: Callable[[str], None] = print) -> None:
        """most: largest accepted share of damaged images."""
        self.report, self.most, self.say = report, most, say
        self.seen = self.bad = 0
        self.listed = _listed(report)

    def note(self, readable: int, damaged: Iterable[tuple[str, str]], *, whole: bool = False) -> None:
        """Count `readable` images that were read, and the (name, reason) of those that weren't.

        whole: these are all the images of the dataset. Raises RunError if too many are damaged: if whole, more than
        the accepted share; else, more than chance would explain.
        """
        damaged = list(damaged)
        self.seen += readable + len(damaged)
        self.bad += len(damaged)
        if not damaged:
            return
        self.list(damaged, "can't read", "; another image stands in")
        expected = self.most * (self.seen if whole else max(self.seen, _FEW))
        if self.bad > expected + (0 if whole else 3 * math.sqrt(expected)):
            raise RunError(
                f"{self.bad:,} of {self.seen:,} images can't be read, more than the share of {self.most:g} that "
                f"--input.max-damaged allows; {self.report} lists them"
            )

    def list(self, found: Iterable[tuple[str, str]], what: str = "left out", then: str = "") -> None:
        """Add each (name, reason) that is new to the report, and print the first."""
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
        torn = self.report.is_file() and self.report.read_bytes()[-1:] not in (b"", b"\n")  # a crash cut the last line
        with open(self.report, "ab") as file:  # appended at once, so that processes don't mix their lines
            file.write(("\n" * torn + lines).encode())


@dataclass(frozen=True)
class DamageReport:
    """Report of images that can't be read, with a counter for each source."""

    path: Path
    most: float
    """Largest accepted share of a source's damaged images."""
    say: Callable[[str], None]
    main: bool = True
    """Whether this process lists what sources leave out."""

    def of(self, left_out: Iterable[tuple[str, str]]) -> Damage:
        """Return a counter for a source, which itself left out these (name, reason)."""
        damage = Damage(self.path, self.most, self.say)
        if self.main:
            damage.list(left_out)
        return damage


def _listed(report: Path) -> set[str]:
    """Return the files in a report, which may be missing or cut short by a crash."""
    names = set()
    for line in report.read_text(encoding="utf-8").splitlines() if report.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            names.add(json.loads(line)["file"])
    return names
