"""What is done about pictures that can't be read: count, list, go on, or stop when they are too many."""

import contextlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from ldm.errors import RunError

_FEW = 100  # examples below which the share of damaged ones says nothing yet


class Damage:
    """Counts pictures that can't be read, lists each once in a report, and stops when they are too many.

    left_out: (name, reason) of what is to be listed at once. A line of the report is {"file", "reason"}. Raises RunError once more than `most` of the pictures tried (of at
    least 100) were damaged. One object a process; all may share the report.
    """

    def __init__(
        self, left_out: Iterable[tuple[str, str]], report: Path, most: float = 0.1, say: Callable[[str], None] = print
    ) -> None:
        self.report, self.most, self.say = report, most, say
        self.seen = self.bad = 0
        self.listed = _listed(report)
        self._list(list(left_out))

    def note(self, examples: int, damaged: Iterable[tuple[str, str]]) -> None:
        """After a batch of so many examples."""
        damaged = list(damaged)
        self.seen += examples + len(damaged)
        self.bad += len(damaged)
        if not damaged:
            return
        self._list(damaged)
        if self.bad > self.most * max(self.seen, _FEW):
            raise RunError(
                f"{self.bad:,} of {self.seen:,} pictures can't be read, more than the share of {self.most:g} that "
                f"--input.max-damaged allows; {self.report} lists them"
            )

    def _list(self, damaged: list[tuple[str, str]]) -> None:
        if all(name in self.listed for name, _ in damaged):
            return
        self.listed |= _listed(self.report)  # other processes write there too
        new = {name: reason for name, reason in damaged if name not in self.listed}
        if new and not self.listed:
            name, reason = next(iter(new.items()))
            self.say(f"can't read {name} ({reason}); another picture stands in. All such are listed in {self.report}")
        self.listed |= set(new)
        lines = "".join(json.dumps({"file": name, "reason": reason}) + "\n" for name, reason in new.items())
        self.report.parent.mkdir(parents=True, exist_ok=True)
        torn = self.report.is_file() and self.report.read_bytes()[-1:] not in (b"", b"\n")  # by a crash
        with open(self.report, "ab") as file:  # appended at once: processes don't mix their lines
            file.write(("\n" * torn + lines).encode())


def _listed(report: Path) -> set[str]:
    """The files in a report, which may be missing, or cut short by a crash."""
    names = set()
    for line in report.read_text(encoding="utf-8").splitlines() if report.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            names.add(json.loads(line)["file"])
    return names
