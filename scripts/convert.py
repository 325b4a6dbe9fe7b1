"""Between a diffusers folder and one safetensors file with the original key names."""

from dataclasses import dataclass

from train.commands.main import command
from train.config.load import overlay


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a model: folder to file, file to folder."""

    model: str = ""
    """A diffusers folder, a .safetensors file with the original key names, or a pickled .ckpt, of which plain weights
    alone are loaded."""
    config: str = ""
    """With a file: a diffusers folder of the same shape, of which JSON and tokenizer are read."""
    out: str = ""
    """What is made: a .safetensors file, or else a folder. Nothing is overwritten."""


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.convert import convert  # which takes seconds

    convert(o.model, o.config, o.out)
    print(o.out)


if __name__ == "__main__":
    command(main)
