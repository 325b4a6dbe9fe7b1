"""Preparation of sampling: the first state, the steps to take, the network's context, and guidance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoencoder.model import Posterior
from ldm.denoiser import Denoise, Denoiser, Network, ScaledNetwork, at_scale, with_context
from ldm.editing import (
    BlendedStep,
    InpaintMasks,
    fill_masked_area,
    inpaint_masks,
    inpainting_context,
    masked_image,
    pad,
    steps_for_strength,
)
from ldm.errors import UserError
from ldm.guidance import (
    Autoguided,
    ClassifierFree,
    ClassifierGuided,
    Conditioned,
    DynamicThreshold,
    Interval,
    LogProbability,
)
from ldm.libraries import randn_tensor
from ldm.model import Model
from ldm.request import Request
from ldm.spacing import LevelPair, Plan
from ldm.steps import Sampler, Step


@dataclass(frozen=True)
class NoiseSource:
    """Source of noise: each call returns standard normal noise of the latents' shape, float32.

    Raises UserError for a list of generators whose length is not the number of images.
    """

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
        """Return the initial noise: `latents`, or drawn noise for None. Raises UserError for another shape."""
        if latents is None:
            return self()
        if tuple(latents.shape) != self.shape:
            raise UserError(f"latents of shape {tuple(latents.shape)}: must be {self.shape} for these images")
        return latents.to(self.device, torch.float32)


@dataclass(frozen=True)
class Prepared:
    """Inputs of the sampling loop."""

    x: Tensor
    """The first state, (b, c, h, w)."""
    pairs: Sequence[LevelPair]
    """The levels of the steps to take."""
    step: Step
    context: Tensor | None
    """Context channels of the network, (1 or b, k, h, w); None: it has none."""


def prepare(
    model: Model, request: Request, sampler: Sampler, plan: Plan, noise: NoiseSource, latents: Tensor | None
) -> Prepared:
    """Prepare a trajectory from noise, from an image, or inside a mask. latents: the initial noise; None: drawn.

    Noise is drawn here in diffusers' order: for the image's posterior, for the first state, and for the posterior of
    the masked image. Each generated image gets its own noise in all three cases, while diffusers uses the same
    posterior sample for all images of one prompt.
    """
    image, inpaints, expand = request.image, model.task == "inpaint", request.expand
    schedule, variance = model.process.schedule, model.process.variance
    if image is None:
        step = sampler.step(schedule, variance, len(plan.pairs))
        x = plan.start(noise.start(latents))
        return Prepared(x, plan.pairs, step, model.white_context(*noise.shape[2:]) if inpaints else None)
    pairs = plan.pairs[len(plan.pairs) - steps_for_strength(image.strength, len(plan.pairs)) :]
    step = sampler.step(schedule, variance, len(pairs))
    pixels = pad(image.pixels, model.size_multiple) * 2 - 1
    mask = None if image.mask is None else pad(image.mask, model.size_multiple)
    masks = None if mask is None else inpaint_masks(mask, model.autoencoder.factor, mask_is_input=inpaints)
    # Without unmasked latents, no step needs blending. A sampler that draws noise is wrapped all the same: it must draw
    # equally often for every mask, or an image would depend on the others of its batch.
    if masks is not None and all(m.all() for m in masks) and not sampler.draws_noise:
        masks = None

    def sampled(pixels: Tensor) -> Tensor:
        return Posterior(*map(expand, model.posterior(pixels))).sample(noise())

    x0: Tensor | None = None
    if image.strength < 1 or (mask is not None and not inpaints):
        x0 = sampled(pixels)
    elif mask is not None and masks is not None:
        # x0 is used only at the mask's edge, and must contain nothing of the masked area.
        x0 = expand(model.posterior(fill_masked_area(pixels, mask)).mean)
    start = noise.start(latents)
    context: Tensor | None = None
    if inpaints and mask is not None:
        context = inpainting_context(expand(mask).to(model.device), sampled(masked_image(pixels, mask)))
    elif inpaints:
        context = model.white_context(*noise.shape[2:])

    if masks is not None and x0 is not None:
        masks = InpaintMasks(*(expand(m).to(model.device) for m in masks))
        step = BlendedStep(step, x0, None if sampler.draws_noise else start, masks, plan.pairs[-1].next)
    if x0 is None or image.strength == 1:
        return Prepared(plan.start(start), pairs, step, context)
    x = pairs[0].now.alpha * x0 + pairs[0].now.sigma * start if pairs else x0
    return Prepared(x, pairs, step, context)


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Guidance settings; the pipeline's arguments explain them. Raises UserError for scales that aren't finite."""

    scale: float
    rescale: float
    interval: tuple[float, float] | None
    threshold: tuple[float, float] | None
    compose: Sequence[tuple[str, float]]
    weak: Model | None
    weak_scale: float
    classifier: LogProbability | None
    classifier_scale: float
    reuse_features: int

    def __post_init__(self) -> None:
        scales = (self.scale, self.weak_scale, self.classifier_scale, *(scale for _, scale in self.compose))
        if not all(map(math.isfinite, scales)):
            raise UserError(f"guidance scales {', '.join(map(str, scales))}: must be finite numbers")
        if self.reuse_features < 1:
            raise UserError(f"reuse features {self.reuse_features}: must be a number of steps, at least 1")

    @property
    def only_prompts(self) -> bool:
        """Whether only prompts guide; with any other guidance, the learned variance is unknown."""
        return not self.rescale and self.weak is None and self.classifier is None


def guide(model: Model, request: Request, guidance: GuidanceSettings, context: Tensor | None) -> Denoise:
    """Return the guided denoiser. Raises UserError if the weaker model doesn't fit."""
    network, expand, texts = model.network(guidance.reuse_features), request.expand, request.texts
    if model.backbone.guidance_width:
        return _distilled(model, network, request, guidance, context)
    denoiser = _denoiser(network, model, context)
    conditions = [(expand(texts.condition), guidance.scale)]
    conditions += [(expand(model.encode([text], texts.rules)), scale) for text, scale in guidance.compose]
    denoise: Denoise = ClassifierFree(denoiser, expand(texts.negative), conditions, guidance.rescale)
    if guidance.interval is not None:
        denoise = Interval(denoise, Conditioned(denoiser, expand(texts.condition)), *guidance.interval)
    if (weak := guidance.weak) is not None:
        if not texts.prompts:
            raise UserError("the weaker model encodes the prompt itself; give prompt instead of prompt_embeds")
        if not (
            weak.backbone.in_channels == model.backbone.in_channels
            and torch.equal(weak.process.schedule.alpha, model.process.schedule.alpha)
        ):
            raise UserError(
                "the weaker model must have the same latent channels, noise schedule and task as the model; use "
                "one that was trained with the same settings"
            )
        weaker = Conditioned(_denoiser(weak.network(), weak, context), expand(weak.encode(texts.prompts, texts.rules)))
        denoise = Autoguided(denoise, weaker, guidance.weak_scale)
    return _limited(denoise, guidance)


def _distilled(
    model: Model, network: ScaledNetwork, request: Request, guidance: GuidanceSettings, context: Tensor | None
) -> Denoise:
    """Return the denoiser of a model that reads its guidance scale, which one evaluation is enough for."""
    refused = {
        "a negative prompt": request.texts.has_negative,
        "guidance rescale": guidance.rescale,
        "a guidance interval": guidance.interval,
        "composed prompts": guidance.compose,
        "a weaker model": guidance.weak,
    }
    if names := [name for name, given in refused.items() if given]:
        raise UserError(
            f"{names[0]}: this model's guidance is distilled, so only its scale can be chosen; leave it out"
        )
    denoiser = _denoiser(at_scale(network, guidance.scale), model, context)
    return _limited(Conditioned(denoiser, request.expand(request.texts.condition)), guidance)


def _limited(denoise: Denoise, guidance: GuidanceSettings) -> Denoise:
    """Return the denoiser with a classifier's guidance and a limit of its values, if there are such settings."""
    if guidance.classifier is not None:
        denoise = ClassifierGuided(denoise, guidance.classifier, guidance.classifier_scale)
    if guidance.threshold is not None:
        denoise = DynamicThreshold(denoise, *guidance.threshold)
    return denoise


def _denoiser(network: Network, model: Model, context: Tensor | None) -> Denoiser:
    if context is not None:
        network = with_context(network, context)
    return Denoiser(network, model.process.target, model.backbone.dtype)
