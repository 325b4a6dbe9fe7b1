"""Images in an untrusted folder, with metadata.jsonl or metadata.csv, .txt files, or one folder per class.

Besides images, only metadata.jsonl, metadata.csv and .txt files are opened. After links are followed, every path in
the metadata and the target of every link to an image or a .txt must be inside the folder.
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
from train.data.sources.catalogue import MAX_BYTES, Catalogue, Columns, Opener, Row, Splits, decode_text

_METADATA = ("metadata.jsonl", "metadata.csv")
_FILE_NAME = "file_name"
_MAX_TEXT_BYTES = 2**20  # largest caption file beside an image
_CAPTIONS = ("text", "caption")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


class Strings:
    """Sequence of str in two arrays: small, and shared with forked workers without a copy."""

    def __init__(self, strings: Iterable[str]) -> None:
        parts = [s.encode("utf-8", "surrogateescape") for s in strings]  # in any locale
        self.ends = np.cumsum([0, *map(len, parts)])
        self.bytes = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.bytes[self.ends[index] : self.ends[index + 1]].tobytes().decode("utf-8", "surrogateescape")


class Folder(Catalogue):
    """Images ordered by name. A row's name is its path inside the folder."""

    def __init__(self, folder: Path, rows: Iterable[Row], left_out: Iterable[tuple[str, str]] = ()) -> None:
        rows = sorted(rows)
        self.folder, self.location, self.left_out = folder, str(folder), tuple(left_out)
        self.names = Strings(r.name for r in rows)
        self.sizes = np.array([r.size for r in rows], np.int64)
        self.changed_ns = np.array([r.changed_ns for r in rows], np.int64)
        self.texts = Strings(text for r in rows for text in r.captions)
        self.first_text = np.cumsum([0, *(len(r.captions) for r in rows)])

    def __len__(self) -> int:
        return len(self.sizes)

    def row(self, k: int) -> Row:
        texts = range(self.first_text[k], self.first_text[k + 1])
        return Row(self.names[k], int(self.sizes[k]), int(self.changed_ns[k]), tuple(self.texts[t] for t in texts))

    def read(self, k: int) -> bytes:
        try:
            with open(self.folder / self.names[k], "rb") as file:
                if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
                    raise DamagedImage(self.names[k], f"{size:,} bytes; up to {MAX_BYTES:,} are accepted")
                return file.read()
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise DamagedImage(self.names[k], str(error.strerror)) from None

    def subfolder(self, name: str) -> "Folder":
        """Return the images of one subfolder; their names don't change."""
        prefix = f"{name}/"
        rows = (row for row in self if row.name.startswith(prefix))
        return Folder(self.folder, rows, [entry for entry in self.left_out if entry[0].startswith(prefix)])


def find_folder(data: str, columns: Columns, names: Sequence[str]) -> Splits:
    """Return the splits of a folder of images: those of `names` that are subfolders or, with metadata, begin its paths.

    Raises UserError, at once or from the returned openers, for a folder without images (with a list of what was
    searched for), for unreadable metadata, and for a row or a link that leads out of the folder.
    """
    root = Path(data).resolve()
    present = [name for name in names if (root / name).is_dir()]
    if find_metadata(root) is None and present:
        return {name: partial(_split_folder, root, name, columns) for name in present}
    folder = list_folder(root, columns)
    first_parts = {row.name.partition("/")[0] for row in folder}
    found: dict[str, Opener] = {name: partial(folder.subfolder, name) for name in present if name in first_parts}
    return found if found and first_parts <= set(found) else found | {"": lambda: folder}


def _split_folder(root: Path, name: str, columns: Columns) -> Folder:
    folder = Path(os.path.realpath(root / name))
    if not folder.is_relative_to(root):
        raise UserError(f"{root / name} is a link to a folder outside {root}: give the target of the link as --data")
    return list_folder(folder, columns)


def list_folder(folder: Path, columns: Columns) -> Folder:
    """List the images of a resolved folder. Several rows of one image are its captions. Raises as `find_folder`."""
    metadata = find_metadata(folder)
    if metadata is None:
        return Folder(folder, *_list_texts(folder, columns))
    captions: dict[str, list[str]] = {}
    for name, texts in _read_metadata(metadata, columns):
        captions.setdefault(name, []).extend(texts)
    if not captions:
        raise UserError(
            f"{metadata} has no rows: must have one row per image, with the columns "
            f"{columns.image or _FILE_NAME!r} and {columns.caption or ' or '.join(_CAPTIONS)!r}"
        )
    files = dict(_scan(folder))
    rows, missing = [], []
    for name, texts in captions.items():
        found = files.get(name) or _stat_link(folder, name)
        if found is None:
            missing.append((name, "listed in the metadata, but the file doesn't exist"))
        else:
            rows.append(Row(name, *found, tuple(t for t in texts if t) or ("",)))
    if not rows:
        example = repr(missing[0][0][:200])
        raise UserError(f"{metadata} lists {len(missing):,} files, but none of them is in {folder}, e.g. {example}")
    return Folder(folder, rows, missing)


def _list_texts(folder: Path, columns: Columns) -> tuple[list[Row], list[tuple[str, str]]]:
    """List images with a .txt beside them or, if captions are made from labels, in one folder per class.

    Returns the rows, and (name, reason) of what is left out.
    """
    if column := columns.image or (columns.caption if not columns.template else ""):
        option = "image" if columns.image else "caption"
        raise UserError(
            f"--input.{option}-column {column!r}: {folder} has no {' or '.join(_METADATA)} with columns; "
            "add one, or leave out the option"
        )
    files = {name: found or _stat_link(folder, name) for name, found in _scan(folder)}
    names = [name for name, found in files.items() if found and name.lower().endswith(_SUFFIXES)]
    if not names:
        raise UserError(
            f"no images in {folder}: looked for metadata.jsonl, metadata.csv, and {', '.join(_SUFFIXES)} files"
        )

    def captions(name: str) -> list[str]:
        if columns.template:
            label = os.path.basename(os.path.dirname(name))
            return [columns.of_label(label)] if label else []
        text_file = f"{os.path.splitext(name)[0]}.txt"
        text = decode_text((folder / text_file).read_bytes()) if files.get(text_file) else ""
        return [line.strip() for line in text.splitlines()]

    too_long = {
        name for name in names if (files.get(f"{os.path.splitext(name)[0]}.txt") or (0, 0))[0] > _MAX_TEXT_BYTES
    }
    left_out = [(name, f"its .txt file has more than {_MAX_TEXT_BYTES:,} bytes") for name in names if name in too_long]
    names = [name for name in names if name not in too_long]
    rows = [Row(name, *(files[name] or (0, 0)), tuple(filter(None, captions(name))) or ("",)) for name in names]
    if columns.captioned and not any(any(row.captions) for row in rows):
        raise UserError(
            f"{folder} has {len(names):,} images but no captions: looked for metadata.jsonl, metadata.csv, and a .txt "
            "beside each image; for one folder per class, set --input.caption-template 'a photo of a {}'"
        )
    return rows, left_out


def find_metadata(folder: Path) -> Path | None:
    """Return the folder's metadata file, or None."""
    for name in _METADATA:
        if (folder / name).is_file():
            if not (path := Path(os.path.realpath(folder / name))).is_relative_to(folder):
                raise UserError(f"{folder / name} is a link to a file outside {folder}: copy the file into the folder")
            return path
    return None


def _read_metadata(path: Path, columns: Columns) -> Iterator[tuple[str, list[str]]]:
    """Yield each row's file name and captions."""
    image, column = columns.image or _FILE_NAME, ""
    for number, row in enumerate(_rows(path), 1):
        where = f"{path}, row {number}"
        if number == 1:
            candidates = (columns.caption,) if columns.caption else _CAPTIONS
            column = next((c for c in candidates if c in row), "")
            missing = [image] if image not in row else []
            missing += [" or ".join(candidates)] if columns.captioned and not column else []
            if missing:
                raise UserError(
                    f"{where} has no column {', '.join(missing)}; its columns are: {', '.join(map(str, row))[:300]}; "
                    "choose other columns with --input.image-column and --input.caption-column"
                )
        yield _safe_name(row.get(image), where, image), _captions(row.get(column), where, columns)


def _captions(value: Any, where: str, columns: Columns) -> list[str]:
    texts = value if isinstance(value, list) else ["" if value is None else value]
    if columns.template:
        return [columns.of_label(str(label)) for label in texts if label not in ("", None)]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: caption {str(value)[:80]!r} must be a text or a list of texts")
    return [text.encode(errors="replace").decode().strip() for text in texts]


def _safe_name(name: Any, where: str, column: str) -> str:
    """Return a normalised path inside the folder."""
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}: {column} {str(name)[:80]!r} is not a file name")
    absolute = name[0] in "/\\" or name[1:2] == ":"  # on POSIX or on Windows
    if absolute or "\0" in name or (".." in name and ".." in re.split(r"[/\\]", name)):
        raise UserError(f"{where}: {column} {name[:200]!r} is outside the folder; must be a path inside it")
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
                        raise UserError(
                            f"{path}, line {number}: must be a JSON object with the columns of a row, "
                            f"but is a {type(row).__name__}"
                        )
                    yield row
    except UserError:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} can't be read near line {max(number, 1)}: {error}") from None


def has_images(folder: Path) -> bool:
    """Return whether a folder or any of its subfolders contains an image file."""
    return any(name.lower().endswith(_SUFFIXES) for name, _ in _scan(folder))


def _scan(folder: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """Yield (name, (size, changed_ns)) for each file in the folder that isn't hidden, and (name, None) for each link.

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
                    info = entry.stat()
                    yield under + entry.name, (info.st_size, info.st_ctime_ns)


def _stat_link(folder: Path, name: str) -> tuple[int, int] | None:
    """Return (size, changed_ns) of a file whose path contains links; None if there is no such file.

    Raises UserError if it is outside the folder.
    """
    real = Path(os.path.realpath(folder / name))
    if not real.is_relative_to(folder):
        raise UserError(f"{(folder / name)!s:.300} is a link to a file outside {folder}: copy the file into the folder")
    try:
        info = real.stat()
    except OSError:
        return None
    return (info.st_size, info.st_ctime_ns) if stat.S_ISREG(info.st_mode) else None
