"""Unreadable images: they are counted and listed, and training stops if there are too many."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import RunError

_FEWEST = 100  # with fewer examples, the share of unreadable ones isn't meaningful


class UnreadableCounter:
    """Counter of unreadable images, which lists each once in a report and raises RunError if there are too many.

    A line of the report is {"file", "reason"}. Each process has its own counter; all may share the report.
    """

    def __init__(self, report: Path, limit: float = 0.1, print: Callable[[str], object] = print) -> None:
        """limit: largest accepted share of unreadable images."""
        self.report, self.limit, self.print = report, limit, print
        self.images = self.unreadable = 0
        self.listed = _listed(report)

    def count(self, readable: int, unreadable: Iterable[tuple[str, str]], *, complete: bool = False) -> None:
        """Count `readable` images that were read, and those that couldn't be: their (name, reason).

        complete: these are all the images of the dataset, not a sample of them. Raises RunError if the unreadable
        images exceed the accepted share; for a sample, only if they exceed it by three standard deviations.
        """
        unreadable = list(unreadable)
        self.images += readable + len(unreadable)
        self.unreadable += len(unreadable)
        if not unreadable:
            return
        self.add_to_report(unreadable, "can't be read; another image is used instead")
        expected = self.limit * (self.images if complete else max(self.images, _FEWEST))
        if self.unreadable > expected + (0 if complete else 3 * math.sqrt(expected)):
            raise RunError(
                f"{self.unreadable:,} of {self.images:,} images can't be read, but --input.max-damaged {self.limit:g} "
                f"limits their share: replace or remove the images listed in {self.report}, or raise the limit"
            )

    def add_to_report(self, entries: Iterable[tuple[str, str]], consequence: str = "is left out") -> None:
        """Add each new (name, reason) to the report, and print the first one with the consequence."""
        entries = list(entries)
        if all(name in self.listed for name, _ in entries):
            return
        self.listed |= _listed(self.report)  # other processes write to the report too
        new = {name: reason for name, reason in entries if name not in self.listed}
        if new and not self.listed:
            name, reason = next(iter(new.items()))
            self.print(f"{name!r} {consequence} ({reason}). All such images are listed in {self.report}")
        self.listed |= set(new)
        lines = "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in new.items())
        self.report.parent.mkdir(parents=True, exist_ok=True)
        incomplete = self.report.is_file() and self.report.read_bytes()[-1:] not in (b"", b"\n")  # after a crash
        with open(self.report, "ab") as file:  # in one write, so that processes don't mix their lines
            file.write(("\n" * incomplete + lines).encode())


@dataclass(frozen=True)
class UnreadableReport:
    """Report of unreadable images, with a counter for each source."""

    path: Path
    limit: float
    """Largest accepted share of a source's unreadable images."""
    print: Callable[[str], object]
    main: bool = True
    """Whether this process lists what sources leave out."""

    def counter(self, left_out: Iterable[tuple[str, str]]) -> UnreadableCounter:
        """Return a counter for a source. left_out: (name, reason) of what the source leaves out."""
        counter = UnreadableCounter(self.path, self.limit, self.print)
        if self.main:
            counter.add_to_report(left_out)
        return counter


def _listed(report: Path) -> set[str]:
    """Return the files listed in a report, which may be missing, or incomplete after a crash."""
    names = set()
    for line in report.read_text(encoding="utf-8").splitlines() if report.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            names.add(json.loads(line)["file"])
    return names
