"""Make a dataset of captioned images without a download."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from train.config.load import overlay
from train.data.synthetic.emoji import CLDR, FONT, Font, character_names, read_annotations, write_emoji


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Images of one object, or of two in a relation, with exact captions (docs: the Shapes dataset)."""

    out: str = "data/shapes"
    """Output folder; a folder that holds exactly this dataset is kept, any other content is rejected."""
    size: int = 32
    """Side of the images in pixels, at least 32."""
    train: int = 20000
    """Number of training images."""
    test: int = 1000
    """Number of test images; half of them show a (colour, shape) pair that is absent from the training images."""
    seed: int = 0
    """Seed of the dataset."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """All emoji of Noto Color Emoji on white, with their names and keywords as captions."""

    out: str = "data/emoji"
    """Output folder; a folder that isn't empty is rejected."""
    size: int = 64
    """Side of the images in pixels, 16 to 128."""
    font: str = str(FONT)
    """Font file of Noto Color Emoji; the Debian package is fonts-noto-color-emoji."""
    annotations: str = ""
    """CLDR's folder common, or one XML file of annotations. Default: the folder of Debian's unicode-cldr-core. Without
    annotations, only single characters are found, with one caption each."""
    test_fraction: float = 0.05
    """Share of the emoji held out for testing, each with all its skin tones, hair styles and genders."""
    seed: int = 0
    """Seed that selects the test emoji."""


def make_shapes(o: Shapes) -> None:
    from train.data.synthetic.shapes import write_shapes

    written = write_shapes(Path(o.out), o.size, o.train, o.test, o.seed)
    state = "written" if written else "already there, left as it is"
    print(f"{o.out}: {o.train} training and {o.test} test images of {o.size} × {o.size}, seed {o.seed}: {state}")


def make_emoji(o: Emoji) -> None:
    began = time.perf_counter()
    font = Font(Path(o.font))
    annotations = Path(o.annotations) if o.annotations else CLDR
    if o.annotations or annotations.exists():
        named, source = read_annotations(annotations), str(annotations)
    else:
        named, source = character_names(), "Unicode's character names"
        print(
            f"warning: no CLDR at {CLDR}, so the set will be less than half of the whole one, with a single caption an "
            "image: no flags, skin tones or genders, no keywords; install Debian's unicode-cldr-core, or give "
            "--annotations",
            file=sys.stderr,
        )
    train, test, captions = write_emoji(Path(o.out), named, font, o.size, o.test_fraction, o.seed)
    print(
        f"{o.out}: {train} training and {test} test images of {o.size} × {o.size}, seed {o.seed}: written in "
        f"{time.perf_counter() - began:.1f} s, {captions / (train + test):.2f} captions an image from {source}"
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
            print(f"usage: {program} [-h] {{shapes,emoji}} [OPTIONS]\n\n{__doc__}")
            print(f"  shapes  {Shapes.__doc__}\n  emoji   {Emoji.__doc__}")
        case _:
            raise UserError(f"say first which data set to make: shapes or emoji, not {kind!r}")
