"""The sampling options of the command line."""

from dataclasses import dataclass, replace
from typing import Annotated, Self, TypedDict

import tyro

from ldm.kinds import Spacing
from ldm.samplers import SamplerKind


class Sampling(TypedDict):
    """Sampling arguments of the pipeline."""

    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    dynamic_threshold: tuple[float, float] | None
    reuse_features: int
    sampler: SamplerKind | None
    spacing: Spacing | None
    eta: float


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options shared by all commands that generate images."""

    steps: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Number of sampler steps. None: 25, or 4 with sampler lcm."""
    guidance_scale: float = 3.0
    """Guidance scale: 1 is no guidance; larger values follow the prompt more closely."""
    guidance_rescale: float = 0.0
    """Share of a large guidance scale's excess contrast that is removed, 0 to 1 (Lin et al. 2024)."""
    guidance_interval: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Range of noise levels sigma / alpha in which guidance is used, e.g. 0.5 4. None: all levels.
    Steps outside the range take half the time."""
    dynamic_threshold: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="SHARE LIMIT")] = None
    """Limit of the latents' values, e.g. 0.995 3, against the oversaturation that a large guidance scale causes.
    If less than SHARE of an image's values is within LIMIT, all are clipped and scaled (Saharia et al. 2022).
    None: no limit."""
    reuse_features: int = 1
    """Number of steps in which the output of the UNet's deep layers is used, which is faster but approximate
    (DeepCache, Ma et al. 2023). 1: it is computed in each step.
    For samplers that evaluate the UNet several times per step, such as heun, it is a number of evaluations."""
    sampler: SamplerKind | None = None
    """Sampler; docs/mathematics.md describes the samplers and compares the number of steps that they need.
    None: the model's own, lcm for a consistency model and dpmpp_2m for all others."""
    spacing: Spacing | None = None
    """Spacing of the steps over the noise levels (Lin et al. 2024; Karras et al. 2022). None: the model's own.
    With linspace, ddim leaves noise in the image.
    karras can't be used with ddim or ddpm, nor with models of schedule flow or zero terminal SNR."""
    eta: float = 0.0
    """Amount of noise that ddim adds at each step, 0 (none) to 1 (as much as ddpm)."""

    @property
    def number_of_steps(self) -> int:
        """Number of sampler steps, given or not."""
        return self.steps if self.steps is not None else 4 if self.sampler == "lcm" else 25

    def for_sampler(self, own: SamplerKind) -> Self:
        """Return the options with a sampler and a number of steps. own: the sampler of the model."""
        chosen = replace(self, sampler=self.sampler or own)
        return replace(chosen, steps=chosen.number_of_steps)

    def sampling(self) -> Sampling:
        """Return the options as arguments of the pipeline."""
        return Sampling(
            num_inference_steps=self.number_of_steps,
            guidance_scale=self.guidance_scale,
            guidance_rescale=self.guidance_rescale,
            guidance_interval=self.guidance_interval,
            dynamic_threshold=self.dynamic_threshold,
            reuse_features=self.reuse_features,
            sampler=self.sampler,
            spacing=self.spacing,
            eta=self.eta,
        )
