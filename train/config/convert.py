"""The options of the command that converts models."""

from dataclasses import dataclass

from train.config.run import Precision


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert a model from a folder to a file, or from a file to a folder."""

    model: str = ""
    """Model to convert: a diffusers folder, or a single .safetensors or .ckpt file. Required.
    A single file must have Stable Diffusion's original key names.
    A .ckpt file is a pickle; only plain weights are loaded from it, never code."""
    config: str = ""
    """Diffusers folder of a model with the same architecture, for a single-file --model.
    Only its JSON files and its tokenizer are read.
    Empty: NAME.yaml beside the file, or else the shape of Stable Diffusion."""
    ema: bool = True
    """Use the averaged weights (model_ema) of a single file that has them; --no-ema uses the trained ones."""
    precision: Precision = "fp32"
    """Number format of the weights that are written; fp16 and bf16 halve the size."""
    out: str = ""
    """Output: a single file if the name ends in .safetensors, else a diffusers folder. Required.
    It must not exist yet."""
