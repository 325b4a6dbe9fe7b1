"""Metadata files in a folder of images: one row per image, with its file's name and its captions.

    metadata.jsonl             one JSON object per line
    metadata.csv, .tsv         a header, then one line per image; separated by commas, semicolons, tabs or bars
    metadata.json              an array of objects; an object from names to captions or to objects (meta_cap.json of
                               other trainers); or COCO's images and annotations

metadata.jsonl and metadata.csv always apply to their folder. The others apply if they name images and no image there
has a caption file of its own.
"""

import codecs
import csv
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import open_regular
from train.data.sources.catalogue import Columns, repeat_count, require_column
from train.data.sources.files import Files, outside_message
from train.data.sources.text import evident_encoding, guess_encoding, require_encoding

CAPTIONS = ("text", "caption")
METADATA = ("metadata.jsonl", "metadata.csv")
_OTHERS = (
    *("metadata.json", "metadata.tsv", "captions.jsonl", "captions.csv", "captions.tsv", "captions.json"),
    *("meta_cap.json", "meta_clean.json", "meta_lat.json"),
)
FILE_NAME = "file_name"
_FILE_NAMES = (FILE_NAME, "filename", "file", "image", "image_file", "image_path", "path", "img")
_OTHER_CAPTIONS = ("captions", "prompt")
_DELIMITERS = ",;\t|"
_START_BYTES = 2**16  # part of a file that shows its encoding
_ENCODED_SUFFIXES = (".csv", ".tsv")  # of files that may be in old encodings; JSON is Unicode


def find_metadata(folder: Path, columns: Columns) -> Path | None:
    """Return the folder's metadata.jsonl or metadata.csv, or None. Raises UserError if it is outside the folder."""
    for name in METADATA:
        found = name if (folder / name).is_file() else ""
        if not found and columns.reading > 1:
            found = next((f for f in sorted(os.listdir(folder)) if f.lower() == name and (folder / f).is_file()), "")
        if found:
            path = Path(os.path.realpath(folder / found))
            if not path.is_relative_to(folder) and not columns.follow_links:
                raise UserError(outside_message(folder / found, "file", folder))
            return path
    return None


def other_metadata(names: Iterable[str]) -> list[str]:
    """Return the metadata files of a folder and its subfolders, at most one per folder and none inside another's."""
    best: dict[str, tuple[int, str]] = {}
    order = {name: k for k, name in enumerate((*METADATA, *_OTHERS))}
    for name in names:
        folder, _, last = name.rpartition("/")
        if last.lower() in order:
            entry = order[last.lower()], name
            best[folder] = min(best.get(folder, entry), entry)
    return [name for folder, (_, name) in sorted(best.items()) if not any(p in best for p in _parents(folder))]


def _parents(folder: str) -> Iterator[str]:
    while folder:
        folder = folder.rpartition("/")[0]
        yield folder


def is_standard(name: str) -> bool:
    """Return whether a metadata file always applies to its folder."""
    return name.rpartition("/")[2].lower() in METADATA


def read_metadata(
    path: Path, files: Files, prefix: str, notes: list[str], repeats: dict[str, int]
) -> dict[str, list[str]]:
    """Return the captions by the name of the image's file. An image with several rows has the captions of all of them.

    prefix: path of the metadata's folder in `files`, with "/" at its end. notes: receives lines on what was guessed.
    repeats: receives the number of repeats by name, the largest one if rows of an image differ.
    Raises UserError for a file that can't be read, for missing columns, and for a row that leads out of the folder.
    """
    columns = files.columns
    captions: dict[str, list[str]] = {}
    seen: dict[str, Any] = {}
    image, column = columns.image, ""
    for number, row in enumerate(_rows(path, columns, notes), 1):
        where = f"{path}, row {number}"
        if number == 1:
            image = columns.image or _one_of(row, _FILE_NAMES[: 1 if columns.reading == 1 else None])
            candidates = (columns.caption,) if columns.caption else CAPTIONS
            column = columns.caption or next((c for c in candidates if c in row), "")
            if not column and columns.reading > 1:
                column = _one_of(row, _OTHER_CAPTIONS)
            missing = [columns.image or FILE_NAME] if image not in row else []
            missing += [" or ".join(candidates)] if columns.captioned and not column else []
            if missing:
                raise _missing(missing, row, where)
        name = files.find_named(files.safe_name(row.get(image), where, image, prefix))
        captions.setdefault(name, []).extend(_captions(row.get(column), where, columns))
        seen.update(row)
        if columns.repeats:
            repeats[name] = max(_repeats(row.get(columns.repeats), where, columns.repeats), repeats.get(name, 0))
    if columns.repeats and captions:  # rows of JSON needn't have a column
        require_column(columns.repeats, seen, str(path))
    if columns.captioned and columns.caption and captions and columns.caption not in seen:
        raise _missing([columns.caption], seen, str(path))
    if not captions:
        raise UserError(
            f"{path} has no rows: must have one row per image, with the columns "
            f"{columns.image or FILE_NAME!r} and {columns.caption or ' or '.join(CAPTIONS)!r}"
        )
    return captions


def _missing(columns: Iterable[str], present: Iterable[str], where: str) -> UserError:
    return UserError(
        f"{where} has no column {', '.join(columns)}; its columns are: {', '.join(map(str, present))[:300]}; "
        "choose other columns with --input.image-column and --input.caption-column"
    )


def _one_of(row: dict[str, Any], names: Iterable[str]) -> str:
    """Return the first of the names if it is a column, else the only one that is, else ""."""
    found = [name for name in names if name in row]
    return found[0] if found and (len(found) == 1 or found[0] == FILE_NAME) else ""


def _repeats(value: Any, where: str, column: str) -> int:
    try:
        return repeat_count(value)
    except ValueError:
        raise UserError(f"{where}: {column} {str(value)[:80]!r}: must be a whole number of repeats") from None


def _captions(value: Any, where: str, columns: Columns) -> list[str]:
    texts = value if isinstance(value, list) else ["" if value is None else value]
    if columns.template:
        return [columns.of_label(str(label)) for label in texts if label not in ("", None)]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: caption {str(value)[:80]!r} must be a text or a list of texts")
    return [text.encode(errors="replace").decode().strip() for text in texts]


def _rows(path: Path, columns: Columns, notes: list[str]) -> Iterator[dict[str, Any]]:
    number = 0
    suffix = path.suffix.lower()
    try:
        encoding = "utf-8-sig" if columns.reading == 1 else _encoding(path, columns, notes)
        newline = "" if suffix in (".csv", ".tsv") else None
        with io.TextIOWrapper(open_regular(path), encoding, newline=newline) as lines:
            if suffix in (".csv", ".tsv"):
                for number, row in enumerate(_csv_rows(lines, path, columns, notes), 1):  # noqa: B007  used below
                    yield row
                return
            if suffix == ".json":
                yield from _json_rows(lines.read(), path)
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
        remedy = "; save it as UTF-8, or set --input.encoding" if isinstance(error, UnicodeDecodeError) else ""
        raise UserError(f"{path} can't be read near line {max(number, 1)}: {error}{remedy}") from None


def _json_rows(text: str, path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file; see the top of this file."""
    value = json.loads(text)
    if isinstance(value, list):
        rows = value
    elif isinstance(value, dict) and all(isinstance(value.get(k), list) for k in ("images", "annotations")):  # COCO
        names = {i.get("id"): i.get(FILE_NAME) for i in value["images"] if isinstance(i, dict)}
        captions = [a for a in value["annotations"] if isinstance(a, dict) and "caption" in a]
        rows = [{FILE_NAME: names.get(a.get("image_id")), "caption": a["caption"]} for a in captions]
    elif isinstance(value, dict):
        rows = [
            {**of, FILE_NAME: name} if isinstance(of, dict) else {FILE_NAME: name, "text": of}
            for name, of in value.items()
        ]
    else:
        rows = [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, entry {number}: must be a JSON object, but is a {type(row).__name__}")
        yield row


def _csv_rows(lines: io.TextIOWrapper, path: Path, columns: Columns, notes: list[str]) -> Iterator[dict[str, Any]]:
    if columns.reading == 1:
        yield from csv.DictReader(lines)
        return
    header = lines.readline().rstrip("\r\n")
    names = (columns.image,) if columns.image else _FILE_NAMES
    # A delimiter is right if it makes a known column of the header; a comma is right unless another is.
    suitable = [d for d in _DELIMITERS if set(names) & set(next(csv.reader([header], delimiter=d), []))]
    delimiter = suitable[0] if suitable else "\t" if path.suffix.lower() == ".tsv" else ","
    fields = next(csv.reader([header], delimiter=delimiter), [])
    if not suitable and os.path.splitext(fields[0] if fields else "")[1] in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError(
            f"{path}: the first line is {header[:80]!r}; must be the names of the columns: add file_name,text above it"
        )
    if delimiter not in (",", "\t") or (delimiter == "\t" and path.suffix.lower() == ".csv"):
        notes.append(f"{path}: columns are separated by {delimiter!r}: {', '.join(fields)[:100]}")
    start = lines.tell()

    def body(escaped: bool) -> Iterator[str]:
        lines.seek(start)
        return (line.replace('\\"', '""') for line in iter(lines.readline, "")) if escaped else iter(lines.readline, "")

    def is_valid(escaped: bool) -> bool:
        try:
            return all(True for _ in csv.reader(body(escaped), delimiter=delimiter, strict=True))
        except csv.Error:
            return False

    if escaped := not is_valid(False) and is_valid(True):
        notes.append(f"{path}: quotation marks are escaped by backslashes")
    rejoined = 0
    for row in csv.DictReader(body(escaped), fields, delimiter=delimiter):
        if isinstance(extra := row.pop(None, None), list):  # type: ignore[arg-type]
            row[fields[-1]] = delimiter.join([row[fields[-1]], *extra])
            rejoined += 1
        yield row
    if rejoined:
        notes.append(
            f"{path}: {rejoined:,} row{'s have' if rejoined > 1 else ' has'} more fields than the header; the rest was "
            f"added to the last column, {fields[-1]!r}"
        )


def _encoding(path: Path, columns: Columns, notes: list[str]) -> str:
    with open_regular(path) as file:
        start = file.read(_START_BYTES)
        evident = evident_encoding(start[: len(start) // 4 * 4])
        if evident in ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"):
            return evident
        if columns.encoding:
            return columns.encoding
        decoder = codecs.getincrementaldecoder("utf-8")()
        file.seek(0)
        try:
            for part in iter(lambda: file.read(2**20), b""):
                decoder.decode(part)
            decoder.decode(b"", final=True)
            return "utf-8"
        except UnicodeDecodeError:
            if path.suffix.lower() not in _ENCODED_SUFFIXES:
                return "utf-8"  # whose error names the place
        file.seek(0)
        lines = (line.rstrip(b"\r\n") for line in file if not line.isascii())
        samples = list(itertools.islice(lines, 1000))
    encoding = require_encoding(guess_encoding(samples), str(path))
    example = samples[0].decode(encoding, "replace")[:80]
    notes.append(f"{path}: isn't UTF-8; guessed {encoding}, e.g. {example!r}; if wrong, set --input.encoding")
    return encoding
