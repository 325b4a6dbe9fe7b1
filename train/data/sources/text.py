"""Encoding of text files: stated, evident from the bytes, or guessed from the text of a whole dataset."""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ldm.errors import UserError

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins with UTF-16's mark
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_GUESSED = ["cp932", "gb18030", "big5", "cp949", "cp1251", "koi8_r", "cp1252"]
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a]")  # in no text of one byte per character
_CJK = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")
_USUAL = re.compile(
    "[\t\r\n -~\u00a0-\u06ff\u0e00-\u0e7f\u2010-\u2027\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]"
)
_ACCENTS = re.compile(rb"(?<![\x80-\xff])[\xc0-\xff](?![\x80-\xff])")
_ACCENTED = re.compile(rb"[A-Za-z][\xc0-\xff]|[\xc0-\xff][A-Za-z]")
_HIGH = re.compile(rb"[\x80-\xff]")
_GUESS_BYTES = 2**16  # size of the text from which an encoding is guessed


def evident_encoding(data: bytes) -> str:
    """Return the encoding if a byte order mark, the zeros of UTF-16, or valid UTF-8 show it, else ""."""
    if mark := next((mark for mark in _BOMS if data.startswith(mark)), None):
        return _BOMS[mark]
    utf8 = _decodes([data], "utf-8")
    # A control character or two may also be in other encodings; zeros and many of them are in UTF-16 only.
    if len(_CONTROL.findall(data)) > len(data) / 8 or (b"\0" in data and not utf8):
        shares = {encoding: _usual_share(data, encoding) for encoding in ("utf-16-le", "utf-16-be")}
        likely = max(shares, key=lambda encoding: shares[encoding])
        return likely if shares[likely] > 0.9 else ""
    return "utf-8" if utf8 else ""


def _usual_share(data: bytes, encoding: str) -> float:
    """Return the share of characters of common scripts. `data` may end within a character."""
    text = data.decode(encoding, "replace")
    return len(_USUAL.findall(text)) / len(text)


def guess_encoding(texts: Iterable[bytes]) -> str:
    """Return the most likely encoding of texts that have no evident one, "" if there is none."""
    from charset_normalizer import from_bytes

    distinct, seen, size = list[bytes](), set[bytes](), 0
    for text in texts:
        if text in seen:
            continue
        seen.add(text)
        distinct.append(text)
        if (size := size + len(text)) > _GUESS_BYTES:
            break
    if all(len(text) % 2 == 0 for text in distinct) and _decodes(distinct, "utf-16-le"):
        decoded = "".join(text.decode("utf-16-le") for text in distinct)
        if len(_CJK.findall(decoded)) > 0.95 * len(decoded):
            return "utf-16-le"
    joined = b"\n".join(distinct)
    isolated, high = len(_ACCENTS.findall(joined)), len(_HIGH.findall(joined))
    if isolated > 0.7 * high and _ACCENTED.search(joined) and _decodes(distinct, "cp1252"):
        return "cp1252"  # accents between unaccented letters; other scripts have few bytes below 128
    best = from_bytes(joined, cp_isolation=_GUESSED).best()
    return best.encoding if best else ""


def guess_note(where: str, encoding: str, name: str, text: bytes) -> str:
    """Return a line on the guessed encoding of captions, with an example: the name and content of a file."""
    example = f"{name[-80:]!r} is {text.decode(encoding, 'replace').strip()[:80]!r}"
    return f"{where}: caption files aren't UTF-8; guessed {encoding}, e.g. {example}; if wrong, set --input.encoding"


def captions_in_json(text: str, keys: Sequence[str], labels: bool = False) -> list[str]:
    """Return the texts under the first of the keys that an image's JSON file has.

    labels: whether numbers are accepted. Raises ValueError with the reason for other content.
    """
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json can't be read: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"its .json must be an object, but is a {type(row).__name__}")
    value: Any = next((row[key] for key in keys if row.get(key) is not None), [])
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, str) or (labels and isinstance(v, int)) for v in values):
        raise ValueError(f"caption {str(value)[:80]!r} must be a text or a list of texts")
    return [str(v).encode(errors="replace").decode().strip() for v in values]


def check_encoding(name: str) -> None:
    """Raise ValueError for an unknown text encoding."""
    try:
        "".encode(name)
    except (LookupError, ValueError):
        raise ValueError("is unknown; accepted: utf-8, cp932, gb18030, cp1251, cp1252, …") from None


def require_encoding(encoding: str, file: str) -> str:
    """Return an encoding that was found. Raises UserError if it is ""."""
    if not encoding:
        raise UserError(
            f"{file}: the encoding of the text can't be guessed; give it with --input.encoding, e.g. cp932, or save "
            "the file as UTF-8"
        )
    return encoding


def _decodes(texts: Iterable[bytes], encoding: str) -> bool:
    try:
        for text in texts:
            text.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
