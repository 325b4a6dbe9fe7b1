"""Generate images that start from given images."""

from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.formats.png import slug
from train.commands.main import command
from train.config.load import overlay
from train.config.painting import PaintOptions


@dataclass(frozen=True, kw_only=True)
class Options(PaintOptions):
    """Generate images that start from given images: variations, or changes that follow a prompt."""

    image: tuple[str, ...] = ()
    """Images to start from, of any size; each is used --num-images times. With --prompts: one, or one per prompt."""
    strength: float = 0.8
    """Amount of change: 0 keeps the image, 1 keeps only its size. Only the last strength · steps steps are run."""


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.generate import Painter, like, open_picture  # slow import

    o = like(o)
    if not o.image:
        raise UserError("--image is missing: pictures to begin with")
    stems = [slug(Path(path).stem) for path in o.image]
    names = [f"{stem}-" for stem in stems]
    if len(set(stems)) < len(stems):  # same name in several folders
        names = [f"{k}-{name}" for k, name in enumerate(names)]
    given = [
        {"image": open_picture(path, "--image"), "name": name, "story": {"image": [path]}, "files": {"image": path}}
        for path, name in zip(o.image, names, strict=True)
    ]
    painter = Painter(o)
    prompts = painter.prompts
    n = max(len(given), len(prompts))
    if not {len(given), len(prompts)} <= {1, n}:
        raise UserError(f"{len(given)} pictures for {len(prompts)} prompts: give one for all, or as many of each")
    pairs = zip(prompts * (n // len(prompts)), given * (n // len(given)), strict=True)
    wanted = [picture for prompt, how in pairs for picture in painter.wanted(prompt, **how)]
    for path in painter.paint(wanted, strength=o.strength):
        print(path)


if __name__ == "__main__":
    command(main)
