"""Generate images from prompts with a trained model."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from train.commands.main import command
from train.config.generation import GenerateOptions
from train.config.load import overlay


@dataclass(frozen=True, kw_only=True)
class Options(GenerateOptions):
    """Generate images from a prompt, or from each prompt of a file."""

    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image width. Default: the model's own."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image height. Default: the model's own."""


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.generate import ImageGenerator, options_like  # slow import

    o = options_like(o)
    generator = ImageGenerator(o)
    jobs = [job for prompt in generator.prompts for job in generator.jobs(prompt)]
    for path in generator.generate(jobs, width=o.width, height=o.height):
        print(path)


if __name__ == "__main__":
    command(main)
