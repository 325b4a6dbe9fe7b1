"""Measure where DDIM should end: at index 0, as Stable Diffusion's configuration says, or at t = 0.

The two differ in the last step only (set_alpha_to_one). They are compared with an exact denoiser for a finite dataset,
and with a model of the Shapes dataset:

    python benchmarks/ddim_end.py --model runs/demo/model
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ldm.denoiser import Denoised
from ldm.pipeline import LatentDiffusionPipeline
from ldm.samplers import make_sampler
from ldm.schedule import Level, Schedule
from ldm.spacing import make_plan
from ldm.steps import sample
from train.commands.main import command
from train.config.load import overlay
from train.data.synthetic.shapes import prompts
from train.evaluation.diffusion import alignment

ENDS = {"index 0": False, "t = 0": True}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare the two ends of DDIM, at several numbers of steps."""

    model: str = "runs/demo/model"
    """Folder of a model trained on the Shapes dataset."""
    prompts: int = 256
    """Number of prompts, half of them seen, half unseen."""
    guidance_scale: float = 3.0
    """Guidance scale."""
    steps: tuple[int, ...] = (10, 25, 100)
    """Numbers of steps."""


def exact_errors(n: int, points: int = 64, size: int = 256) -> dict[str, float]:
    """Return, for each end, the root mean square distance of samples to the nearest of the data's points, per element.

    The data have variance 1, and the denoiser is E[x0 | x_t]. A perfect sampler's distance is 0.
    """
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(points, size, generator=generator, dtype=torch.float64)

    def denoise(x: Tensor, level: Level) -> Denoised:
        distances = (x[:, None, :, 0, 0] - level.alpha * data).square().sum(-1)  # (b, points)
        weights = torch.softmax(-distances / (2 * level.sigma**2), 1)
        return Denoised((weights @ data)[..., None, None])

    schedule, sampler = Schedule.build("scaled_linear"), make_sampler("ddim")
    errors = {}
    for name, clean in ENDS.items():
        plan = make_plan(schedule, sampler.grid, n, "trailing", set_alpha_to_one=clean)
        start = plan.start(torch.randn(256, size, 1, 1, generator=generator, dtype=torch.float64))
        x = sample(denoise, start, plan.pairs, sampler.step(schedule), torch.Tensor)[..., 0, 0]
        errors[name] = torch.cdist(x, data).min(1).values.square().mean().div(size).sqrt().item()
    return errors


@command
def main() -> None:
    o = overlay(Options, Options())
    pipe = LatentDiffusionPipeline.from_pretrained(o.model)
    scenes = [*prompts("seen", o.prompts // 2, 1), *prompts("unseen", o.prompts // 2, 1)]
    for n in o.steps:
        exact, images = exact_errors(n), {}
        for name, clean in ENDS.items():
            pipe.model.process = replace(pipe.process, set_alpha_to_one=clean)
            settings = {"sampler": "ddim", "num_inference_steps": n, "guidance_scale": o.guidance_scale}
            shares, images[name] = alignment(pipe, scenes, batch_size=128, **settings)
            print(
                f"{n} steps, end at {name}: exact denoiser {exact[name]:.4f}, all correct {shares['all']:.4f}",
                flush=True,
            )
        one, other = (value.astype(np.float64) for value in images.values())
        difference = np.abs(one - other)
        print(
            f"{n} steps: the images differ by {difference.mean():.3f} of 255, at most {difference.max():.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
