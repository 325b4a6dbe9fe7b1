"""WebDataset tars: grouping of a tar's members into samples.

A sample consists of consecutive members with the same key, which is their path up to the first dot of the file name:

    000123.jpg, 000123.txt             each non-empty line is a caption
    000123.jpg, 000123.json            text or caption: a string or a list of strings
    000123.jpg, 000123.cls             with a template for captions: a label

The first .jpg, .png … is its image. Hidden files are skipped. If a sample has several caption members, the
first kind above is used. A sample is left out, and the reason is reported, if its image or the caption in use is a link
or a sparse or special file, if its path leads out of the tar, or if its caption is too long or unreadable: an image
isn't trained on without its captions. Members are read only from the tar itself; nothing is unpacked.
"""

import itertools
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

from train.data.sources.catalogue import MAX_BYTES, Columns, decode_text

DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, zlib.error, lzma.LZMAError)
"""Exceptions that tarfile raises for a truncated or damaged tar."""
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif")

_KEYS = ("text", "caption")
_MAX_TEXT_BYTES = 2**20  # largest caption member
_MAX_HEADER_BYTES = 2**20  # largest long name or extended header


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
    """Tar header with bounded memory use, which never makes tarfile go backwards; a damaged one raises an error."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if not buf or not any(buf):
            return super().frombuf(buf, encoding, errors)  # the end of the tar
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        if header.size < 0 or (header.size > _MAX_HEADER_BYTES and header.type in b"xgXLK"):
            raise tarfile.ReadError(f"a header has the invalid size {header.size}")
        return header


class _Member(NamedTuple):
    key: str
    extension: str
    name: str
    header: tarfile.TarInfo


class _Unusable(Exception):
    """A sample that is left out, and the reason."""


def read_samples(
    tar: tarfile.TarFile, columns: Columns, leave_out: Callable[[str, str], object], *, images: bool = False
) -> Iterator[Sample]:
    """Yield the samples of an open tar, in order; `leave_out` receives (name, reason) of those that can't be used.

    images: whether to include each image's bytes. Only one sample at a time is in memory. Raises one of DAMAGE if the
    tar is damaged; the sample that is incomplete there isn't yielded.
    """
    for key, members in itertools.groupby(_members(tar), lambda member: member.key):
        try:
            yield _sample(tar, members, columns, images)
        except _Unusable as error:
            leave_out(key, str(error))


def _members(tar: tarfile.TarFile) -> Iterator[_Member]:
    while (header := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise it would keep all of them
        if header.size < 0:  # possible in extended headers; tarfile would go backwards endlessly
            raise tarfile.ReadError(f"a member has the invalid size {header.size}")
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
        raise _Unusable(f"no image with this name and the extension {' or '.join(accepted)}")
    return found._replace(captions=_captions(texts, columns))


def _check(member: _Member, max_bytes: int | None) -> None:
    header, name = member.header, member.header.name
    absolute = name[0] in "/\\" or name[1:2] == ":"  # on POSIX or on Windows
    if absolute or "\0" in name or ".." in re.split(r"[/\\]", name):
        raise _Unusable(f"member {name[:200]!r} has an unsafe path; only relative paths without '..' are accepted")
    if header.issym() or header.islnk():
        raise _Unusable(f"member {name[:200]!r} is a link; only files are accepted")
    if not header.isreg() or header.issparse():
        raise _Unusable(f"member {name[:200]!r} is a special file; only regular files are accepted")
    if max_bytes is not None and header.size > max_bytes:
        raise _Unusable(f"member {name[:200]!r} has {header.size:,} bytes; up to {max_bytes:,} are accepted")


def _read(tar: tarfile.TarFile, member: _Member) -> bytes:
    file = tar.extractfile(member.header)
    content = file.read() if file else b""
    if len(content) != member.header.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _text(tar: tarfile.TarFile, member: _Member) -> str | _Unusable:
    try:
        _check(member, _MAX_TEXT_BYTES)
    except _Unusable as error:
        return error
    return decode_text(_read(tar, member))


def _captions(texts: dict[str, str | _Unusable], columns: Columns) -> tuple[str, ...]:
    """Return a sample's captions, at least one.

    columns.caption is an extension or a key in the .json; with a template, the value found there is a label.
    """
    extension = _extension(columns.caption)
    labels = bool(columns.template and extension)
    if extension in texts and extension != "json":
        found = _text_or_raise(texts[extension]).splitlines()
    elif extension and extension != "json":
        found = _fields(texts, (columns.caption,), labels)
    elif "txt" in texts and extension != "json":
        found = _text_or_raise(texts["txt"]).splitlines()
    else:
        found = _fields(texts, _KEYS, labels)
        if not found and columns.template and "cls" in texts:
            found, labels = _text_or_raise(texts["cls"]).splitlines(), True
    cleaned = (text.encode(errors="replace").decode().strip() for text in found)
    return tuple(columns.of_label(text) if labels else text for text in cleaned if text) or ("",)


def _text_or_raise(text: str | _Unusable) -> str:
    if isinstance(text, _Unusable):
        raise text
    return text


def _fields(texts: dict[str, str | _Unusable], keys: Sequence[str], labels: bool) -> list[str]:
    """Return the texts under the first of the keys that the .json has."""
    if "json" not in texts:
        return []
    try:
        row = json.loads(_text_or_raise(texts["json"]))
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"its .json can't be read: {error}") from None
    if not isinstance(row, dict):
        raise _Unusable(f"its .json must be an object, but is a {type(row).__name__}")
    value: Any = next((row[key] for key in keys if row.get(key) is not None), [])
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str) or (labels and isinstance(v, int)) for v in values):
        raise _Unusable(f"caption {str(value)[:80]!r} must be a text or a list of texts")
    return [str(v) for v in values]


def _extension(name: str) -> str:
    return name.lower().lstrip(".")
