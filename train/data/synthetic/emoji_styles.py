"""The Emoji dataset in styles: the same concepts drawn by several artists, with captions that name the style.

A concept is an emoji with all its skin tones, hair styles and genders (`emoji.base`). Two kinds of images are held out:

    test       pairs of a concept and an artist: other artists' drawings of the concept are training images, and so are
               the artist's other concepts. All versions of an artist's design are held out together.
    concepts   concepts that no training image shows, in any style

So the right image of a new combination exists, and composition can be measured exactly (train/evaluation/styles.py).
"""

import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image
from tqdm import tqdm

from ldm.errors import UserError
from train.data.store.atomic import new_folder
from train.data.synthetic.emoji import Named, base, is_usable, merge_captions, require_new
from train.data.synthetic.emoji_sets import LICENCES, Drawings, EmojiSet

ABOUT = "styles.json"
"""File in the dataset's folder that states its styles and sets."""
SPLITS: tuple["Split", ...] = ("train", "test", "concepts")
SMALLEST_SIDE, LARGEST_SIDE = 16, 512

Split = Literal["train", "test", "concepts"]
Rasterise = Callable[[str, int], Image.Image | None]  # SVG, side → its RGB image on white, None if it can't be drawn

_OUTSIDE = re.compile(r"""<(image|script|foreignObject|text)\b|href=["'](?!#)|url\((?!['"]?#)""", re.IGNORECASE)
_HANDS_LEFT = 2  # smallest number of artists whose drawings of a concept are training images, if others are held out


@dataclass
class Picture:
    """An image of an emoji in one style."""

    text: str
    set: EmojiSet
    png: bytes
    captions: tuple[str, ...]

    @property
    def concept(self) -> str:
        return base(self.text)

    @property
    def file(self) -> str:
        return f"{self.set.style.replace(' ', '-')}/{'-'.join(f'{ord(c):04x}' for c in self.text)}.png"


class Written(NamedTuple):
    """Number of images in each split, of their captions, and of the sets that were left out."""

    images: Mapping[Split, int]
    captions: int
    left_out: Mapping[str, str]
    """Reasons by style."""


def resvg(svg: str, side: int) -> Image.Image | None:
    """Render SVG with resvg, which draws the gradients, masks and filters of these sets.

    resvg draws layers with filters without smooth edges, so an image with filters is rendered at twice its size.
    """
    import resvg_py

    scale = 2 if "<filter" in svg else 1
    box = side * scale  # the image keeps its shape
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=box, height=box, background="white", skip_system_fonts=True)
    except ValueError:
        return None
    image = Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGB").reduce(scale)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def style_captions(captions: Iterable[str], style: str) -> tuple[str, ...]:
    """Return captions that name the style: "red apple, noto style", and lists of keywords as "noto style: apple, red".

    The style comes before a long list, because an encoder truncates at the end.
    """
    return tuple(f"{style} style: {text}" if text.count(", ") > 1 else f"{text}, {style} style" for text in captions)


def render_sets(sets: Sequence[Drawings], named: Iterable[Named], rasterise: Rasterise, side: int) -> list[Picture]:
    """Render the sets' usable emoji. Equal images of a set are merged; of a later set they are left out.

    Drawings that refer to other files, or that contain text, which depends on installed fonts, are left out too.
    """
    captions = dict(named)
    found: dict[bytes, Picture] = {}
    jobs = [(drawn, text) for drawn in sets for text in captions if text in drawn.svg and is_usable(text)]
    for drawn, text in tqdm(jobs, unit=" images", disable=None):
        svg = drawn.svg[text]
        image = None if _OUTSIDE.search(svg) else rasterise(svg, side)
        if image is None or image.getextrema() == ((255, 255),) * 3:
            continue
        digest = hashlib.sha256(image.tobytes()).digest()
        own = style_captions(captions[text], drawn.set.style)
        if digest not in found:
            file = io.BytesIO()
            image.save(file, "PNG")
            found[digest] = Picture(text, drawn.set, file.getvalue(), own)
        elif found[digest].set == drawn.set:
            found[digest].captions = merge_captions([*found[digest].captions, *own])
    return list(found.values())


# Splits


def split_pictures(
    pictures: Iterable[Picture], pair_fraction: float, concept_fraction: float, seed: int
) -> dict[tuple[str, str], Split]:
    """Return the split of each pair of concept and hand, by seeded hashes, which other concepts don't change.

    A share of the concepts is held out in all styles. Of the other concepts' pairs, a share is held out, as far as at
    least two hands' drawings of the concept remain.
    """
    hands: dict[str, set[str]] = defaultdict(set)
    for picture in pictures:
        hands[picture.concept].add(picture.set.hand)
    splits: dict[tuple[str, str], Split] = {}
    for concept, drawn in hands.items():
        hidden = _hash(seed, concept) < concept_fraction
        order = sorted(drawn, key=lambda hand: _hash(seed, concept, hand))
        for k, hand in enumerate(order):
            held = k < len(order) - _HANDS_LEFT and _hash(seed, concept, hand) < pair_fraction
            splits[concept, hand] = "concepts" if hidden else "test" if held else "train"
    return splits


def _hash(*key: object) -> float:
    """Return a number in [0, 1) for a key."""
    return int.from_bytes(hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=8).digest()) / 2.0**64


# Files


def write_styles(
    out: Path,
    named: Sequence[Named],
    sets: Sequence[Drawings],
    rasterise: Rasterise,
    *,
    side: int = 64,
    pair_fraction: float = 0.06,
    concept_fraction: float = 0.03,
    seed: int = 0,
) -> Written:
    """Write the dataset as an imagefolder: out/{train,test,concepts}/metadata.jsonl, with the images in folders.

    A row has file_name, text (a list), emoji, concept, style and hand. styles.json states the sets, README.md their
    licences. Raises UserError for a number out of range, for an `out` that isn't empty, and if a split would be empty.
    The dataset appears completely or not at all; the same arguments write the same bytes.
    """
    for option, value, least, most in (
        ("size", side, SMALLEST_SIDE, LARGEST_SIDE),
        ("pair-fraction", pair_fraction, 0.001, 0.5),
        ("concept-fraction", concept_fraction, 0.001, 0.5),
        ("seed", seed, 0, 2**64 - 1),
    ):
        if not least <= value <= most:
            raise UserError(f"--{option} {value}: must be from {least} to {most}")
    out = require_new(out)
    left_out = {
        s.set.style: f"its licence {s.licence['spdx']} isn't one of {', '.join(LICENCES)}"
        for s in sets
        if s.licence["spdx"] not in LICENCES
    }
    used = [s for s in sets if s.set.style not in left_out]
    pictures = render_sets(used, named, rasterise, side)
    splits = split_pictures(pictures, pair_fraction, concept_fraction, seed)
    parts: dict[Split, list[Picture]] = {name: [] for name in SPLITS}
    for picture in pictures:
        parts[splits[picture.concept, picture.set.hand]].append(picture)
    if empty := [name for name, part in parts.items() if not part]:
        raise UserError(
            f"only {len(pictures)} images of {len(used)} sets: there would be none in {', '.join(empty)}; give more "
            "complete packages, or larger fractions"
        )
    about = {
        "size": side,
        "seed": seed,
        "pair_fraction": pair_fraction,
        "concept_fraction": concept_fraction,
        "sets": [_about(s, pictures) for s in used],
        "left_out": left_out,
    }
    with new_folder(out) as folder:
        for name, part in parts.items():
            _write_split(folder / name, part)
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(_card(about, parts), encoding="utf-8")
    return Written({name: len(part) for name, part in parts.items()}, sum(len(p.captions) for p in pictures), left_out)


def _about(s: Drawings, pictures: Iterable[Picture]) -> dict[str, Any]:
    return {
        "style": s.set.style,
        "hand": s.set.hand,
        "package": s.set.package,
        "version": s.version,
        "licence": dict(s.licence),
        "images": sum(p.set == s.set for p in pictures),
        "drawings_without_an_emoji": s.unmatched,
    }


def _card(about: Mapping[str, Any], parts: Mapping[Split, Sequence[Picture]]) -> str:
    """Return the dataset's card, in Markdown."""
    counts = ", ".join(f"{len(part):,} in {name}" for name, part in parts.items())
    lines = [
        "# Emoji in styles",
        "",
        f"{sum(map(len, parts.values())):,} images of {about['size']} × {about['size']} pixels ({counts}).",
        "`test` has the pairs of a concept and an artist that are held out, `concepts` the concepts that are held out.",
        "",
        "| style | artists | images | package | licence |",
        "|---|---|---|---|---|",
    ]
    for s in about["sets"]:
        licence = s["licence"]
        lines.append(
            f"| {s['style']} | {licence['author']} | {s['images']:,} | {s['package']} {s['version']} | "
            f"[{licence['title']}]({licence['url']}) |"
        )
    lines += [f"\nLeft out: {style}, because {reason}." for style, reason in about["left_out"].items()]
    lines += [
        "",
        "Images that you show or pass on keep their set's licence: name the artists; those under CC BY-SA have to stay",
        "under it. Each image was rendered from SVG on white. Names and keywords: Unicode CLDR, Unicode-3.0 licence.",
    ]
    return "\n".join(lines) + "\n"


def _write_split(folder: Path, pictures: Iterable[Picture]) -> None:
    folder.mkdir(parents=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for p in pictures:
            path = folder / p.file
            os.makedirs(path.parent, exist_ok=True)
            path.write_bytes(p.png)
            row = {"file_name": p.file, "text": p.captions, "emoji": p.text, "concept": p.concept}
            lines.write(json.dumps(row | {"style": p.set.style, "hand": p.set.hand}) + "\n")
