"""Inpaint the masked part of an image, or extend the image beyond its borders; the rest doesn't change."""

from train.commands.main import command
from train.config.generation import InpaintOptions
from train.config.load import overlay


def main() -> None:
    o = overlay(InpaintOptions, InpaintOptions())
    from train.commands.inpaint import inpaint  # slow import

    for path in inpaint(o):
        print(path)


if __name__ == "__main__":
    command(main)
