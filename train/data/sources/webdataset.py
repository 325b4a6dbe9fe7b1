"""WebDataset tars: grouping of a tar's members into samples.

A sample consists of the members with the same key, which is their path up to the first dot of the file name, as in
WebDataset (in a folder, a name ends at its last dot):

    000123.jpg, 000123.txt             each non-empty line is a caption; also .caption
    000123.jpg, 000123.json            text or caption: a string or a list of strings
    000123.jpg, 000123.cls             with a template for captions: a label

The members of a sample needn't be adjacent, except in a stream. The first .jpg, .png … is its image; a second member
with the same key and extension is left out. Hidden files are skipped. If a sample has several caption members, the
first kind above is used. A sample is left out, and the reason is reported, if its image or the caption in use is a link
or a sparse or special file, if its path leads out of the tar, or if its caption is too long or unreadable: an image
isn't trained on without its captions. Members are read only from the tar itself; nothing is unpacked.
"""

import contextlib
import itertools
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Self

from train.data.images import MAX_BYTES
from train.data.sources.catalogue import Columns, decode_text, ignored, repeat_count
from train.data.sources.files import suffixes
from train.data.sources.text import captions_in_json, evident_encoding

DAMAGE = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError, zlib.error, lzma.LZMAError)
"""Exceptions that tarfile raises for a truncated or damaged tar."""

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
    repeats: int = 1


class Header(tarfile.TarInfo):
    """Tar header that limits memory use and never makes tarfile seek backwards. A damaged header raises an error."""

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


class Scattered(Exception):
    """Error for a tar in which the members of a sample aren't adjacent."""


class _Unusable(Exception):
    """A sample that is left out, and the reason."""


def read_samples(
    tar: tarfile.TarFile,
    columns: Columns,
    leave_out: Callable[[str, str], object],
    *,
    images: bool = False,
    scattered: bool | None = None,
    guess: Callable[[], str] = str,
) -> Iterator[Sample]:
    """Yield the samples of an open tar, in order; `leave_out` receives (name, reason) of those that can't be used.

    images: whether to include each image's bytes. scattered: whether a sample's members are anywhere in the tar, which
    must be seekable, and whose headers are then kept in memory. Otherwise only one sample at a time is in memory. If a
    key occurs again after other members, False raises Scattered, and None leaves these members out. guess: function
    that returns the encoding of text that isn't UTF-8, "" if unknown. Raises one of DAMAGE if the tar is damaged; the
    sample that is incomplete there isn't yielded.
    """
    if scattered:
        collected: dict[str, list[_Member]] = {}
        damage: Exception | None = None
        try:
            for member in _members(tar, columns):
                collected.setdefault(member.key, []).append(member)
        except DAMAGE as error:
            damage = error
            collected.popitem() if collected else None
        groups: Iterable[tuple[str, Iterable[_Member]]] = collected.items()
    else:
        damage, groups = None, itertools.groupby(_members(tar, columns), lambda member: member.key)
    keys = set[int]()
    for key, members in groups:
        try:
            if columns.reading > 1:
                if hash(key) in keys and scattered is False:
                    raise Scattered
                if hash(key) in keys:
                    raise _Unusable(
                        "its key occurs before, with other files between: "
                        "in a stream, a sample's files must be adjacent"
                    )
                keys.add(hash(key))
            yield _sample(tar, members, columns, images, guess, leave_out)
        except _Unusable as error:
            leave_out(key, str(error))
    if damage:
        raise damage


def unclear_texts(tar: tarfile.TarFile, columns: Columns) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each caption member of an open tar whose encoding isn't evident."""
    try:
        for member in _members(tar, columns):
            if member.extension in _text_extensions(columns) and member.header.size <= _MAX_TEXT_BYTES:
                with contextlib.suppress(_Unusable):
                    _check(member, _MAX_TEXT_BYTES)
                    if not evident_encoding(content := _read(tar, member)):
                        yield member.name, content
    except DAMAGE:
        return


def _text_extensions(columns: Columns) -> tuple[str, ...]:
    first = ("txt", "json", "cls", _extension(columns.caption))
    return first if columns.reading == 1 else ("caption", *first)


def image_extensions(columns: Columns) -> tuple[str, ...]:
    """Return the extensions of images, in lower case."""
    return tuple(suffix[1:] for suffix in suffixes(columns.reading))


def _members(tar: tarfile.TarFile, columns: Columns) -> Iterator[_Member]:
    while (header := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise it would keep all of them
        if header.size < 0:  # possible in extended headers; tarfile would go backwards endlessly
            raise tarfile.ReadError(f"a member has the invalid size {header.size}")
        parts = [part for part in header.name.split("/") if part not in ("", ".")]
        if header.isdir() or not parts or any(ignored(p, columns.reading) and p != ".." for p in parts):
            continue
        stem, _, extension = parts[-1].partition(".")
        yield _Member("/".join([*parts[:-1], stem]), extension.lower(), "/".join(parts), header)


def _sample(
    tar: tarfile.TarFile,
    members: Iterable[_Member],
    columns: Columns,
    images: bool,
    guess: Callable[[], str],
    leave_out: Callable[[str, str], object],
) -> Sample:
    accepted = (_extension(columns.image),) if columns.image else image_extensions(columns)
    found: Sample | None = None
    texts: dict[str, str | _Unusable] = {}
    extensions = set[str]()
    repeated, dotted = 0, ""
    key = ""
    for member in members:
        key = member.key
        again = member.extension in extensions
        extensions.add(member.extension)
        if found is None and member.extension in accepted:
            _check(member, MAX_BYTES if images else None)
            content = _read(tar, member) if images else b""
            found = Sample(member.name, member.header.size, member.header.offset_data, ("",), content)
        elif again and (member.extension in accepted or member.extension in _text_extensions(columns)):
            repeated += member.extension in accepted
        elif member.extension in _text_extensions(columns):
            texts.setdefault(member.extension, _text(tar, member, columns, guess))
        elif member.extension.rpartition(".")[2] in accepted:
            dotted = member.name
    if repeated and columns.reading > 1:
        more = f"{repeated:,} more image{'s' * (repeated > 1)} with the same name"
        leave_out(key, f"{more}: the first one in the tar is used")
    if found is None:
        hint = f": a key ends at the first dot of a name; rename {dotted[-80:]!r}" if dotted else ""
        listed = " or ".join(accepted if columns.reading == 1 or columns.image else accepted[:3])
        others = f"; its extensions are {', '.join(sorted(extensions))[:80]}" if columns.reading > 1 else ""
        raise _Unusable(f"no image with this name and the extension {listed}{others}{hint}")
    repeats = _repeats(texts, columns.repeats) if columns.repeats else 1
    if columns.from_names:
        return found._replace(captions=(columns.of_name(key.rpartition("/")[2]) or "",), repeats=repeats)
    return found._replace(captions=_captions(texts, columns), repeats=repeats)


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


def _text(tar: tarfile.TarFile, member: _Member, columns: Columns, guess: Callable[[], str]) -> str | _Unusable:
    try:
        _check(member, _MAX_TEXT_BYTES)
    except _Unusable as error:
        return error
    content = _read(tar, member)
    if columns.reading == 1:
        return decode_text(content)
    encoding = evident_encoding(content) or columns.encoding or guess()
    try:
        return content.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        known = f"{encoding}" if encoding else "UTF-8; give its encoding with --input.encoding, e.g. cp932"
        return _Unusable(f"its .{member.extension} isn't {known}")


def _captions(texts: dict[str, str | _Unusable], columns: Columns) -> tuple[str, ...]:
    """Return a sample's captions, at least one.

    columns.caption is an extension or a key in the .json; with a template, the value found there is a label.
    """
    extension = _extension(columns.caption)
    labels = bool(columns.template and extension)
    file = next((e for e in ("txt", "caption") if e in texts), "")
    if extension in texts and extension != "json":
        found = columns.texts(_text_or_raise(texts[extension]))
    elif extension and extension != "json":
        found = _fields(texts, (columns.caption,), labels)
    elif file and extension != "json":
        found = columns.texts(_text_or_raise(texts[file]))
    else:
        found = _fields(texts, _KEYS, labels)
        if not found and columns.template and "cls" in texts:
            found, labels = columns.texts(_text_or_raise(texts["cls"])), True
    cleaned = (text.encode(errors="replace").decode().strip() for text in found)
    return tuple(columns.of_label(text) if labels else text for text in cleaned if text) or ("",)


def _repeats(texts: dict[str, str | _Unusable], key: str) -> int:
    """Return the number of repeats in a sample's .json; 1 if there is none."""
    if "json" not in texts:
        return 1
    try:
        row = json.loads(_text_or_raise(texts["json"]))
        return repeat_count(row.get(key) if isinstance(row, dict) else None)
    except (ValueError, RecursionError):
        raise _Unusable(f"{key} in its .json must be a whole number of repeats") from None


def _text_or_raise(text: str | _Unusable) -> str:
    if isinstance(text, _Unusable):
        raise text
    return text


def _fields(texts: dict[str, str | _Unusable], keys: Sequence[str], labels: bool) -> list[str]:
    """Return the texts under the first of the keys that the .json has."""
    if "json" not in texts:
        return []
    try:
        return captions_in_json(_text_or_raise(texts["json"]), keys, labels)
    except ValueError as error:
        raise _Unusable(str(error)) from None


def _extension(name: str) -> str:
    return name.lower().lstrip(".")
