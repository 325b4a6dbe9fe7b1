"""Images in an untrusted folder, with metadata.jsonl or metadata.csv, .txt files, or one folder per class.

Only metadata.jsonl, metadata.csv and .txt files are opened. Paths in a row must lie inside the folder after links are
followed; so must the target of every link to an image or a .txt.
"""

import csv
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ldm.errors import UserError
from train.data.images.decode import DamagedImage
from train.data.sources.catalogue import MAX_BYTES, Catalogue, Columns, Opener, Row, Splits, text_of

_METADATA = ("metadata.jsonl", "metadata.csv")
_FILE_NAME = "file_name"
_MOST_TEXT = 2**20  # bytes of the caption file beside an image
_CAPTIONS = ("text", "caption")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


class Strings:
    """Sequence of str in two arrays: small, and shared with forked workers without a copy."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [os.fsencode(s) for s in strings]
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.bytes[self.ends[index] : self.ends[index + 1]].tobytes())


class Folder(Catalogue):
    """Images ordered by name. A row's name is its path inside the folder."""

    def __init__(self, folder: Path, rows: Iterable[Row], left_out: Iterable[tuple[str, str]] = ()) -> None:
        rows = sorted(rows)
        self.folder, self.place, self.left_out = folder, str(folder), tuple(left_out)
        self.names = Strings(r.name for r in rows)
        self.sizes = np.array([r.size for r in rows], np.int64)
        self.mtimes_ns = np.array([r.mtime_ns for r in rows], np.int64)
        self.texts = Strings(text for r in rows for text in r.captions)
        self.first_text = np.cumsum([0, *(len(r.captions) for r in rows)])

    def __len__(self) -> int:
        return len(self.sizes)

    def row(self, k: int) -> Row:
        texts = range(self.first_text[k], self.first_text[k + 1])
        return Row(self.names[k], int(self.sizes[k]), int(self.mtimes_ns[k]), tuple(self.texts[t] for t in texts))

    def read(self, k: int) -> bytes:
        try:
            with open(self.folder / self.names[k], "rb") as file:
                if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                    raise DamagedImage(self.names[k], f"{size:,} bytes; up to {MAX_BYTES:,} are accepted")
                return file.read()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise DamagedImage(self.names[k], str(error.strerror)) from None

    def part(self, inside: str) -> "Folder":
        """Return the images of one subfolder; their names don't change."""
        begins = f"{inside}/"
        rows = (row for row in self if row.name.startswith(begins))
        return Folder(self.folder, rows, [lost for lost in self.left_out if lost[0].startswith(begins)])


def find_folder(data: str, columns: Columns, names: Sequence[str]) -> Splits:
    """Return the splits of a folder of images: those of `names` that are subfolders, or are in its metadata's paths.

    Raises UserError, at once or from the returned openers, for a folder without images (with a list of what was
    searched for), for unreadable metadata, and for a row or a link that leads out of the folder.
    """
    root = Path(data).resolve()
    present = [name for name in names if (root / name).is_dir()]
    if find_metadata(root) is None and present:
        return {name: partial(_split_folder, root, name, columns) for name in present}
    whole = list_folder(root, columns)
    parts = {row.name.partition("/")[0] for row in whole}
    found: dict[str, Opener] = {name: partial(whole.part, name) for name in present if name in parts}
    return found if found and parts <= set(found) else found | {"": lambda: whole}


def _split_folder(root: Path, name: str, columns: Columns) -> Folder:
    folder = Path(os.path.realpath(root / name))
    if not folder.is_relative_to(root):
        raise UserError(f"{root / name} is a link that leads out of {root}: give --data the folder it leads to")
    return list_folder(folder, columns)


def list_folder(folder: Path, columns: Columns) -> Folder:
    """List the images of a resolved folder. Several rows of one image are its captions. Errors as above."""
    metadata = find_metadata(folder)
    if metadata is None:
        return Folder(folder, *_list_texts(folder, columns))
    captions: dict[str, list[str]] = {}
    for name, texts in _read_metadata(metadata, columns):
        captions.setdefault(name, []).extend(texts)
    if not captions:
        raise UserError(
            f"{metadata} has no rows: a row an image is expected, with {columns.image or _FILE_NAME!r} and a caption"
        )
    files = dict(_scan(folder))
    rows, missing = [], []
    for name, texts in captions.items():
        found = files.get(name) or _look(folder, name)
        if found is None:
            missing.append((name, "the metadata names it, but there is no such file"))
        else:
            rows.append(Row(name, *found, tuple(t for t in texts if t) or ("",)))
    if not rows:
        named = f"none of the {len(missing):,} files that {metadata} names"
        raise UserError(f"{named} is in {folder}, e.g. {missing[0][0][:200]!r}")
    return Folder(folder, rows, missing)


def _list_texts(folder: Path, columns: Columns) -> tuple[list[Row], list[tuple[str, str]]]:
    """List images with a .txt beside them or, if captions are made from labels, in one folder per class.

    Returns what is left out too.
    """
    if column := columns.image or (columns.caption if not columns.template else ""):
        raise UserError(f"{folder} has no {' or '.join(_METADATA)} in which there could be a column {column!r}")
    files = {name: found or _look(folder, name) for name, found in _scan(folder)}
    names = [name for name, found in files.items() if found and name.lower().endswith(_SUFFIXES)]
    looked_for = "metadata.jsonl, metadata.csv, or a .txt beside each image"
    if not names:
        raise UserError(f"no images in {folder}: looked for {looked_for} ({', '.join(s[1:] for s in _SUFFIXES)})")

    def captions(name: str) -> list[str]:
        if columns.template:
            label = os.path.basename(os.path.dirname(name))
            return [columns.of_label(label)] if label else []
        beside = f"{os.path.splitext(name)[0]}.txt"
        text = text_of((folder / beside).read_bytes()) if files.get(beside) else ""
        return [line.strip() for line in text.splitlines()]

    long = [name for name in names if (files.get(f"{os.path.splitext(name)[0]}.txt") or (0, 0))[0] > _MOST_TEXT]
    left_out = [(name, f"its .txt has more than {_MOST_TEXT:,} bytes") for name in long]
    names = [name for name in names if name not in set(long)]
    rows = [Row(name, *(files[name] or (0, 0)), tuple(filter(None, captions(name))) or ("",)) for name in names]
    if columns.captioned and not any(any(row.captions) for row in rows):
        looked_for += ", or a folder a class with --input.caption-template 'a photo of a {}'"
        raise UserError(f"{folder} has {len(names):,} images but no captions: looked for {looked_for}")
    return rows, left_out


def find_metadata(folder: Path) -> Path | None:
    """Return the folder's metadata file, or None."""
    for name in _METADATA:
        if (folder / name).is_file():
            if not (path := Path(os.path.realpath(folder / name))).is_relative_to(folder):
                raise UserError(f"{folder / name} is a link that leads out of {folder}: copy the file into it")
            return path
    return None


def _read_metadata(path: Path, columns: Columns) -> Iterator[tuple[str, list[str]]]:
    """Yield each row's file name and captions."""
    image, column = columns.image or _FILE_NAME, ""
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}, row {number}"
        if number == 1:
            wanted = (columns.caption,) if columns.caption else _CAPTIONS
            column = next((c for c in wanted if c in row), "")
            absent = [image] if image not in row else []
            absent += [" or ".join(wanted)] if columns.captioned and not column else []
            if absent:
                raise UserError(
                    f"{where} has no column {', '.join(absent)}; it has: {', '.join(map(str, row))[:300]} "
                    "(--input.image-column and --input.caption-column name others)"
                )
        yield _safe_name(row.get(image), where, image), _captions(row.get(column), where, columns)


def _captions(value: Any, where: str, columns: Columns) -> list[str]:
    texts = value if isinstance(value, list) else ["" if value is None else value]
    if columns.template:
        return [columns.of_label(str(label)) for label in texts if label not in ("", None)]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: caption {str(value)[:80]!r} is not text (nor a list of texts)")
    return [text.encode(errors="replace").decode().strip() for text in texts]


def _safe_name(name: Any, where: str, column: str) -> str:
    """Return a normalised path inside the folder."""
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
                for number, row in enumerate(csv.DictReader(lines), 1):  # noqa: B007  used below
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
        raise UserError(f"{path} can't be read near line {max(number, 1)}: {error}") from None


def has_images(folder: Path) -> bool:
    """Return whether an image's file is anywhere in a folder."""
    return any(name.lower().endswith(_SUFFIXES) for name, _ in _scan(folder))


def _scan(folder: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Return name → (size, mtime_ns) of each file inside the folder that isn't hidden, and name → None for links.

    Links aren't followed.
    """
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
    """Return (size, mtime_ns) of a file that is a link or behind one; None if there is no such file."""
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(folder):
        raise UserError(f"{(folder / name)!s:.300} is a link that leads out of {folder}: copy the file into it")
    try:
        about = real.stat()
    except OSError:
        return None
    return (about.st_size, about.st_mtime_ns) if stat.S_ISREG(about.st_mode) else None
