"""How pictures are sampled, as a command line says it."""

from dataclasses import dataclass
from typing import Annotated, TypedDict

import tyro

from ldm.kinds import Spacing
from ldm.samplers import SamplerKind


class Sampling(TypedDict):
    """The arguments of the pipeline that say how pictures are sampled."""

    num_inference_steps: int
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[float, float] | None
    sampler: SamplerKind
    spacing: Spacing | None
    eta: float


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How pictures are sampled: the part of a command line that all painting scripts share."""

    steps: int = 25
    """Sampler steps."""
    guidance_scale: float = 3.0
    """1 is the conditional prediction alone; larger follows the prompt more closely."""
    guidance_rescale: float = 0.0
    """0 to 1: how much of the contrast that a large scale brings is taken back (Lin et al. 2024)."""
    guidance_interval: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LOW HIGH")] = None
    """Noise levels sigma / alpha between which to guide by prompts, e.g. 0.5 4; elsewhere half the work is saved."""
    sampler: SamplerKind = "dpmpp_2m"
    """How a step is taken; docs/mathematics.md compares them by the steps they need."""
    spacing: Spacing | None = None
    """Of the steps over the noise levels; the model's own unless given. On linspace ddim leaves noise in the picture; karras
    isn't for ddim, ddpm, a flow or zero terminal SNR."""
    eta: float = 0.0
    """ddim's share of noise, 0 to 1."""

    def sampling(self) -> Sampling:
        """The options as the pipeline's arguments."""
        return Sampling(
            num_inference_steps=self.steps, guidance_scale=self.guidance_scale, guidance_rescale=self.guidance_rescale,
            guidance_interval=self.guidance_interval, sampler=self.sampler, spacing=self.spacing, eta=self.eta,
        )  # fmt: skip
