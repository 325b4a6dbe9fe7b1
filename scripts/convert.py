"""Convert between a diffusers folder and a single safetensors file with the original key names."""

from dataclasses import dataclass

from train.commands.main import command
from train.config.load import overlay


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert a model from a folder to a file, or from a file to a folder."""

    model: str = ""
    """Diffusers folder, .safetensors file with the original key names, or pickled .ckpt file, from which only plain
    weights are loaded."""
    config: str = ""
    """Diffusers folder of the same shape as a single-file model; its JSON files and tokenizer are read."""
    out: str = ""
    """Output: a .safetensors file, or else a folder. Existing files are not overwritten."""


def main() -> None:
    o = overlay(Options, Options())
    from train.commands.convert import convert  # slow import

    convert(o.model, o.config, o.out)
    print(o.out)


if __name__ == "__main__":
    command(main)
