"""Grids of images: one for each pair of values of two settings, as users of AUTOMATIC1111's web UI know them."""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self, get_args

from PIL import Image, ImageDraw, ImageFont

from ldm.editing import steps_for_strength
from ldm.errors import UserError
from ldm.formats.png import file_name, read_png
from ldm.kinds import Spacing
from ldm.samplers import SamplerKind
from train.commands.generate import Session
from train.commands.outputs import write_png
from train.config.generation import GenerateOptions
from train.config.load import validate
from train.page.jobs import Job
from train.page.painting import MOST, Progress, run
from train.page.places import Places
from train.page.shared import Page

MOST_CELLS = 100
_CELL = 128  # pixels
_EXACT = Image.Resampling.NEAREST
_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\s*-\s*(-?\d+(?:\.\d+)?)\s*(?:\(([+-]\d+(?:\.\d+)?)\)|\[(\d+)\])?")
_REPLACE = "Prompt: search and replace"
AXES: dict[str, str] = {
    "Steps": "steps",
    "Guidance": "guidance_scale",
    "Sampler": "sampler",
    "Seed": "seed",
    "Prompt": "prompt",
    _REPLACE: "prompt",
    "Negative prompt": "negative_prompt",
    "Model": "model",
    "Spacing": "spacing",
    "Eta": "eta",
    "Guidance rescale": "guidance_rescale",
    "Width": "width",
    "Height": "height",
    "Strength": "strength",
    "Feather": "feather",
}
"""Option of each name of an axis."""
_INTEGERS = ("steps", "seed", "width", "height")
_NUMBERS = (*_INTEGERS, "guidance_scale", "eta", "guidance_rescale", "strength", "feather")
_CHOICES: dict[str, tuple[str, ...]] = {"sampler": get_args(SamplerKind), "spacing": get_args(Spacing)}


Change = Callable[[GenerateOptions], GenerateOptions]


@dataclass(frozen=True)
class Axis:
    """Values of one setting."""

    name: str
    values: tuple[tuple[str, Change], ...]
    """Label of each value, and the change that it makes to the options."""

    @classmethod
    def read(cls, name: object, text: object, places: Places, o: GenerateOptions) -> Self:
        """Read the values of an axis, a list separated by commas; in quotes, a value may have commas.

        Numbers may be ranges: 1-5, 1-9 (+2) or 1-9 [5], the latter with five values. Raises UserError.
        """
        if not isinstance(name, str) or name not in AXES:
            raise UserError(f"axis {str(name)[:50]!r}: choose {', '.join(AXES)}")
        option = AXES[name]
        if not hasattr(o, option):
            raise UserError(f"{name}: isn't a setting of this kind of image; choose another axis")
        words = [
            word.strip() for line in csv.reader(str(text or "").split("\n"), skipinitialspace=True) for word in line
        ]
        words = [word for word in words if word]
        if option in _NUMBERS:
            words = [value for word in words for value in _numbers(name, word, option in _INTEGERS)]
        if not words:
            raise UserError(f"{name}: give one or more values, separated by commas")
        if len(words) > MOST_CELLS:
            raise UserError(f"{name}: {len(words)} values; up to {MOST_CELLS} are accepted")
        return cls(name, tuple((word, _change(name, word, words[0], places, o)) for word in words))


def _numbers(name: str, word: str, whole: bool) -> list[str]:
    """Return the numbers of a word such as 3, 1-5, 1-9 (+2) or 1-9 [5]."""
    if (found := _RANGE.fullmatch(word)) is None:
        return [word]
    first, last = float(found[1]), float(found[2])
    if found[4]:
        count = int(found[4])
        step = (last - first) / max(1, count - 1)
    else:
        step = float(found[3] or (1 if last >= first else -1))
        count = int((last - first) / step + 1e-9) + 1 if step else 0
    if not 1 <= count <= MOST_CELLS:
        raise UserError(f"{name} {word[:50]!r}: must be a range of 1 to {MOST_CELLS} values")
    numbers = [first + k * step for k in range(count)]
    return [str(round(number)) if whole else f"{number:g}" for number in numbers]


def _change(name: str, word: str, first: str, places: Places, o: GenerateOptions) -> Change:
    """Return the change that a value makes. first: the first value of the axis. Raises UserError for a wrong one."""
    option = AXES[name]
    if name == _REPLACE:
        if first not in o.prompt:
            raise UserError(f"{name}: {first[:50]!r} isn't in the prompt; the first value is what is replaced")
        return lambda o: replace(o, prompt=o.prompt.replace(first, word))
    value: object = word
    if option == "model":
        value = str(places.model(word))
    elif option in _CHOICES and word not in _CHOICES[option]:
        raise UserError(f"{name} {word[:50]!r}: choose {', '.join(_CHOICES[option])}")
    elif option in _NUMBERS:
        value = number = getattr(validate(type(o), {option: word}), option)
        if option == "strength":
            steps_for_strength(number, o.number_of_steps)
        if option in MOST and not 1 <= number <= MOST[option]:
            raise UserError(f"{name} {word[:50]}: must be 1 to {MOST[option]}")
    return lambda o: replace(o, **{option: value})  # type: ignore[arg-type]


def require_few(columns: Axis, rows: Axis | None) -> int:
    """Return the number of cells. Raises UserError if there are too many."""
    cells = len(columns.values) * (len(rows.values) if rows else 1)
    if cells > MOST_CELLS:
        raise UserError(f"the grid has {cells} cells; up to {MOST_CELLS} are accepted")
    return cells


def paint_grid(page: Page, job: Job, o: GenerateOptions, columns: Axis, rows: Axis | None) -> Iterator[Path]:
    """Generate the image of each cell, and yield its path; then that of the grid."""
    lines = rows.values if rows else (("", lambda o: o),)
    options = {
        (r, c): column(line(o)) for r, (_, line) in enumerate(lines) for c, (_, column) in enumerate(columns.values)
    }
    session = Session(page.models.load, Progress(job, *options.values()))
    paths: dict[tuple[int, int], Path] = {}
    for cell in sorted(options, key=lambda cell: options[cell].model):  # so that each model is loaded once
        (paths[cell],) = run(options[cell], session)
        yield paths[cell]
    sheet = draw_grid(
        [[_open(paths[r, c]) for c in range(len(columns.values))] for r in range(len(lines))],
        [f"{columns.name}: {label}" for label, _ in columns.values],
        [f"{rows.name}: {label}" for label, _ in lines] if rows else [],
    )
    about = {axis.name: [label for label, _ in axis.values] for axis in ([columns, rows] if rows else [columns])}
    settings = read_png(paths[0, 0]) | {"grid": about}
    yield write_png(sheet, Path(o.out), f"grid-{file_name(o.prompt, o.seed)}", settings)


def draw_grid(
    images: Sequence[Sequence[Image.Image]], columns: Sequence[str], rows: Sequence[str], font_size: int = 14
) -> Image.Image:
    """Draw images in a table with labels of its columns and rows, whose text is broken to fit.

    Small images are enlarged by a whole factor.
    """
    font, gap = ImageFont.load_default(font_size), 6
    factor = max(1, _CELL // max(side for row in images for image in row for side in image.size))
    images = [[image.resize((factor * image.width, factor * image.height), _EXACT) for image in row] for row in images]
    width = max(_CELL, *(image.width for row in images for image in row))
    height = max(image.height for row in images for image in row)
    broken = [_lines(label, width, font) for label in columns]
    named = [_lines(label, 160, font) for label in rows]
    line = font_size + 4
    top, left = line * max(map(len, broken)) + gap, 160 + gap if rows else 0
    height = max(height, *(line * len(words) for words in named)) if rows else height
    size = (left + (width + gap) * len(columns), top + (height + gap) * len(images))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for c, words in enumerate(broken):
        pen.multiline_text((left + c * (width + gap), 0), "\n".join(words), "black", font)
    for r, row in enumerate(images):
        y = top + r * (height + gap)
        if rows:
            pen.multiline_text((0, y), "\n".join(named[r]), "black", font)
        for c, image in enumerate(row):
            sheet.paste(image, (left + c * (width + gap), y))
    return sheet


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int = 4) -> list[str]:
    """Break text into up to `most` lines that are at most `width` pixels wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    fits = []
    for line in lines:
        while font.getlength(line) > width:
            line = f"{line.rstrip('…')[:-1]}…"
        fits.append(line)
    return [*fits[: most - 1], fits[most - 1] + "…"] if len(fits) > most else fits


def _open(path: Path) -> Image.Image:
    with Image.open(path, formats=["PNG"]) as image:
        return image.convert("RGB")
