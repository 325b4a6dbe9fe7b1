"""Convert between a diffusers folder and a single safetensors file with the original key names."""

from pathlib import Path

from ldm.errors import UserError
from ldm.formats.hub import model_folder
from ldm.formats.single_file import PICKLE_SUFFIXES, from_original, read_pickled
from ldm.pipeline import LatentDiffusionPipeline
from train.data.store.atomic import atomic_folder


def convert(model: str, config: str, out: str) -> None:
    """Write a model to `out`, a .safetensors file or a folder. config: diffusers folder, for a single-file model."""
    if not model:
        raise UserError("--model is missing: give the folder or file to convert, e.g. --model runs/ldm/model")
    if not out:
        raise UserError(
            "--out is missing: give the .safetensors file or the folder to write, e.g. --out my.safetensors"
        )
    target = Path(out)
    if target.exists():
        raise UserError(f"--out {out!r}: exists already; give another name")
    if target.suffix in PICKLE_SUFFIXES:
        raise UserError(f"--out {out!r}: pickle files can't be written; give a .safetensors file or a folder")
    pipe = load(Path(model), config)
    if target.suffix == ".safetensors":
        pipe.save_single_file(target)
    else:
        with atomic_folder(target) as folder:
            pipe.save_pretrained(folder)


def load(model: Path, config: str) -> LatentDiffusionPipeline:
    """Load a pipeline from a folder, or from a single file and a diffusers folder of the same architecture."""
    if model.is_dir():
        if config:
            raise UserError(
                f"--config {config!r}: only for single-file models; the folder --model has its own configuration"
            )
        return LatentDiffusionPipeline.from_pretrained(model)
    if not model.is_file():
        raise UserError(f"--model {str(model)!r}: no such file or folder")
    config = str(model_folder(config)) if config else ""
    if not config:
        raise UserError(
            f"--config is missing: give a diffusers folder of a model with the same architecture as {str(model)!r}"
        )
    if not Path(config, "tokenizer").is_dir():
        raise UserError(
            f"--config {config!r}: must be a diffusers folder of the model's architecture that contains tokenizer/"
        )
    if model.suffix in PICKLE_SUFFIXES:
        return LatentDiffusionPipeline.from_parts(from_original(read_pickled(model), config), config)
    return LatentDiffusionPipeline.from_single_file(model, config=config)
