"""Make a dataset of captioned images without a download."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ldm.errors import UserError
from train.config.load import overlay, wrapped
from train.data.synthetic.emoji import CLDR, FONT, Font, character_names, read_annotations, write_emoji


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Rendered images of one object, or of two objects in a relation, with exact captions."""

    out: str = "data/shapes"
    """Output folder. If it contains exactly this dataset already, it is kept; any other content is an error."""
    size: int = 32
    """Side of the square images in pixels, 32 to 2048."""
    train: Annotated[int, Field(le=10**8)] = 20000
    """Number of training images."""
    test: Annotated[int, Field(le=10**8)] = 1000
    """Number of test images. Half of them show a pair of colour and shape that no training image has."""
    seed: int = 0
    """Seed of the random scenes, at least 0."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """All emoji of the font Noto Color Emoji on white, with their names and keywords as captions."""

    out: str = "data/emoji"
    """Output folder, which must be empty or not exist yet."""
    size: int = 64
    """Side of the square images in pixels, 16 to 128."""
    font: str = str(FONT)
    """Font file of Noto Color Emoji; Debian's package fonts-noto-color-emoji installs it."""
    annotations: str = ""
    """Names and keywords of the emoji: the folder `common` of Unicode's CLDR, or one XML file from it.
    Empty: the folder of Debian's package unicode-cldr-core.
    Without it, only emoji of one character are found, with one caption each."""
    test_fraction: float = 0.05
    """Share of the emoji that are test images, 0.001 to 0.5.
    All skin tones, hair styles and genders of an emoji are in one split."""
    seed: int = 0
    """Seed of the random choice of test emoji, at least 0."""


def make_shapes(o: Shapes) -> None:
    from train.data.synthetic.shapes import write_shapes

    written = write_shapes(Path(o.out), o.size, o.train, o.test, o.seed)
    state = "written" if written else "exists already, not changed"
    print(f"{o.out}: {o.train} training and {o.test} test images of {o.size} × {o.size}, seed {o.seed}: {state}")


def make_emoji(o: Emoji) -> None:
    started = time.perf_counter()
    font = Font(Path(o.font))
    annotations = Path(o.annotations) if o.annotations else CLDR
    if o.annotations or annotations.exists():
        named, source = read_annotations(annotations), str(annotations)
    else:
        named, source = character_names(), "Unicode's character names"
        print(
            f"warning: no annotations in {CLDR}: the dataset will have less than half of the emoji (no flags, skin "
            "tones or genders) and one caption per image (no keywords); install Debian's unicode-cldr-core, or give "
            "--annotations",
            file=sys.stderr,
        )
    train, test, captions = write_emoji(Path(o.out), named, font, o.size, o.test_fraction, o.seed)
    print(
        f"{o.out}: {train} training and {test} test images of {o.size} × {o.size}, seed {o.seed}: written in "
        f"{time.perf_counter() - started:.1f} s, {captions / (train + test):.2f} captions per image from {source}"
    )


def make(arguments: list[str]) -> None:
    """Make the dataset that the first argument names, with the options that follow."""
    kind, *options = arguments or [""]
    program = Path(sys.argv[0]).name
    match kind:
        case "shapes":
            make_shapes(overlay(Shapes, Shapes(), options, usage=kind))
        case "emoji":
            make_emoji(overlay(Emoji, Emoji(), options, usage=kind))
        case "--help" | "-h":
            print(f"usage: {program} [-h] {{shapes,emoji}} [OPTIONS]\n\n{__doc__}\n")
            for name, dataset in (("shapes", Shapes), ("emoji", Emoji)):
                print(wrapped(f"{name}: {dataset.__doc__}"))
            print(f"\n{program} shapes --help and {program} emoji --help list the options.")
        case _:
            problem = f"{kind!r}: must be shapes or emoji" if kind else "the dataset is missing"
            raise UserError(f"{problem}; give it as the first argument, e.g. {program} shapes --out data/shapes")
