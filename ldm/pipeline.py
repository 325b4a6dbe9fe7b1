"""The pipeline from text to images: text encoder → guided sampling in latent space → autoencoder.

Sampling starts from noise or from an image, optionally inside a mask. One loop does all of these: guidance wraps its
denoiser, and a mask wraps its step.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder.model import Autoencoder
from autoencoder.tiling import Tiles
from conditioning.clip import ClipTextEncoder
from ldm.denoiser import Denoise, Denoised, Denoiser, Network, beside
from ldm.editing import Pixels, paste
from ldm.errors import UserError
from ldm.formats.scheduler_config import Process
from ldm.formats.single_file import Parts, load_single_file, save_single_file
from ldm.guidance import Conditioned, LogProbability
from ldm.model import IMAGES_AT_ONCE, Model, from_parts, load
from ldm.networks.attention import AttentionBackend
from ldm.networks.backbone import Backbone
from ldm.preparation import Guides, NoiseSource, Prepared, guide, prepare
from ldm.request import Given, Request, Texts
from ldm.samplers import SamplerKind, make_sampler
from ldm.schedule import Level
from ldm.spacing import Grid, Leg, Plan, Spacing, plan
from ldm.steps import invert, sample
from ldm.task import Task

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["LatentDiffusionPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
"""Callback: (pipe, step, timestep, {"latents": state after the step, "denoised": x̂0}) → changed tensors, or None."""


@dataclass(frozen=True)
class Images:
    """Output of the pipeline: PIL images, a NumPy array (b, h, w, 3) in [0, 1] or a tensor (b, 3, h, w) in [0, 1]."""

    images: list[Image.Image] | np.ndarray | Tensor


class LatentDiffusionPipeline:
    """Pipeline that generates images with a trained model. Argument names are those of diffusers' pipelines."""

    def __init__(
        self,
        backbone: Backbone | UNet2DConditionModel,
        autoencoder: Autoencoder,
        text_encoder: ClipTextEncoder,
        process: Process,
        task: Task | None = None,
    ) -> None:
        """Combine the parts; the backbone's channels decide the task unless it is given.

        Raises UserError if the parts don't fit together.
        """
        self.model = Model(backbone, autoencoder, text_encoder, process, task)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, chunks: int | None = None, backbone: Backbone | None = None
    ) -> Self:
        """Load the folder that stage 2 writes, or any Stable-Diffusion-1.x/2.x-shaped diffusers folder or hub id.

        chunks: number of chunks of max_length tokens in which prompts are read; None: the model's own.
        backbone: network to use instead of the folder's UNet.
        Raises UserError if parts are missing or unknown.
        """
        return cls(*load(folder, chunks, backbone))

    @classmethod
    def from_single_file(cls, path: str | Path, *, config: str | Path, chunks: int | None = None) -> Self:
        """Load one safetensors file with the original key names, e.g. of Stable Diffusion 1.5.

        config: a local diffusers folder of the same shape; its JSON and tokenizer are read. Nothing is downloaded.
        chunks: as in `from_pretrained`. Raises UserError if the file or the configuration can't be read or don't fit.
        """
        return cls.from_parts(load_single_file(path, config), config, chunks=chunks)

    @classmethod
    def from_parts(cls, parts: Parts, folder: str | Path, *, chunks: int | None = None) -> Self:
        """Combine loaded networks and the tokenizer of a pipeline's folder. Raises UserError if it can't be read."""
        return cls(*from_parts(parts, folder, chunks))

    def save_single_file(self, path: str | Path) -> None:
        """Write one new safetensors file with the original key names; see `save_single_file`."""
        save_single_file(self.model, path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole folder, safetensors and JSON only, with every scheduler key explicit."""
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
    ) -> Images:
        """Generate `num_images_per_prompt` images of each prompt, from noise, from an image, or inside a mask.

        image: one for all prompts, one for each, or several for one prompt, of any size. The result has the same size.
        strength: how much the image is changed. The last ⌊n · strength⌋ of n steps are walked, at least one. At 1,
            only the image's size matters, as in text-to-image. At 0, the image only passes through the autoencoder.
            Default: 0.8, with a mask 1.
        mask_image: white is painted, black stays bit-identical, grey is mixed; of any size, one for all or for each.
        guidance_scale: 1 is the conditional prediction; larger follows the prompt more closely (Ho & Salimans 2022).
        guidance_rescale: 0 to 1; reduces the contrast that a large scale causes (Lin et al. 2024).
        guidance_interval: low and high noise level sigma / alpha between which prompts guide. At other levels the
            prediction is that of the first prompt, without guidance. None: guidance everywhere.
        compose: further prompts that every image follows too, each with its own guidance scale (Liu et al. 2022).
        weak, weak_scale: a weaker model to guide away from (Karras et al. 2024). Best with guidance_scale 1, since the
            two scales multiply. weak_scale 1 turns it off.
        classifier, classifier_scale: log p(y | x_t) of latents that guides sampling (Dhariwal & Nichol 2021).
        spacing: spacing of the steps over the noise levels; None: the model's own.
        eta: ddim's share of noise, 0 to 1.
        generator: one for all images, or a list with one for each; on the CPU it gives the same noise for any device.
        latents: initial noise (b, c, h, w) of unit variance; None: drawn.
        prompt_embeds, negative_prompt_embeds: outputs of `encode`, (b, tokens, width), instead of prompts.
        callback_on_step_end: called after each step. The "latents" that it returns replace the state. (unipc then still
            corrects its last step from its own state.)
        Raises UserError for arguments that don't fit, RunError if the image is non-finite.
        """
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type {output_type!r}: choose {', '.join(get_args(OutputType))}")
        model = self.model
        guides = Guides(
            scale=guidance_scale,
            rescale=guidance_rescale,
            interval=guidance_interval,
            compose=compose,
            weak=weak.model if weak else None,
            weak_scale=weak_scale,
            classifier=classifier,
            classifier_scale=classifier_scale,
        )
        given = Given.read(image, mask_image, strength)
        texts = Texts.read(model, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        request = Request(texts, given, num_images_per_prompt)
        noise = NoiseSource(request.shape(model, height, width), generator, self.device)
        how = make_sampler(sampler, eta)
        if how.uses_learned_variance and self.process.variance == "learned" and not guides.prompts_alone:
            raise UserError(
                f"{sampler} with a learned variance knows the prompt's guidance only: leave out rescale, weak model and "
                "classifier, or take another sampler"
            )
        prepared = prepare(model, request, how, self._plan(how.grid, num_inference_steps, spacing), noise, latents)
        denoise = guide(model, request, guides, prepared.context)
        with model.running(self.unet), weak.model.running(weak.unet) if weak else nullcontext():
            z = self._walk(denoise, prepared, noise, callback_on_step_end, progress)
        return Images(z if output_type == "latent" else _finish(self._composited(z, request), output_type))

    def _walk(
        self, denoise: Denoise, prepared: Prepared, noise: NoiseSource, callback: StepCallback | None, progress: bool
    ) -> Tensor:
        """Sample; update the progress bar and run the callback after each step."""
        watched = _Watched(denoise)
        with tqdm(total=len(prepared.legs), disable=not progress, dynamic_ncols=True) as bar:

            def after(k: int, leg: Leg, x: Tensor) -> Tensor:
                bar.update()
                if callback is None:
                    return x
                changed = callback(self, k, leg.now.model_time, {"latents": x, "denoised": watched.last.x0})
                found = (changed or {}).get("latents", x)
                if found.shape != x.shape:
                    raise UserError(
                        f"callback_on_step_end gave latents of shape {tuple(found.shape)}, not {tuple(x.shape)}"
                    )
                return found.to(x)

            return sample(watched, prepared.x, prepared.legs, prepared.step, noise, after)

    def _composited(self, z: Tensor, request: Request) -> Tensor:
        """Decode, crop to the size of the given image, and keep its pixels outside the mask."""
        made, given, spread = self.decode(z), request.given, request.spread
        if given is None:
            return made
        made = made[..., : given.pixels.shape[2], : given.pixels.shape[3]]
        return made if given.mask is None else paste(made.cpu(), spread(given.pixels), spread(given.mask))

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
        """Return the noise (b, c, h, w) from which sampling generates these latents (b, c, h, w) again.

        This holds for ddim with eta 0 and guidance 1, the same number of steps and the same spacing.

        prompt: one for all, or one for each. refinements: additional evaluations per step, for a more exact inversion.
        """
        prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(latents):
            raise UserError(f"{len(prompts)} prompts for {len(latents)} latents: give one for all, or each")
        network = self.text_network(*latents.shape[2:])
        denoise = Conditioned(Denoiser(network, self.process.target, self.backbone.dtype), self.encode(prompts))
        route = self._plan(make_sampler("ddim").grid, num_inference_steps, spacing)
        with self.model.running(self.unet):
            return invert(denoise, latents.to(self.device, torch.float32), route.legs, refinements) / route.start_std

    def _plan(self, grid: Grid, steps: int, spacing: Spacing | None) -> Plan:
        p = self.process
        spacing = spacing or p.spacing
        if spacing not in get_args(Spacing):
            raise UserError(f"spacing {spacing!r}: choose {', '.join(get_args(Spacing))}")
        return plan(p.schedule, grid, steps, spacing, p.steps_offset, p.set_alpha_to_one)

    # -- the model and its device ----------------------------------------------------------------------------------

    @property
    def backbone(self) -> Backbone:
        """Network that predicts the target."""
        return self.model.backbone

    @property
    def unet(self) -> Any:
        """The backbone's own module, e.g. diffusers' UNet2DConditionModel."""
        return self.model.backbone.module

    @property
    def autoencoder(self) -> Autoencoder:
        """Autoencoder between images and latents."""
        return self.model.autoencoder

    @property
    def text_encoder(self) -> ClipTextEncoder:
        """Encoder of prompts to the backbone's condition."""
        return self.model.text_encoder

    @property
    def process(self) -> Process:
        """Noise schedule and target that the backbone was trained for."""
        return self.model.process

    @property
    def inpaints(self) -> bool:
        """Whether the backbone was trained to inpaint, with the mask and the image outside it as its context."""
        return self.model.task == "inpaint"

    @property
    def device(self) -> torch.device:
        """Device on which the networks run."""
        return self.model.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks to a device and a dtype. The autoencoder overflows in fp16 and takes fp32 instead."""
        self.model.to(device, dtype)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the networks in main memory and move each to the device only while it runs.

        The device needs memory for the largest network, not for all. Raises UserError if there is no such device.
        """
        try:
            offload = torch.device(device)
            torch.empty(1, device=offload)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {str(device)!r} can't be used: {str(error).strip().splitlines()[0]}") from None
        self.to("cpu")
        self.model.offload = offload

    def set_attention(self, backend: AttentionBackend) -> Literal["sdpa", "xformers"]:
        """Set the backbone's attention backend, test it on the current device and dtype, and return the one in use.

        Raises UserError if xformers is requested and doesn't work.
        """
        return self.backbone.set_attention(backend, device=self.device)

    def enable_vae_tiling(self, tiles: Tiles | None = None) -> None:
        """Decode and encode large images tile by tile, to save memory."""
        self.autoencoder.tiles = tiles or Tiles()

    def disable_vae_tiling(self) -> None:
        """Decode and encode whole images again."""
        self.autoencoder.tiles = None

    def enable_vae_slicing(self) -> None:
        """Decode and encode a batch's images one by one, to save memory."""
        self.model.images_at_once = 1

    def disable_vae_slicing(self) -> None:
        """Decode and encode several images at once again."""
        self.model.images_at_once = IMAGES_AT_ONCE

    # -- the single networks ------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the text features of prompts, (b, tokens, width); each distinct prompt is encoded once."""
        return self.model.encode(prompts)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (b, c, h, w) to images (b, 3, H, W) in [0, 1], a few at a time."""
        return self.model.decode(latents)

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Return fast previews of latents (b, c, h, w) by a linear map to colours, one pixel per latent.

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
        """Return the text-to-image network for states (b, c, h, w). An inpainting network gets an all-white mask."""
        if not self.inpaints:
            return self.backbone
        return beside(self.backbone, self.model.white_context(h, w))

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of the latents of images of this size in pixels; None: the model's own size.

        Raises UserError for a size that the model doesn't support.
        """
        return self.model.latent_size(height, width)


class _Watched:
    """A denoiser that keeps its last output."""

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
    """Convert images (b, 3, h, w) in [0, 1] to PIL."""
    array = (pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(image) for image in array]
