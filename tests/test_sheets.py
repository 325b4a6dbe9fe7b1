"""Captions on sheets are drawn with fonts that have their characters, in any script."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageFont

from train.evaluation import fonts as module
from train.evaluation.fonts import SIZE, Face, Fonts
from train.evaluation.sheets import sheet, wrap

CAPTIONS = {
    "Japanese": "赤い円",
    "Arabic": "دائرة حمراء",
    "Cyrillic": "красный круг",
    "emoji": "🚀👩‍🚀",
    "accents": "é ß",
    "Devanagari": "लाल वृत्त",
}


def write_font(path: Path, characters: str) -> Path:
    """Write a font in which each of these characters is a filled square, and a missing one an empty frame."""
    pen = TTGlyphPen(None)
    for point, draw in zip(((0, 0), (0, 700), (700, 700), (700, 0)), (pen.moveTo, *[pen.lineTo] * 3), strict=True):
        draw(point)
    pen.closePath()
    square, empty = pen.glyph(), TTGlyphPen(None).glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(c): "square" for c in characters if not c.isspace()})
    builder.setupGlyf({".notdef": empty, "square": square})
    builder.setupHorizontalMetrics({".notdef": (800, 0), "square": (800, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)
    return path


def drawn(caption: str, fonts: Fonts) -> tuple[Image.Image, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = sheet([[np.zeros((64, 64, 3), np.uint8)]], [caption], fonts)
    return image, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("script", CAPTIONS)
def test_a_caption_is_drawn_with_a_font_that_has_its_characters(script: str, tmp_path: Path) -> None:
    caption = CAPTIONS[script]
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    write_font(tmp_path / "a/Other-Sans.ttf", "ξ")
    font = write_font(tmp_path / "b/Font.otf", caption)
    fonts = Fonts([tmp_path])
    image, lines = drawn(f"a {caption} b", fonts)
    assert not lines
    assert {str(face.font.path) for c, face in fonts.of.items() if c in caption and not c.isascii()} == {str(font)}
    boxes, lines = drawn(f"a {caption} b", Fonts([]))
    assert image.size != boxes.size or image.tobytes() != boxes.tobytes()
    assert len(lines) == 1
    assert "no installed font has these characters" in lines[0]
    package = {"Japanese": "fonts-noto-cjk", "emoji": "fonts-noto-color-emoji"}.get(script, "fonts-noto-core")
    assert lines[0].endswith(f"apt-get install {package}")


def test_missing_characters_are_reported_once_and_fonts_searched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fonts, read = Fonts([write_font(tmp_path / "f/Font.ttf", "é").parent]), []
    monkeypatch.setattr(module, "_load", lambda path, load=module._load: read.append(path) or load(path))
    assert len(drawn("赤 é", fonts)[1]) == 1
    assert not drawn("é 赤", fonts)[1]
    assert len(read) == 1
    assert not drawn("ж", fonts)[1]  # another missing character: one line per run is enough


def test_fonts_of_several_scripts_share_a_line_in_its_direction(tmp_path: Path) -> None:
    write_font(tmp_path / "Hebrew-Sans.ttf", "עיגול")
    write_font(tmp_path / "CJK.ttf", "赤abc")
    fonts = Fonts([tmp_path])
    fonts.search(["עיגול 赤abc"])
    runs = [(Path(face.font.path).stem, text) for face, text in fonts.runs("עיגול 赤abc")]
    assert runs == [("Hebrew-Sans", "עיגול "), ("CJK", "赤abc")]
    shown = []
    for line in ("עיגול 赤", "赤 עיגול"):
        canvas = Image.new("RGB", (150, 20), "white")
        fonts.draw(canvas, (0, 15), line, (0, 0, 0))
        shown.append(np.asarray(canvas)[10, :8].min())
    assert shown[0] == shown[1] == 0
    assert [text for _, text in fonts.runs("赤 עיגול")] == ["赤 ", "עיגול"]


def test_a_colour_font_of_one_size_is_reduced(tmp_path: Path) -> None:
    path = write_font(tmp_path / "Emoji.ttf", "🚀")
    canvas, plain = Image.new("RGB", (40, 20), "white"), Image.new("RGB", (40, 20), "white")
    width = Face(ImageFont.truetype(path, 109), SIZE / 109).draw(canvas, (2, 15), "🚀", (0, 0, 0))
    assert width == pytest.approx(Face(ImageFont.truetype(path, SIZE)).draw(plain, (2, 15), "🚀", (0, 0, 0)), abs=1)
    assert np.abs(np.asarray(canvas, float) - np.asarray(plain, float)).mean() < 12


def test_lines_are_as_wide_as_their_characters() -> None:
    assert wrap("赤い大きな円と星", 8) == ["赤い大き", "な円と星"]
    assert wrap("abcdefgh", 8) == ["abcdefgh"]
    assert wrap("cafe\u0301 half \ud83d", 20) == ["café half ?"]


def test_usual_folders_contain_matplotlibs_dejavu_but_no_placeholder_font(tmp_path: Path) -> None:
    folder = next(f for f in module._usual_folders() if "matplotlib" in str(f))
    assert (folder / "DejaVuSans.ttf").is_file()
    write_font(tmp_path / "LastResortHE-Regular.ttf", "赤")
    assert drawn("赤", Fonts([tmp_path]))[1]
    assert not drawn("красный", Fonts([folder]))[1]
