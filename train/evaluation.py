"""What a finished model is worth: reconstruction on held-out pictures, and on Shapes whether it paints what was asked.

Shapes alignment is exact: a checker without any learning reads each picture back (train/data/checker.py).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm import tqdm

from autoencoder.model import Autoencoder
from ldm.bound import prior_term
from ldm.objective import Objective
from ldm.pipeline import LatentDiffusionPipeline
from train.data.checker import score_pictures
from train.data.shapes import Scene


def reconstruction_quality(made: Tensor, pixels: Tensor) -> tuple[float, float]:
    """PSNR (dB) and SSIM, each a mean over pictures, of 8-bit pictures: both (b, 3, h, w) in [−1, 1]."""
    a, b = (((x.float() / 2 + 0.5).clamp(0, 1) * 255).round() / 255 for x in (made, pixels))
    psnr = peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    # A perfect reconstruction has infinite PSNR; 8 bits can't tell better than half a step from perfect.
    psnr = psnr.clamp(max=20 * np.log10(2 * 255))
    ssim = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    return float(psnr.mean()), float(torch.as_tensor(ssim).mean())


def autoencoder_quality(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> dict[str, float]:
    """PSNR and SSIM of decode(posterior mean) over batches of pictures (b, 3, h, w) in [−1, 1]."""
    scores = []
    for pixels in batches:
        made = autoencoder.decode(autoencoder.encode(pixels).mean)
        scores.append((len(pixels), *reconstruction_quality(made, pixels.to(made.device))))
    count = sum(n for n, _, _ in scores)
    return {
        "psnr": sum(n * psnr for n, psnr, _ in scores) / count,
        "ssim": sum(n * ssim for n, _, ssim in scores) / count,
    }


@torch.no_grad()
def bits_per_dimension(
    pipe: LatentDiffusionPipeline, batches: Iterable[tuple[Tensor, Sequence[str]]], seed: int = 0, strata: int = 32
) -> tuple[float, float]:
    """The variational bound on -log2 p(latent | caption), a dimension of the latent; and its standard error over pictures.

    Batches are pictures (b, 3, h, w) in [−1, 1] with their captions. The term at index 0 and that of the prior are worked
    out, the sum over the others is estimated from one timestep in each of so many parts, equal in the logarithm: the terms
    are largest next to the data.
    """
    objective = Objective(pipe.process.schedule, pipe.process.target, kind="vlb", variance=pipe.process.variance)
    last, T, device = (
        pipe.process.schedule.level(-1 + pipe.process.schedule.T),
        pipe.process.schedule.T,
        pipe.unet.device,
    )
    generator, bits = torch.Generator().manual_seed(seed), []
    for pixels, captions in batches:
        posterior, condition = pipe.autoencoder.encode(pixels), pipe.encode(captions)
        normal = lambda like: torch.randn(like.shape, generator=generator).to(device)  # noqa: E731
        x0 = posterior.mean.float() + posterior.std.float() * normal(posterior.mean)
        index = torch.zeros(len(x0), dtype=torch.int64, device=device)
        total = prior_term(x0, last)
        total = total + objective.bound(pipe.network, x0, index, normal(x0), condition)
        for k in range(strata):
            u = (k + torch.rand(len(x0), generator=generator, dtype=torch.float64).to(device)) / strata
            index = (T**u).long().clamp(max=T - 1)  # index i has the probability log((i + 1) / i) / log T
            share = torch.log1p(1 / index) / math.log(T)
            total = total + objective.bound(pipe.network, x0, index, normal(x0), condition) / (strata * share)
        bits.append(total)
    values = torch.cat(bits).double()
    return values.mean().item(), (values.std(correction=0) / max(1, len(values) - 1) ** 0.5).item()


def paint(
    pipe: LatentDiffusionPipeline, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 64, **sampling: Any
) -> np.ndarray:
    """One picture a prompt, (n, h, w, 3) uint8; picture k's noise is that of seed + k, whatever the batch size.

    `sampling` are arguments of the pipeline: num_inference_steps, guidance_scale, sampler, …
    """
    painted = []
    for first in tqdm(range(0, len(prompts), batch_size), desc="painting", unit="batch", dynamic_ncols=True):
        part = list(prompts[first : first + batch_size])
        generators = [torch.Generator().manual_seed(seed + first + k) for k in range(len(part))]
        array = pipe(part, generator=generators, output_type="np", **sampling).images
        painted.append((np.asarray(array) * 255).round().astype(np.uint8))
    return np.concatenate(painted)


def alignment(
    pipe: LatentDiffusionPipeline, scenes: Sequence[Scene], **how: Any
) -> tuple[dict[str, float | None], np.ndarray]:
    """Shares of background, colour, shape, size, relation and all of it that came out as asked; and the pictures."""
    pictures = paint(pipe, [scene.caption for scene in scenes], **how)
    return score_pictures(pictures, scenes), pictures
