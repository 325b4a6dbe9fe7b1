"""Make a dataset of captioned images: rendered Shapes, or the emoji of a font or of several artists."""

import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ldm.errors import UserError
from train.config.load import overlay, wrapped
from train.data.synthetic.emoji import CLDR, FONT, Font, character_names, read_annotations, write_emoji
from train.data.synthetic.emoji_sets import fetch, find_packages, read_names, read_sets
from train.data.synthetic.emoji_styles import resvg, write_styles


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


@dataclass(frozen=True, kw_only=True)
class EmojiStyles:
    """The same emoji drawn by several artists, on white, with captions such as "red apple, noto style".

    Pairs of a concept and an artist are held out (test), and concepts (concepts). Needs `pip install resvg_py`.
    """

    out: str = "data/styles"
    """Output folder, which must be empty or not exist yet."""
    size: int = 64
    """Side of the square images in pixels, 16 to 512."""
    packages: str = ""
    """Folder of the packages with the drawings and names: .tgz files of `npm pack`, or node_modules.
    Empty: npm fetches them, 40 MB."""
    pair_fraction: float = 0.06
    """Share of the pairs of a concept and an artist that are test images, 0.001 to 0.5."""
    concept_fraction: float = 0.03
    """Share of the concepts that are held out in all styles, 0.001 to 0.5."""
    seed: int = 0
    """Seed of the random choice of the held-out images, at least 0."""


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


def make_emoji_styles(o: EmojiStyles) -> None:
    started = time.perf_counter()
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("emoji-styles are rendered by resvg, which isn't installed: run pip install resvg_py")
    with tempfile.TemporaryDirectory(prefix="emoji-") as temporary:
        if not o.packages:
            fetch(Path(temporary))
        packages = find_packages(Path(o.packages or temporary))
        named = read_names(packages)
        sets = read_sets(packages, named)
    written = write_styles(
        Path(o.out),
        named,
        sets,
        resvg,
        side=o.size,
        pair_fraction=o.pair_fraction,
        concept_fraction=o.concept_fraction,
        seed=o.seed,
    )
    for style, reason in written.left_out.items():
        print(f"warning: {style} is left out: {reason}", file=sys.stderr)
    train, test, concepts = written.images.values()
    print(
        f"{o.out}: {train} training images, {test} of held-out pairs (test) and {concepts} of held-out concepts "
        f"(concepts) of {o.size} × {o.size}, seed {o.seed}: written in {time.perf_counter() - started:.1f} s, "
        f"{written.captions / (train + test + concepts):.2f} captions per image; licences: {o.out}/README.md"
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
        case "emoji-styles":
            make_emoji_styles(overlay(EmojiStyles, EmojiStyles(), options, usage=kind))
        case "--help" | "-h":
            print(f"usage: {program} [-h] {{shapes,emoji,emoji-styles}} [OPTIONS]\n\n{__doc__}\n")
            for name, dataset in (("shapes", Shapes), ("emoji", Emoji), ("emoji-styles", EmojiStyles)):
                print(wrapped(f"{name}: {dataset.__doc__}"))
            print(f"\n{program} DATASET --help lists the options of a dataset, e.g. {program} shapes --help.")
        case _:
            problem = f"{kind!r}: must be shapes, emoji or emoji-styles" if kind else "the dataset is missing"
            raise UserError(f"{problem}; give it as the first argument, e.g. {program} shapes --out data/shapes")
