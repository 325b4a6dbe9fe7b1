"""Unreadable images: they are counted and listed, and training stops if there are too many."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import RunError
from ldm.files import read_regular
from train.data.images.decode import DamagedImage, load_image
from train.data.sources.splits import Source
from train.data.store.atomic import atomic_file, plain_errors
from train.data.store.lines import read_lines

_MOST_READ = 1000  # images of a report that are read again when a run starts
_FEWEST = 100  # with fewer examples, the share of unreadable ones isn't meaningful


class UnreadableCounter:
    """Counter of unreadable images, which lists each once in a report and raises RunError if there are too many.

    A line of the report is {"file", "reason"}. Each process has its own counter; all may share the report.
    """

    def __init__(
        self,
        report: Path,
        limit: float = 0.1,
        print: Callable[[str], object] = print,
        total: int | None = None,
    ) -> None:
        """limit: largest accepted share of unreadable images. total: images of the dataset; None: not known."""
        self.report, self.limit, self.print, self.total = report, limit, print, total
        self.reads = self.failures = 0
        self.names: set[str] = set()
        self.listed = _listed(report)

    @property
    def images(self) -> int:
        """Number of images that were read, each counted once if the size of the dataset is known."""
        return self.reads if self.total is None else min(self.reads, self.total)

    @property
    def unreadable(self) -> int:
        """Number of these that are unreadable."""
        return self.failures if self.total is None else len(self.names)

    def count(self, readable: int, unreadable: Iterable[tuple[str, str]], *, complete: bool = False) -> None:
        """Count images: `readable` of them were read, and `unreadable` has the (name, reason) of each that wasn't.

        complete: these are all the images of the dataset, not a sample of them. Raises RunError if the unreadable
        images exceed the accepted share of all images; or, by three standard deviations, that of the images read so
        far.
        """
        unreadable = list(unreadable)
        self.reads += readable + len(unreadable)
        self.failures += len(unreadable)
        self.names.update(name for name, _ in unreadable)
        if not unreadable:
            return
        self.add_to_report(unreadable, "can't be read; another image is used instead")
        all_images = self.images if complete else self.total
        expected = self.limit * max(self.images, _FEWEST)
        too_many = self.unreadable > expected + 3 * math.sqrt(expected)
        if too_many or (all_images is not None and self.unreadable > self.limit * all_images):
            raise RunError(
                f"{self.unreadable:,} of {self.images:,} images can't be read, but --input.max-damaged {self.limit:g} "
                f"limits their share: run the same command again with a higher limit; or repair or remove the images "
                f"listed in {self.report}, and add --resume-with-changes"
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
        incomplete = self.report.is_file() and read_regular(self.report, 2**31)[-1:] not in (b"", b"\n")  # a crash
        with plain_errors(self.report), open(self.report, "ab") as file:
            # In one write, so that processes don't mix their lines.
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

    def remove_repaired(self, sources: Iterable[Source], max_pixels: int) -> None:
        """Remove images from the report that can be read now, and those that the dataset no longer has.

        A report of many images stays as it is, because reading them would take long.
        """
        listed = _listed(self.path)
        if not (self.main and 0 < len(listed) <= _MOST_READ):
            return
        kept = set[str]()
        for source in sources:
            kept |= {name for name, _ in source.left_out}
            for k, row in enumerate(source):
                if row.name in listed and not _readable(source, k, max_pixels):
                    kept.add(row.name)
        if not listed <= kept:
            lines = [line for line in read_lines(self.path) if _file_of(line) in kept]
            with atomic_file(self.path) as file:
                file.write(b"".join(line + b"\n" for line in lines))

    def counter(self, left_out: Iterable[tuple[str, str]], total: int | None = None) -> UnreadableCounter:
        """Return a counter for a source. left_out: (name, reason) of what the source leaves out.

        total: number of the source's images; None: not known.
        """
        counter = UnreadableCounter(self.path, self.limit, self.print, total)
        if self.main:
            counter.add_to_report(left_out)
        return counter


def _listed(report: Path) -> set[str]:
    """Return the files listed in a report, which may be missing, or incomplete after a crash."""
    return {_file_of(line) for line in read_lines(report)} - {""}


def _file_of(line: bytes) -> str:
    """Return the file of a line; "" if it isn't a line of ours."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        if isinstance(name := json.loads(line)["file"], str):
            return name
    return ""


def _readable(source: Source, k: int, max_pixels: int) -> bool:
    try:
        load_image(source.read(k), max_pixels=max_pixels)
    except (DamagedImage, OSError):
        return False
    return True
