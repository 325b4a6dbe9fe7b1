"""Measure how the sampler's settings change the images of a Shapes model; docs/mathematics.md shows the results.

    python benchmarks/questions.py --model runs/demo/model --out docs/figures

Prints the tables and draws few_steps.png and noise_again.png. About twelve minutes on one core.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.pipeline import LatentDiffusionPipeline
from train.commands.main import command
from train.config.load import overlay
from train.data.batches.images import ImageDataset
from train.data.images.crop import Framing
from train.data.sources.splits import open_source
from train.data.synthetic.shapes import prompts
from train.evaluation.autoencoder import reconstruction_quality
from train.evaluation.diffusion import alignment
from train.evaluation.sheets import sheet


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure how the sampler's settings change the images: steps, eta, guidance and inversion."""

    model: str = "runs/demo/model"
    """Folder of a model trained on the Shapes dataset."""
    data: str = "data/shapes"
    """Folder of the Shapes dataset, for the inversion."""
    out: str = "docs/figures"
    """Folder for the images."""
    prompts: int = 256
    """Number of prompts per measurement, half of them unseen."""
    scale: float = 2.0
    """Guidance scale of the measurements that don't vary it."""


class Measure:
    """Accuracy and diversity of a model's images."""

    def __init__(self, pipe: LatentDiffusionPipeline, count: int) -> None:
        self.pipe = pipe
        self.scenes = [*prompts("seen", count // 2, 2), *prompts("unseen", count // 2, 2)]

    def correct(self, **how: Any) -> str:
        started = time.perf_counter()
        shares, _ = alignment(self.pipe, self.scenes, batch_size=128, **how)
        return f"{shares['all']:.3f} ({time.perf_counter() - started:.0f} s)"

    def diversity(self, start: Tensor | None = None, each: int = 16, **how: Any) -> float:
        """Return the root mean square difference (of 255) between images of one prompt, averaged over 16 prompts."""
        differences = []
        for k, scene in enumerate(self.scenes[:16]):
            latents = None if start is None else start[k].expand(each, -1, -1, -1)
            array = self.pipe(
                scene.caption,
                num_images_per_prompt=each,
                latents=latents,
                output_type="np",
                generator=torch.Generator().manual_seed(k),
                **how,
            ).images
            spread = 2 * np.asarray(array).var(0, ddof=1).mean()  # mean square difference, averaged over pairs
            differences.append(255 * spread**0.5)
        return float(np.mean(differences))


@command
def main() -> None:
    o = overlay(Options, Options())
    pipe = LatentDiffusionPipeline.from_pretrained(o.model)
    measure, captions = Measure(pipe, o.prompts), [s.caption for s in prompts("seen", 8, 3)]
    guided: dict[str, Any] = {"guidance_scale": o.scale}

    def generated(**how: Any) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(k) for k in range(len(captions))]
        images = pipe(captions, generator=generators, **(guided | how)).images
        return [np.asarray(image) for image in images]

    Path(o.out).mkdir(parents=True, exist_ok=True)
    print("Share of images with all attributes correct after few steps of dpmpp_2m:")
    steps = (1, 2, 3, 4, 6, 8, 12, 25)
    for n in steps:
        print(f"  {n:3} steps: {measure.correct(num_inference_steps=n, **guided)}", flush=True)
    sheet([generated(num_inference_steps=n) for n in (1, 2, 4, 8, 25)], captions).save(Path(o.out) / "few_steps.png")

    print("Diversity by eta: 16 images of a prompt from one x_T, 50 steps of ddim; mean difference of pairs, of 255:")
    start = torch.randn(16, *_latent(pipe), generator=torch.Generator().manual_seed(0))
    for eta in (0.0, 0.5, 1.0):
        how = {"sampler": "ddim", "eta": eta, "num_inference_steps": 50, **guided}
        print(f"  eta {eta}: {measure.diversity(start, **how):.1f}; all correct {measure.correct(**how)}", flush=True)
    print(f"  eta 0, a different x_T each: {measure.diversity(sampler='ddim', num_inference_steps=50, **guided):.1f}")
    noise = start[:1].expand(len(captions), -1, -1, -1)
    rows = []
    for eta in (0.0, 1.0):
        images = pipe(
            [captions[0]] * 8,
            latents=noise,
            sampler="ddim",
            eta=eta,
            num_inference_steps=50,
            **guided,
            generator=torch.Generator().manual_seed(1),
        ).images
        rows.append([np.asarray(image) for image in images])
    sheet(rows).save(Path(o.out) / "noise_again.png")

    print("Correctness and diversity by guidance scale, dpmpp_2m, 15 steps:")
    for scale in (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0):
        how = {"guidance_scale": scale, "num_inference_steps": 15}
        print(
            f"  scale {scale}: all correct {measure.correct(**how)}, diversity {measure.diversity(**how):.1f}",
            flush=True,
        )
    for interval in ((0.0, 1.0), (0.5, 4.0), (1.0, 20.0)):
        how = {"guidance_scale": o.scale, "num_inference_steps": 15, "guidance_interval": interval}
        share, diversity = measure.correct(**how), measure.diversity(**how)
        print(f"  on noise levels {interval}: all correct {share}, diversity {diversity:.1f}", flush=True)
    print(
        f"  scale 8, rescale 0.7: {measure.correct(guidance_scale=8.0, guidance_rescale=0.7, num_inference_steps=15)}"
    )

    print(
        "Inversion: 50 steps of ddim in each direction, guidance 1, 64 held-out images; PSNR against decode(encode(x)):"
    )
    side = pipe.backbone.sample_size[0] * pipe.autoencoder.factor
    batch = ImageDataset(open_source(o.data, "test"), Framing(resolution=side), 0, shuffle=False).__getitems__(
        range(64)
    )
    z = pipe.autoencoder.encode(batch.pixels).mean
    target = pipe.autoencoder.decode(z)
    for refinements in (0, 1, 2, 4):
        x_T = pipe.invert(z, batch.captions, refinements=refinements)
        back = pipe(
            batch.captions,
            latents=x_T,
            sampler="ddim",
            num_inference_steps=50,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        assert isinstance(back, Tensor)
        psnr, _ = reconstruction_quality(pipe.autoencoder.decode(back), target)
        print(f"  {refinements} refinements: {psnr:.1f} dB; the noise has deviation {x_T.std():.3f}", flush=True)


def _latent(pipe: LatentDiffusionPipeline) -> tuple[int, int, int]:
    return (pipe.autoencoder.latent_channels, *pipe.backbone.sample_size)


if __name__ == "__main__":
    main()
