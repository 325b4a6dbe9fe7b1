"""The Shapes dataset: one or two plain objects on a plain background, each image with an exact caption.

A scene contains only words; `render` adds the geometry (position and size jitter, in fractions of the side) from a
generator, so the same scene and generator give the same image at every size. Every example is a pure function of (seed,
split, index): NumPy's Philox keyed by (seed, purpose), with the index as its counter. Some (colour, shape) pairs,
`HELD_OUT`, never occur in training, so prompts with them test composition and not memory.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never, get_args

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ldm.errors import UserError
from train.data.store.atomic import new_folder

Shape = Literal["circle", "square", "triangle", "star", "cross"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "orange"]
Size = Literal["small", "large"]
Relation = Literal["above", "below", "left of", "right of"]
Background = Literal["white", "black", "grey", "pink"]
Kind = Literal["seen", "unseen"]
Split = Literal["train", "test"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
COLOURS: dict[Colour, tuple[int, int, int]] = {
    "red": (215, 20, 35),
    "green": (20, 150, 50),
    "blue": (30, 80, 235),
    "yellow": (255, 235, 30),
    "purple": (140, 30, 165),
    "orange": (250, 125, 10),
}
BACKGROUNDS: dict[Background, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "grey": (135, 135, 135),
    "pink": (255, 170, 215),
}
DIAMETERS: dict[Size, float] = {"small": 0.28, "large": 0.42}  # of the side, before jitter
HELD_OUT: frozenset[tuple[Colour, Shape]] = frozenset(
    {
        ("red", "triangle"),
        ("green", "square"),
        ("blue", "circle"),
        ("yellow", "star"),
        ("purple", "cross"),
        ("orange", "triangle"),
    }
)

SIZE_JITTER = 0.03  # largest relative change of a diameter
MARGIN, GAP = 1 / 32, 2 / 32  # between an object and the border, and between two objects
SLANT = 0.5  # largest displacement across a relation's axis, as a share of that along it
SMALLEST_SIDE, LARGEST_SIDE = 32, 2048
FILES_PER_FOLDER = 1000
_PURPOSES: dict[Split | Literal["prompts"], int] = {"train": 0x5AE0, "test": 0x5AE1, "prompts": 0x5AE2}


@dataclass(frozen=True, slots=True)
class Object:
    """One object of a scene."""

    shape: Shape
    colour: Colour
    size: Size

    def __post_init__(self) -> None:
        for value, allowed in ((self.shape, SHAPES), (self.colour, COLOURS), (self.size, DIAMETERS)):
            if value not in allowed:
                raise ValueError(f"{value!r} must be one of {', '.join(allowed)}")

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """One or two objects on a background. With two, `relation` is the relation of the first to the second."""

    objects: tuple[Object, ...]
    relation: Relation | None
    background: Background

    def __post_init__(self) -> None:
        if len(self.objects) != (1 if self.relation is None else 2):
            raise ValueError(
                f"{len(self.objects)} objects with relation {self.relation!r}: must be one object with relation None, "
                "or two with a relation"
            )
        if self.relation not in (None, *RELATIONS):
            raise ValueError(f"relation {self.relation!r} must be one of {', '.join(RELATIONS)}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background {self.background!r} must be one of {', '.join(BACKGROUNDS)}")

    @property
    def caption(self) -> str:
        return f"{f' {self.relation} '.join(map(str, self.objects))} on a {self.background} background"

    def to_dict(self) -> dict[str, Any]:
        # Not by dataclasses.asdict, which copies deeply.
        things = [{"shape": o.shape, "colour": o.colour, "size": o.size} for o in self.objects]
        return {"objects": things, "relation": self.relation, "background": self.background}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Scene":
        """Return the scene with the fields of `to_dict`. Raises ValueError for invalid fields."""
        try:
            things = tuple(Object(**thing) for thing in fields["objects"])
            return cls(things, fields["relation"], fields["background"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a scene: {dict(fields)!r} ({error})") from error


_A_THING = f"a ({'|'.join(DIAMETERS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(f"{_A_THING}(?: ({'|'.join(RELATIONS)}) {_A_THING})? on a ({'|'.join(BACKGROUNDS)}) background")


def parse_caption(text: str) -> Scene:
    """Return the scene whose caption is `text`. Raises ValueError if there is none."""
    match = _CAPTION.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a caption of the Shapes dataset; an example of one is "
            "'a small blue star above a large yellow square on a black background'"
        )
    words: tuple[Any, ...] = match.groups()
    size, colour, shape, relation, size2, colour2, shape2, background = words
    second = () if relation is None else (Object(shape2, colour2, size2),)
    return Scene((Object(shape, colour, size), *second), relation, background)


def is_unseen(scene: Scene) -> bool:
    """Return whether any of a scene's (colour, shape) pairs is held out of training."""
    return any((thing.colour, thing.shape) in HELD_OUT for thing in scene.objects)


@cache
def all_scenes(count: int, unseen: bool) -> tuple[Scene, ...]:
    """Return all scenes of `count` (1 or 2) objects, either those with a held-out pair or those without."""
    things = [Object(*words) for words in itertools.product(SHAPES, COLOURS, DIAMETERS)]
    relations = RELATIONS if count == 2 else (None,)
    parts = itertools.product(itertools.permutations(things, count), relations, BACKGROUNDS)
    return tuple(scene for scene in itertools.starmap(Scene, parts) if is_unseen(scene) == unseen)


def random_scene(rng: Generator, *, unseen: bool) -> Scene:
    """Return a random scene: with probability 1/3 any scene of one object, else any scene of two, uniformly."""
    pool = all_scenes(1 if rng.integers(3) == 0 else 2, unseen)
    return pool[rng.integers(len(pool))]


def prompts(kind: Kind, count: int, seed: int) -> list[Scene]:
    """Return `count` scenes for prompts: every third has one object, the others have two.

    No scene is repeated before all are used. Both kinds have the same mix, so that their scores are comparable. There
    are 192 seen and 48 unseen scenes of one object.
    """
    rng = generator(seed, "prompts", 0)
    pools = [all_scenes(1, kind == "unseen"), all_scenes(2, kind == "unseen")]
    endless = [itertools.cycle([pool[place] for place in rng.permutation(len(pool))]) for pool in pools]
    return [next(endless[index % 3 > 0]) for index in range(count)]


def generator(seed: int, purpose: Split | Literal["prompts"], index: int) -> Generator:
    """Return the generator of one example. seed: 0 … 2^64 − 1."""
    return Generator(Philox(key=[seed, _PURPOSES[purpose]], counter=[0, 0, index, 0]))


def example(seed: int, split: Split, index: int) -> tuple[Scene, Generator]:
    """Return scene `index` of a split, and the generator for rendering it. Test scenes of odd index are unseen."""
    rng = generator(seed, split, index)
    return random_scene(rng, unseen=split == "test" and index % 2 == 1), rng


class Placed(NamedTuple):
    """Placement of an object: centre and radius (half the diameter), in fractions of the side, y downwards."""

    x: float
    y: float
    radius: float


def place(scene: Scene, rng: Generator) -> tuple[Placed, ...]:
    """Place the objects of a scene inside the image, apart from each other, and in their relation."""
    radii = [DIAMETERS[thing.size] / 2 * rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER) for thing in scene.objects]
    if scene.relation is None:
        room = MARGIN + radii[0]
        centre = rng.uniform(room, 1 - room, size=2)
        return (Placed(centre[0], centre[1], radii[0]),)
    swapped = scene.relation in ("below", "right of")  # the second object comes first along the axis
    first, second = radii[::-1] if swapped else radii
    # Along the axis: border, first, gap, second, border; the remaining length is split randomly between the spaces.
    spaces = np.array([MARGIN, GAP, MARGIN])
    spaces += rng.dirichlet([1, 1, 1]) * (1 - 2 * (first + second) - spaces.sum())
    along = [spaces[0] + first, 1 - spaces[2] - second]
    slant = SLANT * (along[1] - along[0])
    across = [rng.uniform(MARGIN + first, 1 - MARGIN - first)]
    across.append(rng.uniform(max(MARGIN + second, across[0] - slant), min(1 - MARGIN - second, across[0] + slant)))
    vertical = scene.relation in ("above", "below")
    x, y = (across, along) if vertical else (along, across)
    placed = tuple(map(Placed, x, y, (first, second)))
    return placed[::-1] if swapped else placed


def outline(shape: Shape, x: NDArray[np.floating], y: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return the signed distance to the outline of a shape of radius 1 at the origin (y downwards), negative inside.

    It is exact near straight edges, and a lower bound near corners.
    """
    match shape:
        case "circle":
            return np.hypot(x, y) - 1
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - 0.88
        case "triangle":  # equilateral
            half = math.sqrt(3) / 2
            return np.maximum(y - half, (2 * half * np.abs(x) - y - half) / 2)
        case "cross":
            x, y = np.abs(x), np.abs(y)
            return np.minimum(np.maximum(x - 1, y - 0.34), np.maximum(x - 0.34, y - 1))
        case "star":  # five points: fold the plane into half of one, where the outline is a line from tip to notch
            tip, notch, tenth = 1.05, 0.46, math.pi / 5
            y = y - 0.1
            radius, angle = np.hypot(x, y), np.arctan2(x, -y)
            folded = np.abs((angle + tenth) % (2 * tenth) - tenth)
            normal = np.array([notch * math.sin(tenth), tip - notch * math.cos(tenth)])
            normal /= np.hypot(*normal)
            return normal[0] * (radius * np.cos(folded) - tip) + normal[1] * radius * np.sin(folded)
        case _:
            assert_never(shape)


class Box(NamedTuple):
    """A rectangle in an image, in whole pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


def coverage(shape: Shape, placed: Placed, box: Box, samples: int = 4) -> NDArray[np.floating]:
    """Return how much of each pixel of `box` a shape covers, (h, w), 0 to 1, by samples² points per pixel.

    placed: in pixels.
    """
    x = (np.arange((box.right - box.left) * samples) + 0.5) / samples + (box.left - placed.x)
    y = (np.arange((box.bottom - box.top) * samples) + 0.5) / samples + (box.top - placed.y)
    distance = outline(shape, x[None, :] / placed.radius, y[:, None] / placed.radius) * (placed.radius * samples)
    inside = np.clip(0.5 - distance, 0, 1)  # (h samples, w samples)
    return inside.reshape(len(y) // samples, samples, len(x) // samples, samples).mean(axis=(1, 3))


def render(scene: Scene, side: int, rng: Generator) -> NDArray[np.uint8]:
    """Render a scene, (side, side, 3), with random geometry from `rng`."""
    image = np.empty((side, side, 3))
    image[:] = BACKGROUNDS[scene.background]
    for thing, placed in zip(scene.objects, place(scene, rng), strict=True):
        x, y, radius = (side * part for part in placed)
        box = Box(int(x - radius), int(y - radius), math.ceil(x + radius), math.ceil(y + radius))
        region = image[box.top : box.bottom, box.left : box.right]
        region += coverage(thing.shape, Placed(x, y, radius), box)[..., None] * (COLOURS[thing.colour] - region)
    return np.rint(image).astype(np.uint8)


def write_shapes(out: Path, side: int, train: int, test: int, seed: int) -> bool:
    """Write the dataset as an imagefolder: out/{train,test}/metadata.jsonl with the images, and out/shapes.json.

    Returns True if written, False if `out` already is this exact dataset. Raises UserError for a number out of range,
    and if `out` contains anything else. The dataset appears completely or not at all.
    """
    for option, value, least, most in (
        ("size", side, SMALLEST_SIDE, LARGEST_SIDE),
        ("train", train, 0, 10**8),
        ("test", test, 0, 10**8),
        ("seed", seed, 0, 2**64 - 1),
    ):
        if not least <= value <= most:
            raise UserError(f"--{option} {value}: must be from {least} to {most}")
    about = {
        "kind": "shapes",
        "version": 1,
        "side": side,
        "seed": seed,
        "train": train,
        "test": test,
        "palette": {name: list(rgb) for name, rgb in (COLOURS | BACKGROUNDS).items()},
        "held_out": sorted(map(list, HELD_OUT)),
    }
    if _is_written(out, about):
        return False
    with new_folder(out) as folder, tqdm(total=train + test, unit=" images", disable=None) as bar:
        counts: dict[Split, int] = {"train": train, "test": test}
        for split, count in counts.items():
            if count:
                _write_split(folder / split, split, side, count, seed, bar)
        (folder / "shapes.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return True


def _is_written(out: Path, about: Mapping[str, Any]) -> bool:
    """Return whether `out` is the described dataset; False if it is missing or empty. Raises UserError for others."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "shapes.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--out {out}: the folder exists and is not a Shapes dataset; choose another, or remove it"
        ) from None
    if found == about:
        return True
    differing = [name for name in about if not isinstance(found, dict) or found.get(name) != about[name]]
    raise UserError(
        f"--out {out}: the folder contains a Shapes dataset that differs in {', '.join(differing)}; "
        "choose another, or remove it"
    )


def _write_split(folder: Path, split: Split, side: int, count: int, seed: int, bar: tqdm) -> None:
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as lines:
        for index in range(count):
            name = f"{index // FILES_PER_FOLDER:02d}/{index:05d}.png"
            if index % FILES_PER_FOLDER == 0:
                (folder / name).parent.mkdir()
            scene, rng = example(seed, split, index)
            Image.fromarray(render(scene, side, rng)).save(folder / name)
            line = {"file_name": name, "text": scene.caption, "scene": scene.to_dict(), "unseen": is_unseen(scene)}
            lines.write(json.dumps(line) + "\n")
            bar.update()
