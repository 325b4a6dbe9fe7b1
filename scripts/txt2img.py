"""Generate images from prompts with a trained model."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from train.commands.main import command
from train.config.load import overlay
from train.config.painting import PaintOptions


@dataclass(frozen=True, kw_only=True)
class Options(PaintOptions):
    """Generate images from a prompt, or from each prompt of a file."""

    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image width. Default: the model's own."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image height. Default: the model's own."""


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.generate import Painter, like  # slow import

    o = like(o)
    painter = Painter(o)
    wanted = [picture for prompt in painter.prompts for picture in painter.wanted(prompt)]
    for path in painter.paint(wanted, width=o.width, height=o.height):
        print(path)


if __name__ == "__main__":
    command(main)
