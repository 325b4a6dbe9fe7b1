"""Models that stay loaded between the page's jobs, so that a model is changed without a restart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ldm.errors import UserError
from ldm.files import read_json
from ldm.formats.scheduler_config import Process
from ldm.networks.unet import weight_files
from ldm.pipeline import LatentDiffusionPipeline
from train.commands.generate import load
from train.config.generation import ModelOptions
from train.engine.provenance import trained_scales

_LOADED = 2


@dataclass(frozen=True)
class Traits:
    """Properties of a model that the form shows, read from its folder without loading it."""

    sampler: str = ""
    steps: int = 0
    """Sampler and steps that the model is used with unless others are chosen; empty and 0: unknown."""
    size: tuple[int, int] | None = None
    """Width and height of its images, in pixels."""
    distilled: bool = False
    """Whether the network reads the guidance scale, so that a negative prompt can't be used."""
    scales: tuple[float, float] | None = None
    """Guidance scales that it was distilled with."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the traits of a model; a damaged one, which can't be loaded either, has none."""
        try:
            sampler = Process.load(folder).sampler
            unet, vae = (read_json(folder / part / "config.json") for part in ("unet", "vae"))
            side, distilled = unet["sample_size"], bool(unet.get("time_cond_proj_dim"))
            height, width = (side, side) if isinstance(side, int) else side
            factor = 2 ** (len(vae["block_out_channels"]) - 1)
            steps = ModelOptions().for_sampler(sampler).number_of_steps
            size = (int(width) * factor, int(height) * factor)
            return cls(sampler, steps, size, distilled, trained_scales(folder) if distilled else None)
        except (UserError, OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError):
            return cls()

    def line(self) -> str:
        """Return a line on the model's own settings."""
        if self.size is None:
            return ""
        parts = [f"Its own settings: {self.steps} steps of {self.sampler}, {self.size[0]} × {self.size[1]} pixels."]
        if self.scales:
            parts.append(f"Guidance {self.scales[0]:g} to {self.scales[1]:g}.")
        return " ".join([*parts, *["No negative prompt."] * self.distilled])


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
