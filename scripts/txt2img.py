"""Paint pictures from prompts with a trained model."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from train.commands.main import command
from train.config.load import overlay
from train.config.painting import PaintOptions


@dataclass(frozen=True, kw_only=True)
class Options(PaintOptions):
    """Paint pictures from a prompt, or from each of a file."""

    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Width; the model's own unless given."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Height; the model's own unless given."""


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.generate import Painter, like  # which takes seconds

    o = like(o)
    painter = Painter(o)
    wanted = [picture for prompt in painter.prompts for picture in painter.wanted(prompt)]
    for path in painter.paint(wanted, width=o.width, height=o.height):
        print(path)


if __name__ == "__main__":
    command(main)
