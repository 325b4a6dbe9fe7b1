"""Caption files beside the images of a folder.

    a.png, a.txt               also .TXT, .caption, and a.png.txt
    a.png, a.json              text or caption: a string or a list of strings
    a.png, captions/a.txt      also captions/ beside images/
    a.png                      by --input.caption-from-names: "a"

The first file that exists is used.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ldm.errors import UserError
from ldm.files import read_regular
from train.data.sources.catalogue import Columns, decode_text
from train.data.sources.files import Files, scan
from train.data.sources.metadata import CAPTIONS, METADATA
from train.data.sources.text import captions_in_json, evident_encoding, guess_encoding, require_encoding

_MAX_BYTES = 2**20  # largest caption file beside an image
_FOLDERS = ("captions", "caption", "texts", "text", "Captions")
_IMAGE_FOLDERS = re.compile("(^|/)(images|imgs|img|image)/", re.IGNORECASE)
_PARAGRAPHS = re.compile(r"\S[^\S\n]*\n[^\S\n]*\n\s*\S")


def caption_file(name: str, files: Files) -> str:
    """Return the name of the caption file of an image, "" if it has none."""
    stem = os.path.splitext(name)[0]
    if files.columns.reading == 1:
        return text if (text := f"{stem}.txt") in files.found and files.stat(text) else ""
    found = (files.find_text(candidate) for candidate in _candidates(name, stem, files.columns))
    return next((text for text in found if text and files.stat(text)), "")


def _candidates(name: str, stem: str, columns: Columns) -> Iterator[str]:
    if columns.caption:
        extension = columns.caption.lower().lstrip(".")
        yield from (f"{stem}.{extension}", f"{name}.{extension}", f"{stem}.json", f"{name}.json")
        return
    for suffix in ("txt", "caption"):
        yield from (f"{stem}.{suffix}", f"{name}.{suffix}")
    yield from (f"{stem}.json", f"{name}.json")
    folder, _, last = stem.rpartition("/")
    for captions in _FOLDERS:
        yield f"{folder}/{captions}/{last}.txt".removeprefix("/")
        if _IMAGE_FOLDERS.search(stem):
            yield _IMAGE_FOLDERS.sub(rf"\g<1>{captions}/", f"{stem}.txt", count=1)


def read_captions(names: dict[str, str], files: Files, notes: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the captions of each image, and for each image whose caption file can't be used, the reason.

    names: caption files by image. The encoding of files that aren't UTF-8 is guessed from all of them together. notes:
    receives lines on what was guessed. Raises UserError if no encoding can be guessed.
    """
    columns = files.columns
    captions: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    unclear: dict[str, bytes] = {}
    paragraphs = 0

    def add(image: str, text: str) -> None:
        nonlocal paragraphs
        if names[image].lower().endswith(".json") and columns.caption.lower().lstrip(".") != "json":
            try:
                captions[image] = captions_in_json(text, (columns.caption,) if columns.caption else CAPTIONS)
            except ValueError as error:
                reasons[image] = str(error)
        else:
            captions[image] = columns.texts(text)
            paragraphs += bool(_PARAGRAPHS.search(text))

    for image, name in names.items():
        if (files.stat(name) or (0, 0))[0] > _MAX_BYTES:
            reasons[image] = f"its {os.path.splitext(name)[1]} file has more than {_MAX_BYTES:,} bytes"
            continue
        content = _read(files.folder / name)
        if columns.reading == 1:
            captions[image] = columns.texts(decode_text(content))
        elif encoding := evident_encoding(content):
            add(image, content.decode(encoding, "replace"))
        else:
            unclear[image] = content
    encoding = columns.encoding
    if unclear and not encoding:
        first = next(iter(unclear))
        samples = unclear.values() if files.root == files.folder else _unclear_texts(files)
        encoding = require_encoding(guess_encoding(samples), str(files.folder / names[first]))
        example = unclear[first].decode(encoding, "replace").strip()[:80]
        count = "1 caption file isn't" if len(unclear) == 1 else f"{len(unclear):,} caption files aren't"
        notes.append(
            f"{count} UTF-8; guessed {encoding}, e.g. {names[first][-80:]!r} is {example!r}; if wrong, set "
            "--input.encoding"
        )
    for image, content in unclear.items():
        try:
            add(image, content.decode(encoding))
        except UnicodeDecodeError:
            reasons[image] = f"its caption file {names[image][-80:]!r} isn't {encoding}"
    if paragraphs and not columns.whole_files:
        notes.append(
            f"{paragraphs:,} caption file{'s have' if paragraphs > 1 else ' has'} empty lines inside: each "
            "line is a caption of its own; to make one caption of each file, set --input.caption-files whole"
        )
    return captions, reasons


def _unclear_texts(files: Files) -> Iterator[bytes]:
    """Yield the caption files in all splits of the dataset whose encoding isn't evident, so that all splits agree."""
    for name, found in sorted(scan(files.root, files.columns), key=lambda entry: entry[0]):
        if name.lower().endswith((".txt", ".caption")) and found and found[0] <= _MAX_BYTES:
            content = _read(files.root / name)
            if not evident_encoding(content):
                yield content


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, _MAX_BYTES)
    except OSError as error:  # e.g. it has changed since it was listed
        raise UserError(f"{path} can't be read: {error.strerror}") from None


def require_no_column(folder: Path, columns: Columns) -> None:
    """Raise UserError if a column is asked for, but the folder has no file with columns."""
    if column := columns.image or (columns.caption if not columns.template else ""):
        option = "image" if columns.image else "caption"
        raise UserError(
            f"--input.{option}-column {column!r}: {folder} has no {' or '.join(METADATA)} with columns; "
            "add one, or leave out the option"
        )
