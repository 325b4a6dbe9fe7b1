"""Files of an untrusted folder: names, sizes, times of change and links; metadata may spell names differently."""

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

from ldm.errors import UserError
from train.data.images.decode import HEIF
from train.data.sources.catalogue import Columns, ignored

_FIRST_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")  # of reading 1
_SUFFIXES = (*_FIRST_SUFFIXES, ".jfif", ".jpe", ".dib", ".apng", *((".heic", ".heif", ".hif") if HEIF else ()))
_REMEDIES = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "'pip install pillow-heif' makes them readable"),
    **dict.fromkeys((".svg", ".svgz"), "convert them to PNG"),
}
_ABOUT = ("readme", "license", "licence", ".md")  # files about the dataset, not in it
_OUTPUTS = (  # files of a run or report
    ("config.yaml", "metrics.jsonl"),
    ("config.yaml", "checkpoints"),
    ("report.json", "samples.png"),
    ("report.json", "contact_sheet.png"),
    ("report.json", "reconstructions.png"),
)
_MOST_KINDS = 8  # kinds of files that a note lists

Stat = tuple[int, int]
"""A file's size in bytes and its time of change in nanoseconds (st_ctime_ns)."""


def suffixes(reading: int) -> tuple[str, ...]:
    """Return the suffixes of images that can be read, in lower case."""
    return _FIRST_SUFFIXES if reading == 1 else _SUFFIXES


class Files:
    """Files of a resolved folder, by their paths in it. Links are resolved only when they are needed."""

    def __init__(self, folder: Path, columns: Columns, root: Path | None = None) -> None:
        """root: folder of the dataset, if this is the folder of a split."""
        self.folder, self.columns, self.root = folder, columns, root or folder
        self.outputs: list[str] = []
        """Folders that this project has written, which aren't read."""
        self.found = dict(scan(folder, columns, self.outputs))
        self.outside: dict[str, str] = {}
        """Real paths of the files outside the folder that are read, by name."""

    def is_image(self, name: str) -> bool:
        return name.lower().endswith(suffixes(self.columns.reading))

    @cached_property
    def images(self) -> list[str]:
        """Names of the images; links to images are among them if their files exist."""
        return [name for name in self.found if self.is_image(name) and self.stat(name)]

    def stat(self, name: str) -> Stat | None:
        """Return a file's size and time; None if there is none. Raises UserError if it is outside the folder."""
        return self.found.get(name) or self._stat_link(name)

    def _stat_link(self, name: str) -> Stat | None:
        real = Path(os.path.realpath(self.folder / name))
        inside = real.is_relative_to(self.folder)
        if not inside and not self.columns.follow_links:
            raise UserError(outside_message(self.folder / name, "file", self.folder))
        try:
            info = real.stat()
        except OSError:
            return None
        if not stat.S_ISREG(info.st_mode):
            return None
        if not inside:
            self.outside[name] = str(real)
        return info.st_size, info.st_ctime_ns

    def find_text(self, name: str) -> str:
        """Return the text file of this name, whatever its upper and lower case and Unicode form; "" if none."""
        return name if name in self.found else self._others.get(_loose(name), "")

    def find_named(self, name: str) -> str:
        """Return the file to which a name in metadata refers.

        The metadata may use another Unicode form, backslashes, or leave out the suffix. Returns the name itself if no
        file fits, or more than one.
        """
        if name in self.found or self.columns.reading == 1:
            return name
        for written in (name, name.replace("\\", "/")):
            found = self._by_form.get(unicodedata.normalize("NFC", written), [])
            found = found or self._by_stem.get(unicodedata.normalize("NFC", written), [])
            if len(found) == 1:
                return found[0]
        return name

    @cached_property
    def _others(self) -> dict[str, str]:
        names = sorted((n for n in self.found if not self.is_image(n)), key=lambda n: _loose(n) == n)
        return {_loose(name): name for name in names}

    @cached_property
    def _by_form(self) -> dict[str, list[str]]:
        return _grouped((unicodedata.normalize("NFC", name), name) for name in self.found)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        images = filter(self.is_image, self.found)
        return _grouped((unicodedata.normalize("NFC", os.path.splitext(name)[0]), name) for name in images)

    def safe_name(self, name: object, where: str, column: str, prefix: str = "") -> str:
        """Check a file name from metadata, and return it as a path in the folder or, with follow_links, outside it.

        prefix: path of the folder that contains the metadata. Raises UserError for other paths.
        """
        if not isinstance(name, str) or not name:
            raise UserError(f"{where}: {column} {str(name)[:80]!r} is not a file name")
        windows = name[0] == "\\" or name[1:2] == ":"
        leads_out = name[0] == "/" or windows or (".." in name and ".." in re.split(r"[/\\]", name))
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise UserError(f"{where}: {column} {name[:200]!r} is not a file name") from None
        if "\0" in name:
            raise UserError(f"{where}: {column} {name[:200]!r} is not a file name")
        if not leads_out:
            return prefix + "/".join(part for part in name.split("/") if part not in ("", "."))
        if not windows and self.columns.reading > 1:
            path = os.path.normpath(self.folder / prefix / name)
            if not Path(path).is_relative_to(self.folder) and Path(os.path.realpath(path)).is_relative_to(self.folder):
                path = os.path.realpath(path)
            inside = Path(path).is_relative_to(self.folder)
            if self.columns.follow_links or (inside and name[0] == "/"):
                return os.path.relpath(path, self.folder) if inside else path
        remedy = "" if windows or self.columns.reading == 1 else ", or set --input.follow-links True"
        raise UserError(f"{where}: {column} {name[:200]!r} is outside the folder; must be a path inside it{remedy}")

    def notes(self, read: Iterable[str]) -> list[str]:
        """Return lines for the user: on files that are read from outside the folder, and on files that aren't read.

        read: names of the metadata and text files that are read.
        """
        lines = []
        if self.outside:
            name, real = next(iter(self.outside.items()))
            count = f"{len(self.outside):,} file{'s' * (len(self.outside) > 1)}"
            lines.append(f"--input.follow-links: reads {count} outside {self.folder}, e.g. {name[-80:]!r} is {real!r}")
        if self.outputs:
            lines.append(
                f"left out: {len(self.outputs):,} folder{'s' * (len(self.outputs) > 1)} in {self.folder} with a run or "
                f"a report of this project, e.g. {min(self.outputs)!r}"
            )
        known = set(read)
        unread = [
            name
            for name in self.found
            if name not in known
            and not self.is_image(name)
            and not name.rpartition("/")[2].lower().startswith(_ABOUT)
            and not name.lower().endswith(_ABOUT)
        ]
        kinds: dict[str, list[str]] = _grouped((os.path.splitext(name)[1].lower() or "other", name) for name in unread)
        ordered = sorted(kinds.items(), key=lambda item: -len(item[1]))
        listed = [
            (repr(names[0][-80:]) if len(names) == 1 else f"{len(names):,} {kind}")
            + (f" ({_REMEDIES[kind]})" if kind in _REMEDIES else "")
            for kind, names in ordered[:_MOST_KINDS]
        ]
        listed += ["others"] if len(ordered) > _MOST_KINDS else []
        return [*lines, f"seen in {self.folder}, but not read: {', '.join(listed)}"] if listed else lines


def outside_message(link: Path, what: str, folder: Path) -> str:
    """Return the error for a link that leads out of a folder."""
    return (
        f"{link!s:.300} is a link to a {what} outside {folder}: copy the {what} into the folder, "
        "or set --input.follow-links True"
    )


def scan(folder: Path, columns: Columns, outputs: list[str] | None = None) -> Iterator[tuple[str, Stat | None]]:
    """Yield (name, (size, changed_ns)) for each file in the folder that isn't hidden, and (name, None) for each link.

    Links to folders are followed only with follow_links, each folder once. Subfolders that this project has written,
    as with `--data X --out X/runs/a`, are left out and added to `outputs`: their images are no part of the dataset.
    """
    pending, visited = [""], set[str]()
    while pending:
        under = pending.pop()
        if columns.follow_links:
            real = os.path.realpath(folder / under)
            if real in visited:
                continue
            visited.add(real)
        if under and columns.reading > 1 and _is_output(folder / under):
            if outputs is not None:
                outputs.append(under.rstrip("/"))
            continue
        with os.scandir(folder / under) as entries:
            for entry in entries:
                if ignored(entry.name, columns.reading):
                    continue
                if entry.is_symlink() and not (columns.follow_links and entry.is_dir()):
                    yield under + entry.name, None
                elif entry.is_dir():
                    pending.append(f"{under}{entry.name}/")
                elif entry.is_file():
                    info = entry.stat()
                    yield under + entry.name, (info.st_size, info.st_ctime_ns)


def _is_output(folder: Path) -> bool:
    """Return whether a folder contains a run or a report of this project."""
    return any(all(os.path.lexists(folder / name) for name in names) for names in _OUTPUTS)


def by_kind(names: Iterable[str]) -> str:
    """Return the numbers of files by suffix: "12 .png, 3 .jpg"."""
    counts = Counter(os.path.splitext(name)[1].lower() for name in names)
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())


def _loose(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return unicodedata.normalize("NFC", stem) + suffix.lower()


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
