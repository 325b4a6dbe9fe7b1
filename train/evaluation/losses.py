"""The denoising loss of images by noise level, with their captions and with the empty caption.

Every image has the same noise levels and its own fixed noise, drawn by Philox from the seed, the image's index and the
level. So results don't depend on the batches, and two models, or two captions, can be compared at the same noise.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.objective import Objective
from ldm.pipeline import LatentDiffusionPipeline
from train.data.batches.records import ImageBatch
from train.data.order.rng import Purpose, normal
from train.evaluation.results import Plot, Series


class ImageLosses(NamedTuple):
    """Errors of the network's prediction, mean over a latent's elements, float32."""

    indices: NDArray[np.int64]
    """Indices of the images in their source, (n,)."""
    captions: list[str]
    """Caption of each image."""
    timesteps: NDArray[np.int64]
    """Indices of the noise levels, (levels,), ascending."""
    errors: NDArray[np.float32]
    """Errors with the caption, (n, levels)."""
    empty: NDArray[np.float32]
    """Errors with the empty caption at the same noise, (n, levels)."""

    @property
    def loss(self) -> NDArray[np.float64]:
        """Mean error of each image over the levels, (n,)."""
        return self.errors.mean(1, dtype=np.float64)

    @property
    def harm(self) -> NDArray[np.float64]:
        """Relative increase of the error by the caption, mean over the levels, (n,): above 0 if the caption misleads.

        It is relative to the error with the empty caption, because the errors of some levels are much larger than
        those of others.
        """
        return (self.errors.astype(np.float64) / self.empty - 1).mean(1)


@torch.no_grad()
def image_losses(
    pipe: LatentDiffusionPipeline, batches: Iterable[ImageBatch[Tensor]], *, levels: int, seed: int
) -> ImageLosses:
    """Measure the images of batches, whose `drawn` are the noise of the posterior samples, at so many noise levels.

    The levels are in the middle of equal ranges of timesteps. This takes 2 · levels network evaluations per image.
    """
    schedule, variance = pipe.process.schedule, pipe.process.variance
    objective = Objective(
        schedule, pipe.process.target, kind="hybrid" if variance == "learned" else "simple", variance=variance
    )
    u = (torch.arange(levels, device=pipe.device) + 0.5) / levels
    indices: list[NDArray[np.int64]] = []
    captions: list[str] = []
    errors: list[NDArray[np.float32]] = []
    for batch in batches:
        texts = batch.captions
        posterior = pipe.autoencoder.encode(batch.pixels.to(pipe.device))
        x0 = (posterior.mean + posterior.std * batch.drawn.to(posterior.mean)).float()
        condition = pipe.encode([*texts, *[""] * len(texts)])
        network = pipe.text_network(*x0.shape[2:])
        places = batch.index.numpy()
        rows = []
        for k in range(levels):
            noise = torch.from_numpy(normal(seed, Purpose.LEVEL, places * levels + k, tuple(x0.shape[1:]))).to(x0)
            losses = objective(
                network, x0.repeat(2, 1, 1, 1), u[k].expand(2 * len(x0)), noise.repeat(2, 1, 1, 1), condition
            )
            rows.append(losses.unweighted.view(2, -1))
        errors.append(torch.stack(rows, -1).cpu().numpy())  # (2, b, levels)
        indices.append(places)
        captions += texts
    both = np.concatenate(errors, 1) if errors else np.empty((2, 0, levels), np.float32)
    timesteps = np.floor((np.arange(levels) + 0.5) / levels * schedule.T).astype(np.int64)
    return ImageLosses(np.concatenate([np.empty(0, np.int64), *indices]), captions, timesteps, *both)


def error_by_level(losses: ImageLosses, which: str) -> Plot:
    """Return a plot of the error by noise level, with standard errors over the images.

    which: the images, for readers.
    """
    n = len(losses.indices)
    lines = {"with the caption": losses.errors, "with the empty caption": losses.empty}
    series = [
        Series(
            name=name,
            x=losses.timesteps.tolist(),
            y=errors.mean(0, dtype=np.float64).tolist(),
            error=(errors.std(0, ddof=1, dtype=np.float64) / n**0.5).tolist() if n > 1 else None,
        )
        for name, errors in lines.items()
    ]
    return Plot(
        name="error_by_level",
        title="Error by noise level",
        x="timestep (noise increases)",
        y="error of the prediction",
        series=series,
        note=f"Mean squared error of the network's prediction target on {which} ({n:,}), with the same noise for both "
        "captions; shaded: the standard error over the images. Where the lines differ, the model reads the caption.",
    )
