"""Generate images that start from given images."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ldm.editing import steps_for_strength
from ldm.errors import UserError
from ldm.formats.png import slug
from train.commands.generate import COMMAND_LINE, ImageGenerator, Session, open_image, options_like
from train.commands.sizes import fitted, restored
from train.config.generation import Img2ImgOptions


def img2img(o: Img2ImgOptions, session: Session = COMMAND_LINE) -> Iterator[Path]:
    """Generate and write the images, and yield the path of each one."""
    o = options_like(o)
    steps_for_strength(o.strength, o.number_of_steps)  # raises UserError for a wrong strength, before any warning
    if not o.image:
        raise UserError("--image is missing: give one or more images to start from")
    stems = [slug(Path(path).stem) for path in o.image]
    names = [f"{stem}-" for stem in stems]
    if len(set(stems)) < len(stems):  # files of the same name in several folders
        names = [f"{k}-{name}" for k, name in enumerate(names)]
    inputs: list[dict[str, Any]] = [
        {"image": open_image(path, "--image"), "name": name, "metadata": {"image": [path]}, "files": {"image": path}}
        for path, name in zip(o.image, names, strict=True)
    ]
    generator = ImageGenerator(o, session)
    for path, fields in zip(o.image, inputs, strict=True):
        given = fields["image"]
        fields["image"] = fitted(generator.pipe, given, o.resize, f"--image {path!r}")
        fields["finish"] = partial(restored, given=given)
    prompts = generator.prompts
    n = max(len(inputs), len(prompts))
    if not {len(inputs), len(prompts)} <= {1, n}:
        raise UserError(
            f"{len(inputs)} images for {len(prompts)} prompts: give one image, one prompt, or one prompt per image"
        )
    pairs = zip(prompts * (n // len(prompts)), inputs * (n // len(inputs)), strict=True)
    jobs = [job for prompt, fields in pairs for job in generator.jobs(prompt, **fields)]
    return generator.generate(jobs, strength=o.strength)
