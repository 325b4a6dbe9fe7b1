"""The options of the command that converts models."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert a model from a folder to a file, or from a file to a folder."""

    model: str = ""
    """Diffusers folder, .safetensors file with the original key names, or pickled .ckpt file, from which only plain
    weights are loaded."""
    config: str = ""
    """Diffusers folder of the same shape as a single-file model; its JSON files and tokenizer are read."""
    out: str = ""
    """Output: a .safetensors file, or else a folder. Existing files are not overwritten."""
