"""Preparation of sampling: the first state, the legs to walk, the network's context, and guidance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from autoencoder.model import Posterior
from ldm.denoiser import Denoise, Denoiser, beside
from ldm.editing import Blended, InpaintMasks, filled, inpaint_masks, inpainting_context, pad, steps_of, without
from ldm.errors import UserError
from ldm.guidance import Autoguided, ClassifierFree, ClassifierGuided, Conditioned, Interval, LogProbability
from ldm.model import Model
from ldm.request import Request
from ldm.spacing import Leg, Plan
from ldm.steps import Sampler, Step


@dataclass(frozen=True)
class NoiseSource:
    """Source of noise: each call returns standard normal noise of the latents' shape, float32."""

    shape: tuple[int, int, int, int]
    generator: torch.Generator | list[torch.Generator] | None
    device: torch.device

    def __post_init__(self) -> None:
        if isinstance(self.generator, list) and len(self.generator) != self.shape[0]:
            raise UserError(
                f"{len(self.generator)} generators for {self.shape[0]} images: give one, or one for each image"
            )

    def __call__(self) -> Tensor:
        return randn_tensor(self.shape, self.generator, self.device, torch.float32)

    def start(self, latents: Tensor | None) -> Tensor:
        """Return the initial noise: `latents`, or drawn if that is None. Raises UserError for another shape."""
        if latents is None:
            return self()
        if tuple(latents.shape) != self.shape:
            raise UserError(f"latents of shape {tuple(latents.shape)}: these images need {self.shape}")
        return latents.to(self.device, torch.float32)


@dataclass(frozen=True)
class Prepared:
    """Inputs of the sampling loop."""

    x: Tensor
    """The first state, (b, c, h, w)."""
    legs: Sequence[Leg]
    step: Step
    context: Tensor | None
    """Context channels of the network, (1 or b, k, h, w); None: it takes none."""


def prepare(
    model: Model, request: Request, sampler: Sampler, route: Plan, noise: NoiseSource, latents: Tensor | None
) -> Prepared:
    """Prepare a trajectory from noise, from an image, or within a mask. latents: the initial noise; None: drawn.

    Noise is drawn here in diffusers' order: for the image's posterior, for the first state, and for the posterior of
    the image outside the mask. Each generated image gets its own noise in all three masks, while stock diffusers
    uses the same posterior sample for all images of one prompt.
    """
    given, sees, spread = request.given, model.task == "inpaint", request.spread
    step = sampler.step(model.process.schedule, model.process.variance)
    if given is None:
        x = route.start(noise.start(latents))
        return Prepared(x, route.legs, step, model.white_context(*noise.shape[2:]) if sees else None)
    legs = route.legs[len(route.legs) - steps_of(given.strength, len(route.legs)) :]
    pixels = pad(given.pixels, model.size_multiple) * 2 - 1
    mask = None if given.mask is None else pad(given.mask, model.size_multiple)
    masks = None if mask is None else inpaint_masks(mask, model.autoencoder.factor, seen=sees)
    if masks is not None and all(mask_of_latents.all() for mask_of_latents in masks) and not sampler.draws_noise:
        masks = None  # a sampler that draws noise must draw as often for every mask, or images depend on the batch

    def sampled(pixels: Tensor) -> Tensor:
        return Posterior(*map(spread, model.posterior(pixels))).sample(noise())

    x0: Tensor | None = None
    if given.strength < 1 or (mask is not None and not sees):
        x0 = sampled(pixels)
    elif (
        mask is not None and masks is not None
    ):  # x0 is used at the mask's edge only, and must contain nothing from under the mask
        x0 = spread(model.posterior(filled(pixels, mask)).mean)
    start = noise.start(latents)
    context: Tensor | None = None
    if sees and mask is not None:
        context = inpainting_context(spread(mask).to(model.device), sampled(without(pixels, mask)))
    elif sees:
        context = model.white_context(*noise.shape[2:])

    if masks is not None and x0 is not None:
        masks = InpaintMasks(*(spread(mask_of_latents).to(model.device) for mask_of_latents in masks))
        step = Blended(step, x0, None if sampler.draws_noise else start, masks, route.legs[-1].next)
    if x0 is None or given.strength == 1:
        return Prepared(route.start(start), legs, step, context)
    x = legs[0].now.alpha * x0 + legs[0].now.sigma * start if legs else x0
    return Prepared(x, legs, step, context)


@dataclass(frozen=True, kw_only=True)
class Guides:
    """Guidance settings; see the pipeline's arguments. Raises UserError for scales that aren't finite."""

    scale: float
    rescale: float
    interval: tuple[float, float] | None
    compose: Sequence[tuple[str, float]]
    weak: Model | None
    weak_scale: float
    classifier: LogProbability | None
    classifier_scale: float

    def __post_init__(self) -> None:
        scales = (self.scale, self.weak_scale, self.classifier_scale, *(scale for _, scale in self.compose))
        if not all(map(math.isfinite, scales)):
            raise UserError(f"guidance scales {', '.join(map(str, scales))}: give finite numbers")

    @property
    def prompts_alone(self) -> bool:
        """Whether only prompts guide: with other guidance, the learned variance is unknown."""
        return not self.rescale and self.weak is None and self.classifier is None


def guide(model: Model, request: Request, guides: Guides, context: Tensor | None) -> Denoise:
    """Return the guided denoiser. Raises UserError if the weaker model doesn't fit."""
    denoiser, spread, texts = _denoiser(model, context), request.spread, request.texts
    conditions = [(spread(texts.condition), guides.scale)]
    conditions += [(spread(model.encode([text])), scale) for text, scale in guides.compose]
    denoise: Denoise = ClassifierFree(denoiser, spread(texts.negative), conditions, guides.rescale)
    if guides.interval is not None:
        denoise = Interval(denoise, Conditioned(denoiser, spread(texts.condition)), *guides.interval)
    if (weak := guides.weak) is not None:
        if not texts.prompts:
            raise UserError("the weaker model reads the prompt itself: give prompt, not prompt_embeds")
        if not (
            weak.backbone.in_channels == model.backbone.in_channels
            and torch.equal(weak.process.schedule.alpha, model.process.schedule.alpha)
        ):
            raise UserError(
                "the weaker model has other latents or another noise schedule, or only one of the two was trained to "
                "inpaint: give one of the same kind"
            )
        weaker = Conditioned(_denoiser(weak, context), spread(weak.encode(texts.prompts)))
        denoise = Autoguided(denoise, weaker, guides.weak_scale)
    if guides.classifier is not None:
        denoise = ClassifierGuided(denoise, guides.classifier, guides.classifier_scale)
    return denoise


def _denoiser(model: Model, context: Tensor | None) -> Denoiser:
    network = model.backbone if context is None else beside(model.backbone, context)
    return Denoiser(network, model.process.target, model.backbone.dtype)
