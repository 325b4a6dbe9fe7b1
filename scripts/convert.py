"""Between a diffusers folder and one safetensors file with the original key names."""

from dataclasses import dataclass
from pathlib import Path

from ldm.errors import UserError
from ldm.formats.single_file import PICKLED, from_original, read_pickled
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.main import command
from train.config.load import overlay
from train.data.store.atomic import atomic_folder


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
    if not o.model or not o.out:
        raise UserError(
            "--model and --out are needed: the model to convert, and the .safetensors file or folder to make"
        )
    model, out = Path(o.model), Path(o.out)
    if out.exists():
        raise UserError(f"--out {o.out!r} is there already: give another name")
    if out.suffix in PICKLED:
        raise UserError(f"--out {o.out!r}: nothing is pickled; give a .safetensors file, or a folder")
    pipe = load(model, o.config)
    if out.suffix == ".safetensors":
        pipe.save_single_file(out)
    else:
        with atomic_folder(out) as folder:
            pipe.save_pretrained(folder)
    print(out)


def load(model: Path, config: str) -> LatentDiffusionPipeline:
    """The pipeline of a folder, or of a file and its configuration."""
    if model.is_dir():
        if config:
            raise UserError(f"--config {config!r}: a folder brings its own; it is for single files")
        return LatentDiffusionPipeline.from_pretrained(model)
    if not model.is_file():
        raise UserError(f"--model {str(model)!r}: there is no such file or folder")
    if not config or not Path(config, "tokenizer").is_dir():
        raise UserError(f"--config {config!r}: give a diffusers folder of the model's shape, with its tokenizer/")
    if model.suffix in PICKLED:
        return LatentDiffusionPipeline.from_parts(from_original(read_pickled(model), config), config)
    return LatentDiffusionPipeline.from_single_file(model, config=config)


if __name__ == "__main__":
    command(main)
