"""The Emoji dataset: every emoji of an installed colour font on white, with its names and keywords as captions.

The font is Noto Color Emoji (Debian's fonts-noto-color-emoji). Names, keywords and the list of sequences come from
Unicode's CLDR (Debian's unicode-cldr-core) if it is installed, else from Python's table of character names. An emoji
is used if the font draws it as one glyph. Two kinds are left out: skin-tone swatches and hair components, which aren't
emoji by themselves, and couples of two skin tones, which are many and nearly the same. Variants of one emoji (skin,
hair, gender) and families that differ in a colour, a digit or a direction (hearts, clocks, keycaps) are all in train or
all in test, so that no test image is a recoloured training image. Faces still resemble faces, and flags resemble flags.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features
from tqdm import tqdm

from ldm.errors import UserError
from ldm.files import open_regular
from train.data.store.atomic import new_folder

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
SMALLEST_SIDE, LARGEST_SIDE = 16, 128  # the font's images are 136 × 128

Render = Callable[[str], Image.Image | None]  # emoji → its square RGB image on white, or None if there is none

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
            with open_regular(file) as opened:
                annotations = list(ElementTree.parse(opened).iter("annotation"))
        except OSError as error:
            raise UserError(
                f"--annotations: {file} can't be read: {error.strerror}; must be CLDR's folder common, "
                "as Debian's unicode-cldr-core installs it, or one of its files"
            ) from None
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise UserError(f"{file} is not well-formed XML: {error}") from None
        for annotation in annotations:
            text, words = annotation.get("cp", "").replace("\ufe0f", ""), annotation.text or ""
            if annotation.get("type") == "tts":
                names[text] = words
            else:
                keywords[text] = words.split("|")
    named = name_emoji(names, keywords)
    if not named:
        raise UserError(
            f"--annotations: {path} contains no names; must contain elements like "
            '<annotation cp="😀" type="tts">grinning face</annotation>'
        )
    return named


def name_emoji(names: Mapping[str, str], keywords: Mapping[str, Iterable[str]]) -> list[Named]:
    """Return the emoji that have a caption, from names and keywords by emoji."""
    texts = {**names, **keywords}
    captions = ((text, compose_captions(text, names.get(text, ""), keywords.get(text, ()))) for text in texts)
    return [Named(text, found) for text, found in captions if found]


def character_names() -> list[Named]:
    """Return the numbers, punctuation and symbols in Python's Unicode table, with names; few of them are emoji."""
    signs = (c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] in "NPS")
    candidates = (Named(c, compose_captions(c, "", ())) for c in signs)
    return [named for named in candidates if named.captions]


def compose_captions(text: str, name: str, keywords: Iterable[str]) -> tuple[str, ...]:
    """Return captions: the name, the name in natural word order, Unicode's own name, and the keywords in one line.

    A single keyword isn't a caption, because hundreds of emoji share one such as "face". An emoji with a skin tone has
    no line of keywords, because they repeat those of the plain emoji. In Unicode's names, black and white mean filled
    and outlined ("heavy black heart" is red), so such a name is left out unless the first name has the word too.
    """
    name = _clean(name)
    found = [name, _natural_order(name)]
    formal = unicodedata.name(text, "").lower() if len(text) == 1 else ""
    if not name or not {"black", "white"} & (set(formal.split()) - set(name.split())):
        found.append(formal)
    words = () if _TONE.search(text) else merge_captions(map(_clean, keywords))
    found.append(", ".join(words) if len(words) > 1 else "")
    return merge_captions(found)


def _natural_order(name: str) -> str:
    """Convert "flag: France" to "flag of France", "man: red hair" to "man with red hair", and join traits by "and"."""
    kind, colon, details = name.partition(": ")
    if kind in ("flag", "keycap") and colon:
        return f"flag of {details}" if kind == "flag" else f"keycap {details}"
    parts = details.split(", ")
    traits = [part for part in parts if part.endswith(("skin tone", "hair", "beard"))]
    people = ", ".join(part for part in parts if part not in traits)
    subject = f"{kind}: {people}" if people else kind
    return f"{subject} with {' and '.join(traits)}" if traits else name


def _clean(text: str) -> str:
    """Return the text as one line of printable characters, with straight apostrophes."""
    spaced = " ".join(text.split()).replace("’", "'")
    return "".join(c for c in spaced if c.isprintable())


def merge_captions(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that aren't empty, each once regardless of case."""
    kept: dict[str, str] = {}
    for text in texts:
        if any(map(str.isalnum, text)):
            kept.setdefault(text.casefold(), text)
    return tuple(kept.values())


# Variants

_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
_COMPONENT = re.compile("[\U0001f3fb-\U0001f3ff\U0001f9b0-\U0001f9b3]")  # a skin tone, or hair
_MODIFIERS = re.compile(
    "[\U0001f3fb-\U0001f3ff\U0001f9b0-\U0001f9b3♀♂➡\u200d\ufe0e\ufe0f]"
)  # skin, hair, gender, joiners
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
_REPRESENTATIVE = str.maketrans(
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
_EQUIVALENT_SEQUENCES = {"🧑❤🧑": "💑", "🧑❤💋🧑": "💏", "🧑🤝🧑": "👫", "🫱🫲": "🤝", "🧑🎄": "🎅"}


def base(text: str) -> str:
    """Return an emoji without skin tone, hair and gender: the same base for all its variants and its family."""
    plain = (_MODIFIERS.sub("", text) or text).translate(_REPRESENTATIVE)
    return "👪" if re.fullmatch("🧑+🧒+", plain) else _EQUIVALENT_SEQUENCES.get(plain, plain)


def is_usable(text: str) -> bool:
    """Return whether an emoji is more than a component, and has at most one skin tone."""
    return not _COMPONENT.fullmatch(text) and len(set(_TONE.findall(text))) < 2


def held_out(texts: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Return the bases whose variants are test images, at least one: those with the lowest seeded hashes.

    Bases with equally many images (1, 6, 18, …) are split separately, because one base can have a hundred images.
    """
    variants = Counter(map(base, texts))
    shuffled = sorted(variants, key=lambda b: hashlib.blake2b(f"{seed} {b}".encode()).digest())
    chosen: set[str] = set()
    for count in set(variants.values()):
        group = [b for b in shuffled if variants[b] == count]
        chosen.update(group[: round(fraction * len(group))])
    return chosen or set(shuffled[:1])


# Images


class Font:
    """Renderer of emoji with a colour font: the complete glyph, centred, at the font's own resolution."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                f"--font {path}: there is no such file; install Debian's fonts-noto-color-emoji, "
                "or give the file of Noto Color Emoji"
            )
        if not features.check("raqm"):
            raise UserError(
                "this Pillow has no raqm library, which renders emoji sequences as one glyph: "
                "install Debian's libfribidi0, and Pillow from PyPI"
            )
        try:  # the only size that the font has
            self.font = ImageFont.truetype(path, 109, layout_engine=ImageFont.Layout.RAQM)
        except OSError as error:
            raise UserError(f"--font {path} can't be used ({error}): must be Noto Color Emoji") from None
        self.advance = self.font.getlength("😀")
        self.ascent, descent = self.font.getmetrics()
        self.side = max(math.ceil(self.advance), self.ascent + descent)  # with a margin: all glyphs are narrower
        self.top = (self.side - self.ascent - descent) // 2
        self.unknown = {self._draw(text).tobytes() for text in ("\U0010fffd", "🇿🇿")}  # no character, and no country
        face = self("😀")
        if face is None or face.convert("HSV").getextrema()[1] == (0, 0):
            raise UserError(f"--font {path} has no 😀 in colour: must be Noto Color Emoji")

    def __call__(self, text: str) -> Image.Image | None:
        """Return an emoji's image, or None if it has no single glyph, or one that shows only its first character."""
        if "\n" in text or self.font.getlength(text) != self.advance:
            return None
        image = self._draw(text)
        pixels = image.tobytes()
        if pixels in self.unknown or image.getextrema() == ((255, 255),) * 3:
            return None
        return None if len(text) > 1 and pixels == self._draw(text[0]).tobytes() else image

    def _draw(self, text: str) -> Image.Image:
        image = Image.new("RGB", (self.side, self.side), "white")
        at = (0, self.top + self.ascent)  # left end of the baseline
        ImageDraw.Draw(image).text(at, text, font=self.font, anchor="ls", embedded_color=True)
        return image


@dataclass
class Rendered:
    """An image's file, the first emoji that is rendered as this image, and the captions of all such emoji."""

    text: str
    png: bytes
    captions: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "-".join(f"{ord(c):04x}" for c in self.text) + ".png"


def render_all(named: Iterable[Named], render: Render, side: int) -> list[Rendered]:
    """Render the usable emoji that `render` supports, in order, downsized to `side`; equal images are merged."""
    found: dict[bytes, Rendered] = {}
    for text, captions in named:
        if not is_usable(text) or (image := render(text)) is None:
            continue
        digest = hashlib.sha256(image.tobytes()).digest()
        if digest not in found:
            file = io.BytesIO()
            image.resize((side, side), Image.Resampling.LANCZOS).save(file, "PNG")
            found[digest] = Rendered(text, file.getvalue())
        found[digest].captions[:] = merge_captions([*found[digest].captions, *captions])
    return list(found.values())


# Files


class Written(NamedTuple):
    """Number of images and captions in a dataset."""

    train: int
    test: int
    captions: int


def write_emoji(out: Path, named: list[Named], render: Render, side: int, test_fraction: float, seed: int) -> Written:
    """Write the dataset as an imagefolder: out/{train,test}/metadata.jsonl (`text` is a list), with the images.

    Raises UserError for a number out of range, for an `out` that isn't empty, and if fewer than two emoji can be
    rendered. The dataset appears completely or not at all; the same arguments write the same bytes.
    """
    for option, value, least, most in (
        ("size", side, SMALLEST_SIDE, LARGEST_SIDE),
        ("test-fraction", test_fraction, 0.001, 0.5),
        ("seed", seed, 0, 2**64 - 1),
    ):
        if not least <= value <= most:
            raise UserError(f"--{option} {value}: must be from {least} to {most}")
    out = require_new(out)
    images = render_all(tqdm(named, unit=" names", disable=None), render, side)
    test_bases = held_out((image.text for image in images), test_fraction, seed)
    parts = {
        "train": [image for image in images if base(image.text) not in test_bases],
        "test": [image for image in images if base(image.text) in test_bases],
    }
    if not parts["train"]:
        raise UserError(
            f"the font has only {len(images)} of the {len(named):,} named emoji: at least two that aren't variants of "
            "each other are needed, one for training and one for testing"
        )
    with new_folder(out) as folder:
        for split, part in parts.items():
            _write_split(folder / split, part)
    return Written(len(parts["train"]), len(parts["test"]), sum(len(image.captions) for image in images))


def require_new(out: Path) -> Path:
    """Return the path without links, because a folder can't replace a link. Raises UserError if it isn't empty."""
    out = Path(os.path.realpath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: must be a new or empty folder; choose another, or remove it")
    return out


def _write_split(folder: Path, images: Iterable[Rendered]) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for image in images:
            (folder / image.name).write_bytes(image.png)
            line = {"file_name": image.name, "text": image.captions, "emoji": image.text}
            lines.write(json.dumps(line) + "\n")
