"""The Emoji set: every emoji of an installed colour font on white, captioned by its names and keywords.

The font is Noto Color Emoji (Debian's fonts-noto-color-emoji). Names, keywords and the list of sequences come from
Unicode's CLDR (Debian's unicode-cldr-core) if it is installed, else from Python's table of character names. An emoji
counts if the font draws it as one glyph. Two kinds are left out: swatches of skin and parts of hair, which aren't emoji
by themselves, and couples of two skin tones, which are many and nearly the same. Variants of one emoji (skin, hair,
gender) and families that differ in a colour, a digit or a direction (hearts, clocks, keycaps) are all in train or all
in test, so that no test image is a recoloured training image. Faces still resemble faces, and flags resemble flags.
"""

import hashlib
import io
import json
import math
import os
import re
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from ldm.errors import UserError
from train.data.store.atomic import new_folder

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
SMALLEST_SIDE, LARGEST_SIDE = 16, 128  # the font's images are 136 × 128

Render = Callable[[str], Image.Image | None]  # an emoji → its square RGB image on white, or None if there is none

# Names and captions


class Named(NamedTuple):
    """An emoji, one character or a sequence without variation selectors, and its captions: at least one."""

    text: str
    captions: tuple[str, ...]


def read_annotations(path: Path) -> list[Named]:
    """Read CLDR annotations: `path` is its folder `common`, or one file of annotations. Some entries aren't emoji."""
    files = [path / part / "en.xml" for part in ("annotations", "annotationsDerived")] if path.is_dir() else [path]
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = {}
    for file in files:
        try:
            annotations = list(ElementTree.parse(file).iter("annotation"))
        except OSError as error:
            raise UserError(
                f"can't read the annotations {file}: {error.strerror}; accepted is CLDR's folder "
                "common, as Debian's unicode-cldr-core installs it, or one of its files"
            ) from None
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise UserError(f"{file} is not well-formed XML: {error}") from None
        for annotation in annotations:
            text, words = annotation.get("cp", "").replace("\ufe0f", ""), annotation.text or ""
            if annotation.get("type") == "tts":
                names[text] = words
            else:
                keywords[text] = words.split("|")
    texts = names | keywords
    every = [Named(text, compose_captions(text, names.get(text, ""), keywords.get(text, ()))) for text in texts]
    if not any(named.captions for named in every):
        raise UserError(f'{path} names nothing: expected is <annotation cp="😀" type="tts">grinning face</annotation>')
    return [named for named in every if named.captions]


def character_names() -> list[Named]:
    """Return the numbers, signs and symbols in Python's Unicode table: names only, no sequences; few are emoji."""
    signs = (c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] in "NPS")
    every = (Named(c, compose_captions(c, "", ())) for c in signs)
    return [named for named in every if named.captions]


def compose_captions(text: str, name: str, keywords: Iterable[str]) -> tuple[str, ...]:
    """Return captions: the name, its natural word order, Unicode's own name, and the keywords in one line.

    A keyword alone isn't a caption, as hundreds of emoji share "face"; and five skin tones need no list each, as it
    repeats that of the plain emoji. Black and white in Unicode's names mean filled and outlined ("heavy black heart" is
    red), so such a name is left out unless the first name has the word too.
    """
    name = _clean(name)
    found = [name, _spoken(name)]
    formal = unicodedata.name(text, "").lower() if len(text) == 1 else ""
    if not name or not {"black", "white"} & (set(formal.split()) - set(name.split())):
        found.append(formal)
    words = () if _TONE.search(text) else _distinct(map(_clean, keywords))
    found.append(", ".join(words) if len(words) > 1 else "")
    return _distinct(found)


def _spoken(name: str) -> str:
    """Convert "flag: France" to "flag of France", "man: red hair" to "man with red hair", and join traits by "and"."""
    kind, colon, which = name.partition(": ")
    if kind in ("flag", "keycap") and colon:
        return f"flag of {which}" if kind == "flag" else f"keycap {which}"
    parts = which.split(", ")
    traits = [part for part in parts if part.endswith(("skin tone", "hair", "beard"))]
    people = ", ".join(part for part in parts if part not in traits)
    whole = f"{kind}: {people}" if people else kind
    return f"{whole} with {' and '.join(traits)}" if traits else name


def _clean(text: str) -> str:
    """Return one line of printable characters, with the typewriter apostrophe."""
    spaced = " ".join(text.split()).replace("’", "'")
    return "".join(c for c in spaced if c.isprintable())


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that aren't empty, each once regardless of case."""
    kept: dict[str, str] = {}
    for text in texts:
        if any(map(str.isalnum, text)):
            kept.setdefault(text.casefold(), text)
    return tuple(kept.values())


# Variants

_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_PART = re.compile("[\U0001f3fb-\U0001f3ff\U0001f9b0-\U0001f9b3]")  # a skin tone, or hair
_ASIDE = re.compile("[\U0001f3fb-\U0001f3ff\U0001f9b0-\U0001f9b3♀♂➡\u200d\ufe0e\ufe0f]")  # skin, hair, gender, joiners
_FAMILIES = (
    "❤🧡💛💚💙💜🤎🖤🤍🩷🩵🩶",
    "🔴🟠🟡🟢🔵🟣🟤⚫⚪",
    "🟥🟧🟨🟩🟦🟪🟫⬛⬜◼◻◾◽▪▫",
    "🔶🔷🔸🔹",
    "📕📗📘📙📔",
    "💴💵💶💷",
    "🥇🥈🥉🏅",
    "❓❔❗❕",
    "1234567890#*",
    "🆒🆓🆕🆖🆗🆙",
    "🔠🔡🔢🔣🔤",
    "🔙🔚🔛🔜🔝",
    "⬆↗➡↘⬇↙⬅↖↕↔",
    "👆👇👈👉",
    "🔈🔉🔊",
    "🔒🔓",
    "⌛⏳",
    "💿📀",
    "🚹🚺",
    "⛄☃",
    "😈👿",
    "🌑🌒🌓🌔🌕🌖🌗🌘",
    "🌍🌎🌏",
    "😀😃😄",
    "😗😙😚",
    "😦😧😟",
    "🙁☹😕",
    "".join(map(chr, range(0x1F550, 0x1F568))),
)
_SAME_CAPTION = str.maketrans(
    {member: family[0] for family in _FAMILIES for member in family}
    | {
        "👨": "🧑",
        "👩": "🧑",
        "👱": "🧑",
        "🧔": "🧑",
        "👦": "🧒",
        "👧": "🧒",
        "👴": "🧓",
        "👵": "🧓",
        "🤴": "🫅",
        "👸": "🫅",
        "🤶": "🎅",
        "🕺": "💃",
        "🤰": "🫄",
        "🫃": "🫄",
        "👬": "👫",
        "👭": "👫",
    }
)
_AS_ONE = {"🧑❤🧑": "💑", "🧑❤💋🧑": "💏", "🧑🤝🧑": "👫", "🫱🫲": "🤝", "🧑🎄": "🎅"}


def base(text: str) -> str:
    """Return an emoji without its skin, hair and gender; the result is the same for all its variants and its family."""
    plain = (_ASIDE.sub("", text) or text).translate(_SAME_CAPTION)
    return "👪" if re.fullmatch("🧑+🧒+", plain) else _AS_ONE.get(plain, plain)


def is_usable(text: str) -> bool:
    """Return whether an emoji is more than a part, and has one skin tone at most."""
    return not _PART.fullmatch(text) and len(set(_TONE.findall(text))) < 2


def held_out(texts: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Return the bases whose variants are for testing, at least one. They are the first by seeded hashes.

    The share is the same among bases with one image, with six, with 18 and so on, as one base can have a hundred.
    """
    variants = Counter(map(base, texts))
    shuffled = sorted(variants, key=lambda b: hashlib.blake2b(f"{seed} {b}".encode()).digest())
    chosen: set[str] = set()
    for count in set(variants.values()):
        alike = [b for b in shuffled if variants[b] == count]
        chosen.update(alike[: round(fraction * len(alike))])
    return chosen or set(shuffled[:1])


# Images


class Font:
    """A colour font as a `Render`: the whole glyph, centred, at the font's own resolution."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"no font at {path}: install Debian's fonts-noto-color-emoji, or give its file as --font")
        if not features.check("raqm"):
            raise UserError(
                "this Pillow lacks raqm, which joins sequences to one glyph: install Debian's libfribidi0, "
                "and Pillow from PyPI"
            )
        try:  # the only size that the font has
            self.font = ImageFont.truetype(path, 109, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise UserError(f"can't use the font {path} ({error}): accepted is Noto Color Emoji") from None
        self.advance = self.font.getlength("😀")
        self.ascent, descent = self.font.getmetrics()
        self.side = max(math.ceil(self.advance), self.ascent + descent)  # with a margin: all glyphs are narrower
        self.top = (self.side - self.ascent - descent) // 2
        self.unknown = {self._draw(text).tobytes() for text in ("\U0010fffd", "🇿🇿")}  # no character, and no country
        face = self("😀")
        if face is None or face.convert("HSV").getextrema()[1] == (0, 0):
            raise UserError(f"the font {path} has no 😀 in colour: accepted is Noto Color Emoji")

    def __call__(self, text: str) -> Image.Image | None:
        """Draw `text`, or return None if it has no single glyph, or one that shows only its first character."""
        if "\n" in text or self.font.getlength(text) != self.advance:
            return None
        image = self._draw(text)
        seen = image.tobytes()
        if seen in self.unknown or image.getextrema() == ((255, 255),) * 3:
            return None
        return None if len(text) > 1 and seen == self._draw(text[0]).tobytes() else image

    def _draw(self, text: str) -> Image.Image:
        image = Image.new("RGB", (self.side, self.side), "white")
        at = (0, self.top + self.ascent)  # left end of the baseline
        ImageDraw.Draw(image).text(at, text, font=self.font, anchor="ls", embedded_color=True)
        return image


@dataclass
class Rendered:
    """An image as in its file, with the first emoji that looks so and the captions of all that do."""

    text: str
    png: bytes
    captions: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "-".join(f"{ord(c):04x}" for c in self.text) + ".png"


def render_all(named: Iterable[Named], render: Render, side: int) -> list[Rendered]:
    """Render the usable emoji that `render` has, in order, reduced to `side`; equal-looking ones are one image."""
    found: dict[bytes, Rendered] = {}
    for text, captions in named:
        if not is_usable(text) or (whole := render(text)) is None:
            continue
        looks = hashlib.sha256(whole.tobytes()).digest()
        if looks not in found:
            file = io.BytesIO()
            whole.resize((side, side), Image.Resampling.LANCZOS).save(file, "PNG")
            found[looks] = Rendered(text, file.getvalue())
        found[looks].captions[:] = _distinct([*found[looks].captions, *captions])
    return list(found.values())


# Files


class Written(NamedTuple):
    """Number of images and captions in a dataset."""

    train: int
    test: int
    captions: int


def write_emoji(out: Path, named: list[Named], render: Render, side: int, test_fraction: float, seed: int) -> Written:
    """Write the dataset as an imagefolder: out/{train,test}/metadata.jsonl (`text` is a list), with the images.

    Raises UserError for a number out of range, for an `out` that isn't empty, and if there is too little to render. The
    dataset appears completely or not at all; the same arguments write the same bytes.
    """
    for what, value, least, most in (
        ("size", side, SMALLEST_SIDE, LARGEST_SIDE),
        ("test-fraction", test_fraction, 0.001, 0.5),
        ("seed", seed, 0, 2**64 - 1),
    ):
        if not least <= value <= most:
            raise UserError(f"{what} {value} is out of range: accepted is {least} to {most}")
    out = Path(os.path.realpath(out))  # a link is followed, because a folder can't replace it
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder: choose another --out, or remove it")
    images = render_all(tqdm(named, unit=" names", disable=None), render, side)
    tests = held_out((image.text for image in images), test_fraction, seed)
    parts = {
        "train": [image for image in images if base(image.text) not in tests],
        "test": [image for image in images if base(image.text) in tests],
    }
    if not parts["train"]:
        raise UserError(
            f"of {len(named):,} emoji named the font has {len(images)}: at least two are needed, "
            "one to train with and one that is no variant of it to test with"
        )
    with new_folder(out) as whole:
        for split, part in parts.items():
            _write_split(whole / split, part)
    return Written(len(parts["train"]), len(parts["test"]), sum(len(image.captions) for image in images))


def _write_split(folder: Path, images: Iterable[Rendered]) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for image in images:
            (folder / image.name).write_bytes(image.png)
            line = {"file_name": image.name, "text": image.captions, "emoji": image.text}
            lines.write(json.dumps(line) + "\n")
