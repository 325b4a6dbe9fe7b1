"""Paint pictures that begin with given ones."""

from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from train.cli import command, overlay
from train.painting import Painter, PaintOptions, open_picture


@dataclass(frozen=True, kw_only=True)
class Options(PaintOptions):
    """Paint pictures that begin with given ones: variations, or the same seen as the prompt says."""

    image: tuple[str, ...] = ()
    """Pictures to begin with, of any size; each is painted --num-images times."""
    strength: float = 0.8
    """How much of a picture is given up: 0 nothing, 1 all but its size. Of the steps the last strength · steps are walked."""


def main() -> None:
    o = overlay(Options, Options())
    if not o.image:
        raise UserError("--image is missing: pictures to begin with")
    given = [open_picture(path, "--image") for path in o.image]
    painter = Painter(o)
    for path, image in zip(o.image, given, strict=True):
        name = f"{Path(path).stem}-" if len(o.image) > 1 else ""
        for made in painter.paint(name, image=image, strength=o.strength):
            print(made)


if __name__ == "__main__":
    command(main)
