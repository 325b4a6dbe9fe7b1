"""Interpolate from one prompt to another, or from one seed to another: write the frames and an animation."""

from train.commands.cli import interpolate

if __name__ == "__main__":
    interpolate()
