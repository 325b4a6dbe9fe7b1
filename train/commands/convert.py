"""Convert between a diffusers folder and a single safetensors file with the original key names."""

from pathlib import Path

from ldm.errors import UserError
from ldm.formats.hub import model_folder
from ldm.formats.single_file import PICKLE_SUFFIXES, load_pickled
from ldm.pipeline import LatentDiffusionPipeline
from train.config.convert import ConvertOptions
from train.data.store.atomic import atomic_folder
from train.engine.precision import DTYPES


def convert(o: ConvertOptions) -> None:
    """Write the model to `out`, a .safetensors file or a folder, in the chosen precision."""
    if not o.model:
        raise UserError("--model is missing: give the folder or file to convert, e.g. --model runs/ldm/model")
    if not o.out:
        raise UserError(
            "--out is missing: give the .safetensors file or the folder to write, e.g. --out my.safetensors"
        )
    target = Path(o.out)
    if target.exists():
        raise UserError(f"--out {o.out!r}: exists already; give another name")
    if target.suffix in PICKLE_SUFFIXES:
        raise UserError(f"--out {o.out!r}: pickle files can't be written; give a .safetensors file or a folder")
    pipe = load(Path(o.model), o.config, o.ema)
    dtype = DTYPES[o.precision]
    if target.suffix == ".safetensors":
        pipe.save_single_file(target, dtype)
        return
    for network in (pipe.model.backbone.module, pipe.autoencoder.vae, pipe.text_encoder):
        network.to(dtype)
        for name, weight in network.named_parameters():
            if not weight.isfinite().all():
                raise UserError(f"--precision {o.precision}: weight {name} has larger values; choose bf16 or fp32")
    with atomic_folder(target) as folder:
        pipe.save_pretrained(folder)


def load(model: Path, config: str, ema: bool) -> LatentDiffusionPipeline:
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
    if config and not Path(config, "tokenizer").is_dir():
        raise UserError(
            f"--config {config!r}: must be a diffusers folder of the model's architecture that contains tokenizer/"
        )
    if model.suffix in PICKLE_SUFFIXES:
        return LatentDiffusionPipeline.from_parts(load_pickled(model, config or None, ema=ema), config or None)
    return LatentDiffusionPipeline.from_single_file(model, config=config or None, ema=ema)
