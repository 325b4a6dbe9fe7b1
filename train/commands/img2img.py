"""Generate images that start from given images."""

from collections.abc import Iterator
from pathlib import Path

from ldm.errors import UserError
from ldm.formats.png import slug
from train.commands.generate import ImageGenerator, open_image, options_like
from train.config.generation import Img2ImgOptions


def img2img(o: Img2ImgOptions) -> Iterator[Path]:
    """Generate and write the images, and yield the path of each one."""
    o = options_like(o)
    if not o.image:
        raise UserError("--image is missing: images to begin with")
    stems = [slug(Path(path).stem) for path in o.image]
    names = [f"{stem}-" for stem in stems]
    if len(set(stems)) < len(stems):  # same name in several folders
        names = [f"{k}-{name}" for k, name in enumerate(names)]
    given = [
        {"image": open_image(path, "--image"), "name": name, "metadata": {"image": [path]}, "files": {"image": path}}
        for path, name in zip(o.image, names, strict=True)
    ]
    generator = ImageGenerator(o)
    prompts = generator.prompts
    n = max(len(given), len(prompts))
    if not {len(given), len(prompts)} <= {1, n}:
        raise UserError(f"{len(given)} images for {len(prompts)} prompts: give one for all, or as many of each")
    pairs = zip(prompts * (n // len(prompts)), given * (n // len(given)), strict=True)
    jobs = [job for prompt, how in pairs for job in generator.jobs(prompt, **how)]
    return generator.generate(jobs, strength=o.strength)
