"""WebDataset tars: grouping of a tar's members into samples.

A sample consists of consecutive members with the same key, which is their path up to the first dot of the file name:

    000123.jpg, 000123.txt             each non-empty line is a caption
    000123.jpg, 000123.json            text or caption: a string or a list of strings
    000123.jpg, 000123.cls             with a template for captions: a label

The first .jpg, .png … is its image. Hidden files are skipped. Of several caption members, the first kind above is
used. A sample is left out, with the reason, if its image or the caption in use is a link, a sparse or a special file,
if its path leads out of the tar, or if its caption is too long or unreadable: images aren't trained on without their
captions. Members are read only from the tar itself; nothing is unpacked.
"""

import itertools
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from train.data.sources.catalogue import MAX_BYTES, Columns, text_of

DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, zlib.error, lzma.LZMAError)
"""Exceptions that tarfile raises for a tar that is cut short or damaged."""
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")

_KEYS = ("text", "caption")
_MOST_TEXT = 2**20  # bytes of a caption's member
_MOST_HEADER = 2**20  # bytes of a long name or of extended headers


class Sample(NamedTuple):
    """An image with its captions, read from a tar."""

    name: str
    size: int
    offset: int
    """Offset of the image in the tar."""
    captions: tuple[str, ...]
    image: bytes
    """Content of the image's file; empty unless requested."""


class Header(tarfile.TarInfo):
    """Tar headers that can't exhaust the memory or lead backwards; a damaged one is an error, not the tar's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if not buf or not any(buf):
            return super().frombuf(buf, encoding, errors)  # the end of the tar
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if header.size < 0 or (header.size > _MOST_HEADER and header.type in b"xgXLK"):
            raise tarfile.ReadError(f"a header with a size of {header.size}")
        return header


class _Member(NamedTuple):
    key: str
    extension: str
    name: str
    header: tarfile.TarInfo


class _Unusable(Exception):
    """Error: the reason why a sample is left out."""


def read_samples(
    tar: tarfile.TarFile, columns: Columns, leave_out: Callable[[str, str], object], *, images: bool = False
) -> Iterator[Sample]:
    """Yield the samples of an open tar, in order; `leave_out` receives (name, reason) of those that can't be used.

    images: whether to include each image's bytes. Memory holds one sample at a time. Raises one of DAMAGE if the
    tar is damaged; a sample that is cut off there isn't yielded.
    """
    for key, members in itertools.groupby(_members(tar), lambda member: member.key):
        try:
            yield _sample(tar, members, columns, images)
        except _Unusable as why:
            leave_out(key, str(why))


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    while (header := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # or it would keep them all
        if header.size < 0:  # possible in extended headers: tarfile would go backwards for ever
            raise tarfile.ReadError(f"a member of {header.size} bytes")
        parts = [part for part in header.name.split("/") if part not in ("", ".")]
        if header.isdir() or not parts or any(p.startswith((".", "__MACOSX")) and p != ".." for p in parts):
            continue
        stem, _, extension = parts[-1].partition(".")
        yield _Member("/".join([*parts[:-1], stem]), extension.lower(), "/".join(parts), header)


def _sample(tar: tarfile.TarFile, members: Iterator[_Member], columns: Columns, images: bool) -> Sample:
    accepted = (_extension(columns.image),) if columns.image else IMAGES
    found: Sample | None = None
    texts: dict[str, str | _Unusable] = {}
    for member in members:
        if found is None and member.extension in accepted:
            _check(member, MAX_BYTES if images else None)
            content = _read(tar, member) if images else b""
            found = Sample(member.name, member.header.size, member.header.offset_data, ("",), content)
        elif member.extension in ("txt", "json", "cls", _extension(columns.caption)):
            texts.setdefault(member.extension, _text(tar, member))
    if found is None:
        raise _Unusable(f"no image of that name ({', '.join(accepted)})")
    return found._replace(captions=_captions(texts, columns))


def _check(member: _Member, most: int | None) -> None:
    header, name = member.header, member.header.name
    rooted = name[0] in "/\\" or name[1:2] == ":"  # on POSIX or on Windows
    if rooted or "\0" in name or ".." in re.split(r"[/\\]", name):
        raise _Unusable(f"member {name[:200]!r} leads out of the tar; paths inside it are accepted")
    if header.issym() or header.islnk():
        raise _Unusable(f"member {name[:200]!r} is a link; files are accepted")
    if not header.isreg() or header.issparse():
        raise _Unusable(f"member {name[:200]!r} is a special file; plain ones are accepted")
    if most is not None and header.size > most:
        raise _Unusable(f"member {name[:200]!r} has {header.size:,} bytes; up to {most:,} are accepted")


def _read(tar: tarfile.TarFile, member: _Member) -> bytes:
    file = tar.extractfile(member.header)
    content = file.read() if file else b""
    if len(content) != member.header.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _text(tar: tarfile.TarFile, member: _Member) -> str | _Unusable:
    try:
        _check(member, _MOST_TEXT)
    except _Unusable as why:
        return why
    return text_of(_read(tar, member))


def _captions(texts: dict[str, str | _Unusable], columns: Columns) -> tuple[str, ...]:
    """Return a sample's captions, at least one.

    columns.caption is an extension or a key in the .json; with a template, its value is a label.
    """
    wanted = _extension(columns.caption)
    labels = bool(columns.template and wanted)
    if wanted in texts and wanted != "json":
        found = _plain(texts[wanted]).splitlines()
    elif wanted and wanted != "json":
        found = _fields(texts, (columns.caption,), labels)
    elif "txt" in texts and wanted != "json":
        found = _plain(texts["txt"]).splitlines()
    else:
        found = _fields(texts, _KEYS, labels)
        if not found and columns.template and "cls" in texts:
            found, labels = _plain(texts["cls"]).splitlines(), True
    cleaned = (text.encode(errors="replace").decode().strip() for text in found)
    return tuple(columns.of_label(text) if labels else text for text in cleaned if text) or ("",)


def _plain(text: str | _Unusable) -> str:
    if isinstance(text, _Unusable):
        raise text
    return text


def _fields(texts: dict[str, str | _Unusable], keys: Sequence[str], labels: bool) -> list[str]:
    """Return the texts under the first of the keys that the .json has."""
    if "json" not in texts:
        return []
    try:
        row = json.loads(_plain(texts["json"]))
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"its .json can't be read: {error}") from None
    if not isinstance(row, dict):
        raise _Unusable(f"its .json holds a {type(row).__name__}, not an object")
    value: Any = next((row[key] for key in keys if row.get(key) is not None), [])
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str) or (labels and isinstance(v, int)) for v in values):
        raise _Unusable(f"caption {str(value)[:80]!r} is not text (nor a list of texts)")
    return [str(v) for v in values]


def _extension(name: str) -> str:
    return name.lower().lstrip(".")
