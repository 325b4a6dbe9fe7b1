"""Latent diffusion: the mathematics (one file a theme) and the pipeline that puts it to work."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

__all__ = ["LatentDiffusionPipeline"]


def __getattr__(name: str) -> object:
    # The mathematics alone shouldn't cost the import of diffusers and transformers.
    if name == "LatentDiffusionPipeline":
        from ldm.pipeline import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
