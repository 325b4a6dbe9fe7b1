"""Evaluation of a finished model: bound on the likelihood of latents, and accuracy of images of Shapes prompts.

The accuracy is exact: a rule-based checker without learned parts reads each image
(train/data/synthetic/shapes_checker.py).
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ldm.bound import prior_term
from ldm.denoiser import Network
from ldm.float64 import double
from ldm.objective import Objective
from ldm.pipeline import LatentDiffusionPipeline
from train.config.run import Precision
from train.data.synthetic.shapes import Scene
from train.data.synthetic.shapes_checker import score_images
from train.engine.precision import autocast


@torch.no_grad()
def bits_per_dimension(
    pipe: LatentDiffusionPipeline, batches: Iterable[tuple[Tensor, Sequence[str]]], seed: int = 0, strata: int = 32
) -> tuple[float, float | None]:
    """Return the variational bound on -log2 p(latent | caption) per latent dimension, and its standard error.

    Batches are images (b, 3, h, w) in [−1, 1] with their captions; seed + k seeds image k's noise. The standard
    error is over images. The sum over the timesteps above index 0 is estimated from `strata` timesteps: one in each of
    `strata` intervals of equal length in log(index), because the terms are largest near the data. This takes strata + 1
    network evaluations per image.
    """
    schedule = pipe.process.schedule
    objective = Objective(schedule, pipe.process.target, kind="vlb", variance=pipe.process.variance)
    T, device = schedule.T, pipe.device
    bits: list[float] = []
    network: Network | None = None
    for pixels, captions in batches:
        posterior, condition = pipe.autoencoder.encode(pixels), pipe.encode(captions)
        mean, std = posterior.mean.float(), posterior.std.float()
        generators = [torch.Generator().manual_seed(seed + len(bits) + k) for k in range(len(mean))]
        noise = torch.stack([torch.randn(strata + 2, *mean.shape[1:], generator=g) for g in generators], 1).to(device)
        u = torch.stack([torch.rand(strata, generator=g, dtype=torch.float64) for g in generators], 1)
        x0 = mean + std * noise[0]
        index = torch.zeros(len(x0), dtype=torch.int64, device=device)
        if network is None:
            network = pipe.text_network(*x0.shape[2:])
        total = prior_term(x0, schedule.level(T - 1)) + objective.bound(network, x0, index, noise[1], condition)
        for k in range(strata):
            # i with probability log((i + 1) / i) / log T
            index = (T ** ((k + u[k]) / strata)).long().clamp(max=T - 1).to(device)
            share = torch.log1p(1 / index) / math.log(T)
            term = objective.bound(network, x0, index, noise[k + 2], condition)
            total = total + term / (strata * share)
        bits += double(total).tolist()
    error = float(np.std(bits, ddof=1)) / len(bits) ** 0.5 if len(bits) > 1 else None
    return float(np.mean(bits)), error


def generate(
    pipe: LatentDiffusionPipeline,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    batch_size: int = 64,
    optimize: bool = False,
    **sampling: Any,
) -> np.ndarray:
    """Generate one image per prompt, (n, h, w, 3) uint8. seed + k seeds image k's noise, for any batch size.

    optimize: choose an engine if that saves time. `sampling` are arguments of the pipeline:
    num_inference_steps, guidance_scale, sampler, …; and precision, see `generate_batch`.
    """
    if optimize and sampling.get("reuse_features", 1) == 1:
        pipe.optimize("auto", pipe.model.seconds(len(prompts), sampling.get("num_inference_steps", 25)))
    generated = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="generating", unit="batch", dynamic_ncols=True):
        part = list(prompts[start : start + batch_size])
        generated.append(generate_batch(pipe, part, [seed + start + k for k in range(len(part))], **sampling))
    return np.concatenate(generated)


def generate_batch(
    pipe: LatentDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    precision: Precision = "fp32",
    **sampling: Any,
) -> NDArray[np.uint8]:
    """Generate one image per prompt in one batch, (b, h, w, 3) uint8. The seeds are those of the noise.

    precision: of the denoising network's arithmetic (autocast, as in training); its weights and the other networks
        keep theirs.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with autocast(pipe.device, precision):
        latents = pipe(list(prompts), generator=generators, output_type="latent", **sampling).images
    assert isinstance(latents, torch.Tensor)
    return (pipe.decode(latents).permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)


def alignment(
    pipe: LatentDiffusionPipeline, scenes: Sequence[Scene], **options: Any
) -> tuple[dict[str, float | None], np.ndarray]:
    """Generate images of the scenes' captions. Return the shares of correct backgrounds, colours, …, and the images.

    options: arguments of `generate`. The shares are those of `score_images`.
    """
    images = generate(pipe, [scene.caption for scene in scenes], **options)
    return score_images(images, scenes), images
