"""Latent diffusion: the mathematics (one file per topic) and the pipeline that uses it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

__all__ = ["LatentDiffusionPipeline"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Importing only the mathematics shouldn't import diffusers and transformers.
    if name == "LatentDiffusionPipeline":
        from ldm.pipeline import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
