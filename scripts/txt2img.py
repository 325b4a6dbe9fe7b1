"""Paint pictures from a prompt with a trained model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ldm.errors import UserError
from ldm.pipeline import LatentDiffusionPipeline
from ldm.png import file_name, save_png
from ldm.spacing import SamplerKind
from train.cli import command, overlay


@dataclass(frozen=True, kw_only=True)
class Options:
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
    steps: int = 25
    """Sampler steps."""
    guidance_scale: float = 5.0
    """1 is the conditional prediction alone; larger follows the prompt more closely."""
    sampler: SamplerKind = "dpmpp_2m"
    """ddpm, ddim, euler or dpmpp_2m."""
    eta: float = 0.0
    """ddim's share of noise, 0 to 1."""
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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the network's weights and arithmetic."""


def main() -> None:
    o = overlay(Options, Options())
    if not o.model:
        raise UserError("--model is missing: the folder of a trained model, e.g. --model runs/ldm/model")
    if o.num_images < 1 or o.batch_size < 1:
        raise UserError(f"--num-images {o.num_images} --batch-size {o.batch_size}: both must be at least 1")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[o.precision]
    pipe = LatentDiffusionPipeline.from_pretrained(o.model).to(o.device, dtype)
    folder = Path(o.out)
    for first in range(0, o.num_images, o.batch_size):
        seeds = range(o.seed + first, o.seed + min(first + o.batch_size, o.num_images))
        images = pipe(
            o.prompt, o.negative_prompt, num_inference_steps=o.steps, guidance_scale=o.guidance_scale,
            sampler=o.sampler, eta=o.eta, num_images_per_prompt=len(seeds), width=o.width, height=o.height,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], progress=True,
        ).images  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)  # now that all the settings have proved good
        for seed, image in zip(seeds, images, strict=True):
            settings = {"prompt": o.prompt, "negative_prompt": o.negative_prompt, "steps": o.steps,
                        "sampler": o.sampler, "eta": o.eta, "guidance_scale": o.guidance_scale, "seed": seed,
                        "model": o.model, "precision": o.precision}  # fmt: skip
            path = folder / file_name(o.prompt, seed)
            save_png(image, path, settings)
            print(path)


if __name__ == "__main__":
    command(main)
