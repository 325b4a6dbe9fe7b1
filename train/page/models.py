"""Models that stay loaded between the page's jobs, so that a model is changed without a restart."""

from pathlib import Path
from typing import Any

from ldm.networks.unet import weight_files
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.generate import load
from train.config.generation import ModelOptions

_LOADED = 2


class Models:
    """The models that were used last, which stay loaded."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Any, ...], LatentDiffusionPipeline] = {}

    def load(self, o: ModelOptions, model: str) -> LatentDiffusionPipeline:
        """Return a model; it is loaded again if its weights have changed. Raises UserError as `load` does."""
        stamps = tuple(path.stat().st_mtime_ns for path in weight_files(Path(model)))
        key = (model, stamps, o.precision, o.device)
        pipe = self._loaded.pop(key, None)
        while pipe is None and len(self._loaded) >= _LOADED:
            self._loaded.pop(next(iter(self._loaded)))  # before the next one is loaded, so that the memory suffices
        self._loaded[key] = pipe = pipe or load(o, model)
        return pipe
