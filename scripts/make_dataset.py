"""Make a data set of captioned pictures that needs no download."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from train.commands.main import command
from train.config.load import overlay
from train.data.synthetic.emoji import CLDR, FONT, Font, character_names, read_annotations, write_emoji


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """One or two plain objects in a relation, with exact captions (docs: the Shapes set)."""

    out: str = "data/shapes"
    """Folder to make; one that holds this very set is left as it is, any other is refused."""
    size: int = 32
    """Side of the pictures in pixels, at least 32."""
    train: int = 20000
    """Pictures for training."""
    test: int = 1000
    """Pictures for testing, half of them with a (colour, shape) pair that training never shows."""
    seed: int = 0
    """Another seed makes another set."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """Every emoji of Noto Color Emoji on white, with its names and keywords as captions."""

    out: str = "data/emoji"
    """Folder to make; one that isn't empty is refused."""
    size: int = 64
    """Side of the pictures in pixels, 16 to 128."""
    font: str = str(FONT)
    """File of Noto Color Emoji; Debian's package is fonts-noto-color-emoji."""
    annotations: str = ""
    """CLDR's folder common, or one XML file of annotations. Unless given, that of Debian's unicode-cldr-core; without it
    only single characters are found, with one caption each."""
    test_fraction: float = 0.05
    """Share of the emoji, each with all its skins, hair and genders, that is kept for testing."""
    seed: int = 0
    """Another seed keeps others for testing."""


def make_shapes(o: Shapes) -> None:
    from train.data.synthetic.shapes import write_shapes

    written = write_shapes(Path(o.out), o.size, o.train, o.test, o.seed)
    state = "written" if written else "already there, left as it is"
    print(f"{o.out}: {o.train} training and {o.test} test pictures of {o.size} × {o.size}, seed {o.seed}: {state}")


def make_emoji(o: Emoji) -> None:
    began = time.perf_counter()
    font = Font(Path(o.font))
    annotations = Path(o.annotations) if o.annotations else CLDR
    if o.annotations or annotations.exists():
        named, source = read_annotations(annotations), str(annotations)
    else:
        named, source = character_names(), "Unicode's character names"
        print(f"warning: no CLDR at {CLDR}, so the set will be less than half of the whole one, with a single caption a "
              "picture: no flags, skin tones or genders, no keywords; install Debian's unicode-cldr-core, or give "
              "--annotations", file=sys.stderr)  # fmt: skip
    train, test, captions = write_emoji(Path(o.out), named, font, o.size, o.test_fraction, o.seed)
    print(f"{o.out}: {train} training and {test} test pictures of {o.size} × {o.size}, seed {o.seed}: written in "
          f"{time.perf_counter() - began:.1f} s, {captions / (train + test):.2f} captions a picture from {source}")  # fmt: skip


def main() -> None:
    kind, *arguments = sys.argv[1:] or [""]
    match kind:
        case "shapes":
            make_shapes(overlay(Shapes, Shapes(), arguments))
        case "emoji":
            make_emoji(overlay(Emoji, Emoji(), arguments))
        case "--help" | "-h":
            print(f"usage: {sys.argv[0]} [-h] {{shapes,emoji}} [OPTIONS]\n\n{__doc__}")
            print(f"  shapes  {Shapes.__doc__}\n  emoji   {Emoji.__doc__}")
        case _:
            raise UserError(f"say first which data set to make: shapes or emoji, not {kind!r}")


if __name__ == "__main__":
    command(main)
