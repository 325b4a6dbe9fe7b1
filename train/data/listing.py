"""The pictures and captions that a folder lists, read with suspicion.

Nothing is opened but metadata.jsonl, metadata.csv and .txt files. What a row names must lie inside the folder, links
followed; so must every link to a picture or a .txt.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ldm.errors import UserError

_METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTIONS = ("text", "caption")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Row(NamedTuple):
    """A picture as listed: its path inside the folder with "/" between, and what the file system says of it."""

    name: str
    size: int
    mtime_ns: int
    captions: tuple[str, ...]


def list_pictures(folder: Path, image_column: str, caption_column: str, captioned: bool) -> tuple[list[Row], list[str]]:
    """The rows of a folder, and the names of files that its metadata names and that aren't there.

    folder: resolved. Several rows of one picture are its captions. Raises UserError as `open_source` does.
    """
    metadata = find_metadata(folder)
    if metadata is None:
        return _list_texts(folder, captioned), []
    captions: dict[str, list[str]] = {}
    for name, texts in _read_metadata(metadata, image_column, caption_column, captioned):
        captions.setdefault(name, []).extend(texts)
    if not captions:
        raise UserError(f"{metadata} has no rows: a row a picture is expected, with {image_column!r} and a caption")
    files = dict(_scan(folder))
    rows, missing = [], []
    for name, texts in captions.items():
        found = files.get(name) or _look(folder, name)
        if found is None:
            missing.append(name)
        else:
            rows.append(Row(name, *found, tuple(t for t in texts if t) or ("",)))
    if not rows:
        named = f"none of the {len(missing):,} files that {metadata} names"
        raise UserError(f"{named} is in {folder}, e.g. {missing[0][:200]!r}")
    return rows, missing


def _list_texts(folder: Path, captioned: bool) -> list[Row]:
    """Pictures with a .txt beside them."""
    files = {name: found or _look(folder, name) for name, found in _scan(folder)}
    names = [name for name, found in files.items() if found and name.lower().endswith(_SUFFIXES)]
    looked_for = "metadata.jsonl, metadata.csv, or a .txt beside each picture"
    if not names:
        raise UserError(f"no pictures in {folder}: looked for {looked_for} ({', '.join(s[1:] for s in _SUFFIXES)})")
    beside = {name: f"{os.path.splitext(name)[0]}.txt" for name in names}
    if captioned and not any(files.get(text) for text in beside.values()):
        raise UserError(f"{folder} has {len(names):,} pictures but no captions: looked for {looked_for}")
    rows = []
    for name in names:
        lines = _read(folder / beside[name]).splitlines() if files.get(beside[name]) else []
        rows.append(Row(name, *(files[name] or (0, 0)), tuple(filter(None, map(str.strip, lines))) or ("",)))
    return rows


def find_metadata(folder: Path) -> Path | None:
    """The folder's metadata file, if it has one."""
    for name in _METADATA:
        if (folder / name).is_file():
            if not (path := Path(os.path.realpath(folder / name))).is_relative_to(folder):
                raise UserError(f"{folder / name} is a link that leads out of {folder}: copy the file into it")
            return path
    return None


def _read_metadata(
    path: Path, image_column: str, caption_column: str, captioned: bool
) -> Iterator[tuple[str, list[str]]]:
    """Each row's file name and captions."""
    column: str | None = None
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}, row {number}"
        if number == 1:
            wanted = (caption_column,) if caption_column else _CAPTIONS
            column = next((c for c in wanted if c in row), None)
            absent = [image_column] if image_column not in row else []
            absent += [" or ".join(wanted)] if captioned and column is None else []
            if absent:
                raise UserError(f"{where} has no column {', '.join(absent)}; it has: {', '.join(map(str, row))[:300]}")
        yield _safe_name(row.get(image_column), where, image_column), _captions(row.get(column or ""), where)


def _captions(value: Any, where: str) -> list[str]:
    texts = value if isinstance(value, list) else ["" if value is None else value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: caption {str(value)[:80]!r} is not text (nor a list of texts)")
    return [text.encode(errors="replace").decode().strip() for text in texts]


def _safe_name(name: Any, where: str, column: str) -> str:
    """A path inside the folder, written one way."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: {column} {str(name)[:80]!r} is not a file name")
    rooted = name[0] in "/\\" or name[1:2] == ":"  # on POSIX or on Windows
    if rooted or "\0" in name or (".." in name and ".." in re.split(r"[/\\]", name)):
        raise UserError(f"{where}: {column} {name[:200]!r} leads out of the folder; names inside it are accepted")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise UserError(f"{where}: {column} {name[:200]!r} is not a file name") from None
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as lines:
            if path.suffix == ".csv":
                for number, row in enumerate(csv.DictReader(lines), 1):  # noqa: B007  told below
                    yield row
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise UserError(f"{path}, line {number} holds a {type(row).__name__}, not an object of columns")
                    yield row
    except UserError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} can't be read near line {number}: {error}") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def _scan(folder: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Name inside the folder → (size, mtime_ns) of each file; None for links, which aren't followed. No hidden ones."""
    pending = [""]
    while pending:
        under = pending.pop()
        with os.scandir(folder / under) as entries:
            for entry in entries:
                if entry.name.startswith((".", "__MACOSX")):
                    continue
                if entry.is_symlink():
                    yield under + entry.name, None
                elif entry.is_dir():
                    pending.append(f"{under}{entry.name}/")
                elif entry.is_file():
                    about = entry.stat()
                    yield under + entry.name, (about.st_size, about.st_mtime_ns)


def _look(folder: Path, name: str) -> tuple[int, int] | None:
    """(size, mtime_ns) of a file that is a link or beyond one; None if there is no such file."""
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(folder):
        raise UserError(f"{(folder / name)!s:.300} is a link that leads out of {folder}: copy the file into it")
    try:
        about = real.stat()
    except OSError:
        return None
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None
