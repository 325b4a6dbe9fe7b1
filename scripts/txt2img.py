"""Paint pictures from a prompt with a trained model."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from autoencoder.tiling import Tiles
from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.png import file_name, save_png
from ldm.unet import AttentionBackend
from train.cli import SamplingOptions, command, overlay, use_device
from train.optim import DTYPES


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """Paint pictures from a prompt."""

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
    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Width; the model's own unless given."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Height; the model's own unless given."""
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


_NOT_OF_A_PICTURE = ("out", "num_images", "batch_size", "device")


def main() -> None:
    o = overlay(Options, Options())
    if not o.model:
        raise UserError("--model is missing: the folder of a trained model, e.g. --model runs/ldm/model")
    if o.num_images < 1 or o.batch_size < 1:
        raise UserError(f"--num-images {o.num_images} --batch-size {o.batch_size}: both must be at least 1")
    dtype = DTYPES[o.precision]
    device = use_device(o.device)

    def load(model: str) -> LatentDiffusionPipeline:
        pipe = LatentDiffusionPipeline.from_pretrained(model, chunks=o.chunks).to(device, dtype)
        taken = pipe.set_attention(o.attention)
        if o.attention == "auto":
            print(f"attention of {model}: {taken}", file=sys.stderr)
        return pipe

    pipe = load(o.model)
    if o.tile is not None:
        pipe.enable_vae_tiling(Tiles(o.tile, o.tile // 4))
    weak = load(o.weak_model) if o.weak_model else None
    folder = Path(o.out)
    for first in range(0, o.num_images, o.batch_size):
        seeds = range(o.seed + first, o.seed + min(first + o.batch_size, o.num_images))
        images = pipe(
            o.prompt, o.negative_prompt, **o.sampling(), compose=o.compose, weak=weak, weak_scale=o.weak_scale,
            num_images_per_prompt=len(seeds), width=o.width, height=o.height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], progress=True,
        ).images  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)  # now that all the settings have proved good
        for seed, image in zip(seeds, images, strict=True):
            shared = {field.name: getattr(o, field.name) for field in fields(o) if field.name not in _NOT_OF_A_PICTURE}
            settings = shared | {"seed": seed}
            path = folder / file_name(o.prompt, seed)
            save_png(image, path, settings)
            print(path)


if __name__ == "__main__":
    command(main)
