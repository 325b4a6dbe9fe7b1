"""Generate images from prompts with a trained model."""

from collections.abc import Iterator
from pathlib import Path

from train.commands.generate import COMMAND_LINE, ImageGenerator, Session, options_like
from train.commands.sizes import warn_if_far
from train.config.generation import Txt2ImgOptions


def txt2img(o: Txt2ImgOptions, session: Session = COMMAND_LINE) -> Iterator[Path]:
    """Generate and write the images, and yield the path of each one."""
    o = options_like(o)
    generator = ImageGenerator(o, session)
    warn_if_far(generator.pipe, o.width, o.height)
    jobs = [job for prompt in generator.prompts for job in generator.jobs(prompt)]
    return generator.generate(jobs, width=o.width, height=o.height)
