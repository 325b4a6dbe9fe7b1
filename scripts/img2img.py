"""Generate images that start from given images."""

from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.formats.png import slug
from train.commands.main import command
from train.config.generation import GenerateOptions
from train.config.load import overlay


@dataclass(frozen=True, kw_only=True)
class Options(GenerateOptions):
    """Generate images that start from given images: variations, or changes that follow a prompt."""

    image: tuple[str, ...] = ()
    """Images to start from, of any size; each is used --num-images times. With --prompts: one, or one per prompt."""
    strength: float = 0.8
    """Amount of change: 0 keeps the image, 1 keeps only its size. Only the last strength · steps steps are run."""


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.generate import ImageGenerator, open_image, options_like  # slow import

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
    for path in generator.generate(jobs, strength=o.strength):
        print(path)


if __name__ == "__main__":
    command(main)
