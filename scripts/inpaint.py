"""Paint inside a mask, or beyond a picture's borders; the rest stays as it is."""

from train.commands.main import command
from train.config.load import overlay
from train.config.painting import InpaintOptions


def main() -> None:
    o = overlay(InpaintOptions, InpaintOptions())
    from train.commands.inpaint import inpaint  # which takes seconds

    for path in inpaint(o):
        print(path)


if __name__ == "__main__":
    command(main)
