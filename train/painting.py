"""What the scripts that paint share: options, the pipeline made of them, and pictures written with their settings."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from autoencoder.tiling import Tiles
from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.png import file_name, save_png
from ldm.unet import AttentionBackend
from train.cli import SamplingOptions, use_device
from train.data.decode import DamagedPicture, load_picture
from train.optim import DTYPES

_NOT_OF_A_PICTURE = ("out", "num_images", "batch_size", "device")


@dataclass(frozen=True, kw_only=True)
class PaintOptions(SamplingOptions):
    """Of a command that paints."""

    model: str = ""
    """Folder of the model: a stage 2 run's model/, or a Stable-Diffusion-shaped diffusers folder."""
    prompt: str = ""
    """What to paint."""
    negative_prompt: str = ""
    """What to stay away from."""
    out: str = "out"
    """Folder the pictures go to."""
    num_images: int = 1
    """How many; picture k has seed + k."""
    compose: Annotated[tuple[tuple[str, float], ...], tyro.conf.arg(metavar="PROMPT SCALE …")] = ()
    """Further prompts that the picture follows too, each with its own guidance scale."""
    weak_model: str = ""
    """Folder of a weaker model, e.g. an earlier one, to be guided away from; with --guidance-scale 1, as they multiply."""
    weak_scale: float = 2.0
    """How far away from the weaker model; 1 is without."""
    seed: int = 0
    """Of the first picture's noise."""
    batch_size: int = 8
    """Pictures painted at once."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device."""
    tile: Annotated[int | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Decode in overlapping tiles of this side, e.g. 64, for large pictures in little memory; whole unless given."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network's weights and arithmetic."""
    attention: AttentionBackend = "sdpa"
    """What computes the UNet's attention: torch itself (sdpa), xformers, or auto: xformers where it works, else sdpa."""
    chunks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Read prompts in N parts, each as long as the text encoder takes; the model's own number unless given."""


class Painter:
    """The models of a command."""

    def __init__(self, o: PaintOptions) -> None:
        """Raises UserError for options that don't fit."""
        if not o.model:
            raise UserError("--model is missing: the folder of a trained model, e.g. --model runs/ldm/model")
        if o.num_images < 1 or o.batch_size < 1:
            raise UserError(f"--num-images {o.num_images} --batch-size {o.batch_size}: both must be at least 1")
        self.o, self.device = o, use_device(o.device)
        self.pipe = self._load(o.model)
        if o.tile is not None:
            self.pipe.enable_vae_tiling(Tiles(o.tile, o.tile // 4))
        self.weak = self._load(o.weak_model) if o.weak_model else None

    def _load(self, model: str) -> LatentDiffusionPipeline:
        pipe = LatentDiffusionPipeline.from_pretrained(model, chunks=self.o.chunks)
        pipe.to(self.device, DTYPES[self.o.precision])
        taken = pipe.set_attention(self.o.attention)
        if self.o.attention == "auto":
            print(f"attention of {model}: {taken}", file=sys.stderr)
        return pipe

    def paint(self, name: str = "", **inputs: Any) -> Iterable[Path]:
        """Write `num_images` pictures, and give their paths as they are there.

        name: before the prompt in the files' names. inputs: the pipeline's further arguments.
        """
        o, folder = self.o, Path(self.o.out)
        settings = {field.name: getattr(o, field.name) for field in fields(o) if field.name not in _NOT_OF_A_PICTURE}
        for first in range(0, o.num_images, o.batch_size):
            seeds = range(o.seed + first, o.seed + min(first + o.batch_size, o.num_images))
            images = self.pipe(
                o.prompt, o.negative_prompt, **o.sampling(), compose=o.compose, weak=self.weak, weak_scale=o.weak_scale,
                num_images_per_prompt=len(seeds), generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                progress=True, **inputs,
            ).images  # fmt: skip
            folder.mkdir(parents=True, exist_ok=True)  # now that all the settings have proved good
            for seed, image in zip(seeds, images, strict=True):
                path = folder / (name + file_name(o.prompt, seed))
                save_png(image, path, settings | {"seed": seed})
                yield path


def open_picture(path: str, option: str) -> Image.Image:
    """A picture that an option names, upright, mode RGB. Raises UserError where it isn't one."""
    if not path:
        raise UserError(f"{option} is missing: a picture's file")
    try:
        return load_picture(Path(path))
    except DamagedPicture as error:
        raise UserError(f"{option} {path!r} can't be read: {error.reason}") from None
    except OSError as error:
        raise UserError(f"{option} {path!r} can't be read: {error.strerror}") from None
