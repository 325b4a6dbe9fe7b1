"""Text to pictures, from noise, from a picture or inside a mask: text encoder → guided sampling in latent space →
autoencoder. One loop, whose denoiser guidance wraps and whose step a mask wraps.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder.model import Autoencoder, Posterior
from autoencoder.tiling import Tiles
from conditioning.clip import ClipTextEncoder
from ldm.denoiser import Denoise, Denoised, Denoiser, Network, beside
from ldm.editing import (
    Blended,
    Painted,
    Pixels,
    filled,
    inpainting_context,
    pad,
    painted,
    paste,
    steps_of,
    to_mask,
    to_pixels,
    without,
)
from ldm.errors import UserError
from ldm.formats.images import MAX_PIXELS
from ldm.formats.scheduler_config import Process
from ldm.formats.single_file import Parts, load_single_file, save_single_file
from ldm.guidance import Autoguided, ClassifierFree, ClassifierGuided, Conditioned, Interval, LogProbability
from ldm.model import PICTURES_AT_ONCE, Model, from_parts, load
from ldm.networks.attention import AttentionBackend
from ldm.networks.backbone import Backbone
from ldm.samplers import SamplerKind, make_sampler
from ldm.schedule import Level
from ldm.spacing import Grid, Leg, Plan, Spacing, plan
from ldm.steps import Step, invert, sample
from ldm.task import Task

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["LatentDiffusionPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
"""(pipe, step, timestep, {"latents": the state after it, "denoised": what was made out in it}) → the same, as changed."""


@dataclass(frozen=True)
class Pictures:
    """The pipeline's output: PIL pictures, a NumPy array (b, h, w, 3) in [0, 1], or a tensor (b, 3, h, w) in [0, 1]."""

    images: list[Image.Image] | np.ndarray | Tensor


class LatentDiffusionPipeline:
    """A trained model, ready to paint. Argument names are those of diffusers' pipelines."""

    def __init__(
        self,
        backbone: Backbone | UNet2DConditionModel,
        autoencoder: Autoencoder,
        text_encoder: ClipTextEncoder,
        process: Process,
        task: Task | None = None,
    ) -> None:
        """task: by the backbone's channels unless given. Raises UserError where the parts don't belong together."""
        self.model = Model(backbone, autoencoder, text_encoder, process, task)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, chunks: int | None = None, backbone: Backbone | None = None
    ) -> Self:
        """Load the folder that stage 2 writes, or any Stable-Diffusion-1.x/2.x-shaped diffusers folder or hub id.

        chunks: of max_length tokens in which prompts are read; the model's own unless given.
        backbone: the network, in place of the folder's UNet.
        Raises UserError when parts are missing or not understood.
        """
        return cls(*load(folder, chunks, backbone))

    @classmethod
    def from_single_file(cls, path: str | Path, *, config: str | Path, chunks: int | None = None) -> Self:
        """Load one safetensors file with the original key names, e.g. of Stable Diffusion 1.5.

        config: a local diffusers folder of the same shape, of which JSON and tokenizer are read. Nothing is downloaded.
        chunks: as in `from_pretrained`. Raises UserError where file and configuration can't be read or don't fit.
        """
        return cls.from_parts(load_single_file(path, config), config, chunks=chunks)

    @classmethod
    def from_parts(cls, parts: Parts, folder: str | Path, *, chunks: int | None = None) -> Self:
        """Take networks at hand and the tokenizer of a pipeline's folder. Raises UserError where it can't be read."""
        return cls(*from_parts(parts, folder, chunks))

    def save_single_file(self, path: str | Path) -> None:
        """Write one new safetensors file with the original key names; see `save_single_file`."""
        save_single_file(self.model, path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole folder, safetensors and JSON only, every key of the scheduler spelled out."""
        self.model.save(Path(folder))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        *,
        image: Pixels | None = None,
        strength: float | None = None,
        mask_image: Pixels | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        compose: Sequence[tuple[str, float]] = (),
        weak: "LatentDiffusionPipeline | None" = None,
        weak_scale: float = 2.0,
        classifier: LogProbability | None = None,
        classifier_scale: float = 1.0,
        sampler: SamplerKind = "dpmpp_2m",
        spacing: Spacing | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: OutputType = "pil",
        progress: bool = False,
    ) -> Pictures:
        """Paint `num_images_per_prompt` pictures of each prompt, from noise, from a picture, or inside a mask.

        image: one for all prompts, or one each (or several for one prompt), of any size. What is painted has that size.
        strength: how much of the picture is given up: of n steps the last ⌊n · strength⌋ are walked, at least one. At 1
            only its size counts, as in text-to-image, at 0 it comes back through the autoencoder. 0.8 unless given, and 1
            with a mask.
        mask_image: white is painted, black stays as it is, bit by bit, and grey is mixed; of any size, one for all or each.
        guidance_scale: 1 is the conditional prediction, larger follows the prompt more closely (Ho & Salimans 2022).
        guidance_rescale: 0 to 1, against the contrast that a large scale brings (Lin et al. 2024).
        guidance_interval: the noise levels sigma / alpha, low and high, between which to guide by prompts; on others the
            first prompt's prediction stands alone. None: everywhere.
        compose: further prompts that every picture follows too, each with its own guidance scale (Liu et al. 2022).
        weak, weak_scale: a weaker model to be guided away from (Karras et al. 2024), best with guidance_scale 1, as the
            two multiply; weak_scale 1 is without.
        classifier, classifier_scale: log p(y | x_t) of latents to be guided by (Dhariwal & Nichol 2021).
        spacing: of the steps over the noise levels, in place of the model's own.
        eta: ddim's share of noise, 0 to 1.
        generator: one for all pictures, or a list with one for each; on the CPU it gives the same noise for any device.
        latents: starting noise (b, c, h, w) of unit variance, instead of drawing it.
        prompt_embeds, negative_prompt_embeds: what `encode` gives of prompts, (b, tokens, width), in their place.
        callback_on_step_end: called after each step; what it returns as "latents" takes their place (unipc corrects its last
            step before the next, from what it has made itself).
        Raises UserError for arguments that don't fit, RunError when the picture comes out non-finite.
        """
        scales = (guidance_scale, weak_scale, classifier_scale, *(scale for _, scale in compose))
        if not all(map(math.isfinite, scales)):
            raise UserError(f"guidance scales {', '.join(map(str, scales))}: give finite numbers")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt {num_images_per_prompt}: at least 1")
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type {output_type!r}: choose {', '.join(get_args(OutputType))}")
        if image is None and (mask_image is not None or strength is not None):
            raise UserError("mask_image and strength speak of a picture: give image too")
        if image is not None and (height, width) != (None, None):
            raise UserError(f"height {height} and width {width} with an image: its own size holds")
        if weak is not None and prompt_embeds is not None:
            raise UserError("the weaker model reads the prompt itself: give prompt, not prompt_embeds")

        # What is given: each for all pictures, or one for each of n.
        given = None if image is None else to_pixels(image)  # (n, 3, H, W)
        mask = None if given is None or mask_image is None else to_mask(mask_image, (given.shape[2], given.shape[3]))
        prompts, condition = self._conditions(prompt, prompt_embeds, "prompt")
        _, negative = self._conditions(negative_prompt or "", negative_prompt_embeds, "negative_prompt")
        lengths = {"prompts": len(condition), "negative prompts": len(negative)}
        lengths |= {what: len(x) for what, x in (("pictures", given), ("masks", mask)) if x is not None}
        n = max(lengths.values())
        for what, length in lengths.items():
            if length not in (1, n):
                most = max(lengths, key=lambda name: lengths[name])
                raise UserError(f"{n} {most} for {length} {what}: give one for all, or as many")
        count = n * num_images_per_prompt

        def spread(x: Tensor) -> Tensor:
            """(1 or n, …) → (count, …)."""
            return x.expand(n, *x.shape[1:]).repeat_interleave(num_images_per_prompt, 0)

        multiple = self.autoencoder.factor * self.backbone.size_multiple
        if given is not None:  # odd sizes are painted a little larger, and cut back
            height, width = (side + -side % multiple for side in given.shape[2:])
        shape = (count, self.autoencoder.latent_channels, *self.latent_size(height, width))
        if isinstance(generator, list) and len(generator) != count:
            raise UserError(f"{len(generator)} generators for {count} pictures: give one, or one for each picture")
        if latents is not None and tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)}: these pictures need {shape}")

        how = make_sampler(sampler, eta)
        route = self._plan(how.grid, num_inference_steps, spacing)
        process = self.process
        step: Step = how.step(process.schedule, process.variance)
        learned = how.uses_learned_variance and process.variance == "learned"
        if learned and (guidance_rescale or weak is not None or classifier is not None):
            raise UserError(
                f"{sampler} with a learned variance knows the prompt's guidance only: leave out rescale, weak model and "
                "classifier, or take another sampler"
            )
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        k = steps_of(strength, len(route.legs)) if given is not None else len(route.legs)
        legs = route.legs[len(route.legs) - k :]

        # Noise is drawn in diffusers' order: of the picture's posterior, to begin with, and of what a mask leaves. But each
        # picture has its own of all three, also where stock repeats one posterior's sample for several of one prompt.
        noise = lambda: randn_tensor(shape, generator, self.device, torch.float32)  # noqa: E731
        pixels = None if given is None else pad(given, multiple) * 2 - 1
        inside = None if mask is None else pad(mask, multiple)
        places = None if inside is None else painted(inside, self.autoencoder.factor, seen=self.inpaints)
        fresh = how.draws_noise
        if places is not None and all(place.all() for place in places) and not fresh:
            places = None  # but where noise is drawn, as often for each mask, lest pictures depend on their batch
        x0: Tensor | None = None
        context: Tensor | None = None
        if pixels is not None and (strength < 1 or places is not None or (mask is not None and not self.inpaints)):
            if strength < 1 or inside is None or not self.inpaints:
                x0 = Posterior(*map(spread, self.model.posterior(pixels))).sample(noise())
            else:  # only an edge is held to it, of which nothing under the mask may be known
                x0 = spread(self.model.posterior(filled(pixels, inside)).mean)
        start = noise() if latents is None else latents.to(self.device, torch.float32)
        if pixels is not None and inside is not None and self.inpaints:
            around = Posterior(*map(spread, self.model.posterior(without(pixels, inside)))).sample(noise())
            context = inpainting_context(spread(inside).to(self.device), around)
        if places is not None and x0 is not None:
            places = Painted(*(spread(place).to(self.device) for place in places))
            step = Blended(step, x0, None if fresh else start, places, route.legs[-1].next)
        if mask is None and self.inpaints:
            context = self.model.white_context(*shape[2:])
        network: Network = self.backbone if context is None else beside(self.backbone, context)

        denoiser = Denoiser(network, process.target, self.backbone.dtype)
        also = [(self.encode([text]), scale) for text, scale in compose]
        conditions = [(spread(found), scale) for found, scale in ((condition, guidance_scale), *also)]
        denoise: Denoise = ClassifierFree(denoiser, spread(negative), conditions, guidance_rescale)
        if guidance_interval is not None:
            denoise = Interval(denoise, Conditioned(denoiser, spread(condition)), *guidance_interval)
        if weak is not None:
            if not (weak.backbone.in_channels == self.backbone.in_channels
                    and torch.equal(weak.process.schedule.alpha, process.schedule.alpha)):  # fmt: skip
                raise UserError(
                    "the weaker model has other latents or another noise schedule, or only one of the two was trained to "
                    "inpaint: give one of the same kind"
                )
            weaker: Network = weak.backbone if context is None else beside(weak.backbone, context)
            guide = Denoiser(weaker, weak.process.target, weak.backbone.dtype)
            denoise = Autoguided(denoise, Conditioned(guide, spread(weak.encode(prompts))), weak_scale)
        if classifier is not None:
            denoise = ClassifierGuided(denoise, classifier, classifier_scale)

        if x0 is None or strength == 1:
            z = route.start(start)
        else:
            z = legs[0].now.alpha * x0 + legs[0].now.sigma * start if legs else x0
        watched = _Watched(denoise)
        with tqdm(total=len(legs), disable=not progress, dynamic_ncols=True) as bar:

            def after(k: int, leg: Leg, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                tensors = {"latents": x, "denoised": watched.last.x0}
                changed = callback_on_step_end(self, k, leg.now.model_time, tensors)
                found = (changed or {}).get("latents", x)
                if found.shape != x.shape:
                    raise UserError(
                        f"callback_on_step_end gave latents of shape {tuple(found.shape)}, not {tuple(x.shape)}"
                    )
                return found.to(x)

            with self.model.running(self.unet), weak.model.running(weak.unet) if weak else nullcontext():
                z = sample(watched, z, legs, step, noise, after)
        if output_type == "latent":
            return Pictures(z)
        made = self.decode(z)
        if given is not None:
            made = made[..., : given.shape[2], : given.shape[3]]
            if mask is not None:
                made = paste(made.cpu(), spread(given), spread(mask))
        return Pictures(_finish(made, output_type))

    @torch.no_grad()
    def invert(
        self,
        latents: Tensor,
        prompt: str | Sequence[str] = "",
        *,
        num_inference_steps: int = 50,
        spacing: Spacing | None = None,
        refinements: int = 2,
    ) -> Tensor:
        """The noise (b, c, h, w) from which these latents (b, c, h, w) are painted again.

        By ddim with eta 0 and guidance 1, with as many steps and the same spacing.

        prompt: one for all, or each. refinements: of each step, an evaluation more for a more exact way back.
        """
        prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(latents):
            raise UserError(f"{len(prompts)} prompts for {len(latents)} latents: give one for all, or each")
        network = self.text_network(*latents.shape[2:])
        denoise = Conditioned(Denoiser(network, self.process.target, self.backbone.dtype), self.encode(prompts))
        route = self._plan(make_sampler("ddim").grid, num_inference_steps, spacing)
        with self.model.running(self.unet):
            return invert(denoise, latents.to(self.device, torch.float32), route.legs, refinements) / route.start_std

    # -- the model, and how it runs --------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """What predicts."""
        return self.model.backbone

    @property
    def unet(self) -> Any:
        """The backbone's own module, e.g. diffusers' UNet2DConditionModel."""
        return self.model.backbone.module

    @property
    def autoencoder(self) -> Autoencoder:
        """Pictures to latents and back."""
        return self.model.autoencoder

    @property
    def text_encoder(self) -> ClipTextEncoder:
        """Prompts to the backbone's condition."""
        return self.model.text_encoder

    @property
    def process(self) -> Process:
        """The noise that the backbone was trained on, and what it predicts."""
        return self.model.process

    @property
    def inpaints(self) -> bool:
        """Whether the backbone was trained to inpaint: it sees the mask, and what that leaves of the picture."""
        return self.model.task == "inpaint"

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self.model.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move, and choose the arithmetic. The autoencoder stays fp32 under fp16, in which its activations overflow."""
        self.model.to(device, dtype)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the networks in main memory, and each on the device only while it runs: the largest has to fit, not all.

        Raises UserError where there is no such device.
        """
        try:
            offload = torch.device(device)
            torch.empty(1, device=offload)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {str(device)!r} can't be used: {str(error).strip().splitlines()[0]}") from None
        self.to("cpu")
        self.model.offload = offload

    def set_attention(self, backend: AttentionBackend) -> Literal["sdpa", "xformers"]:
        """Choose what computes the backbone's attention, tried on its present device and dtype; returns what `auto` came to.

        Raises UserError where xformers is asked for and doesn't work.
        """
        return self.backbone.set_attention(backend, device=self.device)

    def enable_vae_tiling(self, tiles: Tiles | None = None) -> None:
        """Decode and encode large pictures tile by tile, for small memory."""
        self.autoencoder.tiles = tiles or Tiles()

    def disable_vae_tiling(self) -> None:
        """Whole pictures again."""
        self.autoencoder.tiles = None

    def enable_vae_slicing(self) -> None:
        """Decode and encode a batch's pictures one by one, for small memory."""
        self.model.pictures_at_once = 1

    def disable_vae_slicing(self) -> None:
        """Several at once again."""
        self.model.pictures_at_once = PICTURES_AT_ONCE

    # -- its networks, one by one --------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return text features of prompts, (b, tokens, width); each distinct one is worked out once."""
        return self.model.encode(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures (b, 3, H, W) in [0, 1] of normalised latents (b, c, h, w), worked out in portions."""
        return self.model.decode(latents)

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """What latents (b, c, h, w) look like, by a linear map to colour: at once, a pixel a latent.

        Raises UserError for an autoencoder without that map.
        """
        if self.autoencoder.colours is None:
            raise UserError(
                "this model's autoencoder has no colours for previews: stage 1 fits them, and so does "
                "autoencoder.preview.fit_colours for another's"
            )
        colours = self.autoencoder.colours(latents) / 2 + 0.5
        return to_pil(colours.clamp(0, 1))

    def text_network(self, h: int, w: int) -> Network:
        """The network of states (b, c, h, w) as for text-to-image: one that inpaints sees a mask that is white all over."""
        if not self.inpaints:
            return self.backbone
        return beside(self.backbone, self.model.white_context(h, w))

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the latents of pictures of so many pixels; None: the model's own. Else UserError."""
        factor = self.autoencoder.factor
        (natural_h, natural_w), multiple = self.backbone.sample_size, factor * self.backbone.size_multiple
        h = natural_h * factor if height is None else height
        w = natural_w * factor if width is None else width
        if h <= 0 or w <= 0 or h % multiple or w % multiple:
            raise UserError(
                f"a picture of {w}×{h} pixels: width and height must be multiples of {multiple} for this model"
            )
        if h * w > MAX_PIXELS:
            raise UserError(f"a picture of {w}×{h} pixels: up to {MAX_PIXELS:,} in all are accepted")
        return h // factor, w // factor

    # -- a call's parts -------------------------------------------------------------------------------------------------

    def _plan(self, grid: Grid, steps: int, spacing: Spacing | None) -> Plan:
        p = self.process
        spacing = spacing or p.spacing
        if spacing not in get_args(Spacing):
            raise UserError(f"spacing {spacing!r}: choose {', '.join(get_args(Spacing))}")
        return plan(p.schedule, grid, steps, spacing, p.steps_offset, p.set_alpha_to_one)

    def _conditions(
        self, given: str | Sequence[str] | None, embeds: Tensor | None, what: str
    ) -> tuple[list[str], Tensor]:
        """Prompts, none where their features are given, and features (b, tokens, width)."""
        if embeds is None:
            prompts = [given] if isinstance(given, str) else list(given or ())
            if not prompts:
                raise UserError(f"{what} {given!r}: give at least one, or {what}_embeds")
            return prompts, self.encode(prompts)
        if given:
            raise UserError(f"{what} and {what}_embeds are both given: give one of them")
        shape = (self.text_encoder.tokens, self.text_encoder.width)
        if embeds.ndim != 3 or not len(embeds) or embeds.shape[1:] != shape:
            raise UserError(f"{what}_embeds of shape {tuple(embeds.shape)}: (b, {shape[0]}, {shape[1]}) is accepted")
        return [], embeds.to(self.device, self.backbone.dtype)


class _Watched:
    """A denoiser that keeps what it gave last."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        self.last = self.denoise(x_t, level)
        return self.last


def _finish(pixels: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pt":
        return pixels
    return to_pil(pixels) if output_type == "pil" else pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [0, 1]."""
    array = (pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in array]
