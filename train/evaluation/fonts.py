"""Fonts of the captions on sheets: Pillow's own font, and installed fonts for the characters that it doesn't have."""

import importlib.util
import os
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 11
_BITMAP_SIZES = (109, 160, 128, 64)  # pixels; colour fonts often have one size only
_FOLDERS = (
    "~/.local/share/fonts",
    "~/.fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "/run/current-system/sw/share/X11/fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
    "/System/Library/Fonts",
)
_LAST_STYLES = ("bold", "italic", "oblique", "light", "thin", "black", "condensed", "narrow", "mono", "serif", "math")
_PACKAGES = {"emoji": "fonts-noto-color-emoji", "CJK": "fonts-noto-cjk", "other": "fonts-noto-core"}  # of Debian


@dataclass(frozen=True)
class Face:
    """A font that draws text beginning at a point of the baseline; larger bitmaps are reduced by `scale`."""

    font: ImageFont.FreeTypeFont
    scale: float = 1.0

    def has(self, character: str) -> bool:
        """Return whether the font has a visible glyph for a character."""
        glyph = self._pixels(character)
        return glyph != self._pixels("\U0010fffd") and any(glyph)

    def draw(self, canvas: Image.Image, at: tuple[float, float], text: str, colour: tuple[int, int, int]) -> float:
        """Draw text and return its width in pixels."""
        width, (ascent, descent) = self.font.getlength(text), self.font.getmetrics()
        if self.scale == 1:
            ImageDraw.Draw(canvas).text(at, text, colour, self.font, anchor="ls")
            return width
        large = Image.new("RGBA", (round(width) + 1, ascent + descent))
        ImageDraw.Draw(large).text((0, ascent), text, colour, self.font, anchor="ls", embedded_color=True)
        small = large.resize((max(1, round(large.width * self.scale)), max(1, round(large.height * self.scale))))
        canvas.paste(small, (round(at[0]), round(at[1] - ascent * self.scale)), small)
        return width * self.scale

    def _pixels(self, character: str) -> bytes:
        size = round(self.font.size)
        image = Image.new("RGBA", (3 * size, 2 * size))
        ImageDraw.Draw(image).text((size, 0), character, "black", self.font, embedded_color=True)
        return image.tobytes()


class Fonts:
    """Fonts that have the characters of captions, searched once in the usual folders.

    Pillow's own font is first. Characters that no font has are drawn as it draws them, and reported once.
    """

    def __init__(self, folders: Sequence[Path] | None = None) -> None:
        self.folders = _usual_folders() if folders is None else folders
        font = ImageFont.load_default(SIZE)
        assert isinstance(font, ImageFont.FreeTypeFont)
        self.default = Face(font)
        self.of: dict[str, Face | None] = {chr(c): self.default for c in range(128)}

    def draw(self, canvas: Image.Image, at: tuple[float, float], line: str, colour: tuple[int, int, int]) -> None:
        """Draw a line of text, whose baseline begins at this point."""
        runs = list(self.runs(line))
        sides = (unicodedata.bidirectional(c) for c in line)
        if next((side for side in sides if side in ("L", "R", "AL")), "L") != "L":
            runs.reverse()  # the line begins at the right; Pillow orders the characters of each run
        x, y = at
        for face, text in runs:
            x += face.draw(canvas, (x, y), text, colour)

    def runs(self, line: str) -> Iterator[tuple[Face, str]]:
        """Split a line into runs of one font each. A run is as long as its font has the characters."""
        face, run = self.default, ""
        for c in line:
            other = self._font(face, c)
            if other is not face and run:
                yield face, run
                run = ""
            face, run = other, run + c
        if run:
            yield face, run

    def search(self, texts: Iterable[str]) -> None:
        """Search fonts for all characters of the texts, and warn of those that no font has."""
        new = {c for text in texts for c in text if not _invisible(c)} - self.of.keys()
        if not new:
            return
        missing, warned = set(new), None in self.of.values()
        for face in self._faces():
            self.of |= (found := {c: face for c in missing if face.has(c)})
            missing -= found.keys()
            if not missing:
                return
        self.of |= dict.fromkeys(missing)
        if not warned:
            shown = " ".join(sorted(missing)[:8])
            packages = " ".join(sorted({_PACKAGES[_kind(c)] for c in missing}))
            warnings.warn(
                f"no installed font has these characters of captions: {shown}; sheets show boxes instead. "
                f"Install a font that has them, e.g. apt-get install {packages}",
                stacklevel=2,
            )

    def _font(self, face: Face, character: str) -> Face:
        """Return the font of a character that follows one of this font."""
        if _invisible(character):  # a colour font's space is wide
            return self.default if character == " " and face.scale != 1 else face
        first = self.of[character] or face
        return face if face is not self.default and face.has(character) else first

    def _faces(self) -> Iterator[Face]:
        yield self.default
        yield from dict.fromkeys(face for face in self.of.values() if face)
        files = (Path(f, n) for folder in self.folders for f, _, names in os.walk(folder) for n in names)
        for path in sorted(files, key=_rank):
            if path.suffix.lower() in (".ttf", ".otf", ".ttc") and not path.name.startswith("LastResort"):
                yield from _load(path)


def _load(path: Path) -> Iterator[Face]:
    """Yield a file's font, if Pillow can draw with it."""
    for size in (SIZE, *_BITMAP_SIZES):
        try:
            face = Face(ImageFont.truetype(path, size), SIZE / size)
            face.has("A")
        except (OSError, ValueError):
            continue
        yield face
        return


def _rank(path: Path) -> tuple[bool, int, str]:
    """Return a key that sorts plain sans-serif fonts first."""
    name = path.name.lower()
    return "sans" not in name, sum(style in name for style in _LAST_STYLES), name


def _usual_folders() -> list[Path]:
    """Return the folders of the system's and the user's fonts, and the one of matplotlib's DejaVu."""
    folders = [Path(folder).expanduser() for folder in _FOLDERS]
    if (matplotlib := importlib.util.find_spec("matplotlib")) and matplotlib.origin:
        folders.append(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf")
    return folders


def _invisible(character: str) -> bool:
    """Return whether a character needs no glyph: spaces, controls, joiners and variation selectors."""
    return unicodedata.category(character)[0] in "ZC" or "\ufe00" <= character <= "\ufe0f"


def _kind(character: str) -> str:
    """Return a key of the packages."""
    name = unicodedata.name(character, "")
    if name.startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "FULLWIDTH", "IDEOGRAPHIC", "BOPOMOFO")):
        return "CJK"
    return "emoji" if character >= "\U0001f000" else "other"
