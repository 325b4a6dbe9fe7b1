"""Interpolate from one prompt to another, or from one seed to another: write the frames and an animation."""

from train.commands.main import command
from train.config.generation import InterpolateOptions
from train.config.load import overlay


def main() -> None:
    o = overlay(InterpolateOptions, InterpolateOptions())
    from train.commands.interpolate import interpolate  # slow import

    for path in interpolate(o):
        print(path)


if __name__ == "__main__":
    command(main)
