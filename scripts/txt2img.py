"""Paint pictures from a prompt with a trained model."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from train.cli import command, overlay
from train.painting import Painter, PaintOptions


@dataclass(frozen=True, kw_only=True)
class Options(PaintOptions):
    """Paint pictures from a prompt."""

    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Width; the model's own unless given."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Height; the model's own unless given."""


def main() -> None:
    o = overlay(Options, Options())
    for path in Painter(o).paint(width=o.width, height=o.height):
        print(path)


if __name__ == "__main__":
    command(main)
