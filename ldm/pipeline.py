"""The pipeline from text to images: text encoder → guided sampling in latent space → autoencoder.

Sampling starts from noise or from an image, and may be restricted to a mask. The sampling loop is always the same:
guidance wraps its denoiser, and a mask wraps its step.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder.model import Autoencoder
from autoencoder.tiling import Tiles
from conditioning import PromptWeights
from conditioning.clip import ClipTextEncoder
from ldm.consistency import SOLVER_STEPS
from ldm.denoiser import Denoise, Denoised, Denoiser, Network, with_context
from ldm.editing import Pixels, paste
from ldm.errors import UserError
from ldm.formats.original_names import Parts
from ldm.formats.scheduler_config import Process
from ldm.formats.single_file import load_single_file, save_single_file
from ldm.guidance import Conditioned, LogProbability
from ldm.kinds import EngineKind
from ldm.libraries import UNet2DConditionModel
from ldm.model import IMAGES_AT_ONCE, Model, from_parts, load, warn_once
from ldm.networks.attention import AttentionBackend
from ldm.networks.backbone import Backbone
from ldm.preparation import GuidanceSettings, NoiseSource, Prepared, guide, prepare
from ldm.request import ImageInput, Request, Texts
from ldm.samplers import SamplerKind, make_sampler
from ldm.schedule import Level
from ldm.spacing import Grid, LevelPair, Plan, Spacing, make_plan
from ldm.steps import invert, sample
from ldm.task import Task

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["LatentDiffusionPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
"""Callback: (pipe, step, timestep, {"latents": state after the step, "denoised": x̂0}) → changed tensors, or None."""


@dataclass(frozen=True)
class Images:
    """Output of the pipeline: PIL images, an array (b, h, w, 3) or a tensor (b, 3, h, w) in [0, 1], or latents."""

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
        """Combine the parts. task: task of the model; None: decided by the backbone's channels.

        Raises UserError if the parts don't fit together.
        """
        self.model = Model(backbone, autoencoder, text_encoder, process, task)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, chunks: int | None = None, backbone: Backbone | None = None
    ) -> Self:
        """Load the folder that stage 2 writes, or a diffusers folder or hub id in the shape of Stable Diffusion 1 or 2.

        chunks: number of chunks of max_length tokens that a prompt is encoded in; None: the model's own.
        backbone: network to use instead of the folder's UNet.
        Raises UserError if parts are missing or can't be read.
        """
        return cls(*load(folder, chunks, backbone))

    @classmethod
    def from_single_file(
        cls, path: str | Path, *, config: str | Path | None = None, chunks: int | None = None, ema: bool = True
    ) -> Self:
        """Load one safetensors file with the original key names, e.g. of Stable Diffusion 1.5.

        config: a local diffusers folder of the same shape; its JSON and tokenizer are read. None: NAME.yaml beside the
        file, or the shape of Stable Diffusion. Nothing is downloaded. chunks: as in `from_pretrained`. ema: use the
        averaged weights, if the file has them. Raises UserError if these can't be read or don't fit.
        """
        return cls.from_parts(load_single_file(path, config, ema=ema), config, chunks=chunks)

    @classmethod
    def from_parts(cls, parts: Parts, folder: str | Path | None, *, chunks: int | None = None) -> Self:
        """Combine loaded networks and their tokenizer. folder: the pipeline's, if there is one.

        Raises UserError if the tokenizer can't be read.
        """
        return cls(*from_parts(parts, folder, chunks))

    def save_single_file(self, path: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a new safetensors file with the original key names; see `ldm.formats.single_file.save_single_file`."""
        save_single_file(self.model, path, dtype)

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
        dynamic_threshold: tuple[float, float] | None = None,
        compose: Sequence[tuple[str, float]] = (),
        weak: "LatentDiffusionPipeline | None" = None,
        weak_scale: float = 2.0,
        classifier: LogProbability | None = None,
        classifier_scale: float = 1.0,
        reuse_features: int = 1,
        sampler: SamplerKind | None = None,
        spacing: Spacing | None = None,
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_weights: PromptWeights = "none",
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: OutputType = "pil",
        progress: bool = False,
    ) -> Images:
        """Generate `num_images_per_prompt` images of each prompt, from noise, from an image, or inside a mask.

        image: one for all prompts, one for each, or several for one prompt, of any size. The result has the same size.
        strength: how much the image is changed. The last ⌊n · strength⌋ of n steps are taken, at least one. At 1,
            only the image's size matters, as in text-to-image. At 0, the image only passes through the autoencoder.
            Default: 0.8, with a mask 1.
        mask_image: white is inpainted, black stays bit-identical, grey is mixed. It has any size; one for all, or one
            for each.
        guidance_scale: 1 is the conditional prediction; a larger scale follows the prompt more closely (Ho & Salimans
            2022).
        guidance_rescale: 0 to 1; reduces the contrast that a large scale causes (Lin et al. 2024).
        guidance_interval: lowest and highest noise level sigma / alpha with guidance. At other levels the prediction is
            that of `prompt`, without guidance. None: guidance at all levels.
        dynamic_threshold: share of the values and limit of the prediction's values (Saharia et al. 2022). None: no
            limit.
        compose: further prompts that every image follows too, each with its own guidance scale (Liu et al. 2022).
        weak, weak_scale: a weaker model to guide away from (Karras et al. 2024). Best with guidance_scale 1, since the
            two scales multiply. weak_scale 1 turns it off.
        reuse_features: number of steps in which the output of the UNet's deep layers is used, which is approximate
            (DeepCache, Ma et al. 2023). 1: it is computed in each step. With several evaluations per step, as in heun,
            it counts these.
        classifier, classifier_scale: log p(y | x_t) of latents, which guides sampling (Dhariwal & Nichol 2021).
        sampler: None: the model's own, `lcm` for a consistency model and `dpmpp_2m` for all others.
        spacing: spacing of the steps over the noise levels; None: the model's own.
        eta: share of new noise in ddim's steps, 0 to 1.
        generator: one for all images, or a list with one for each; on the CPU it gives the same noise for any device.
        latents: initial noise (b, c, h, w) of unit variance; None: drawn.
        prompt_weights: rules of weights such as (word:1.3) in prompts: `a1111`, `comfyui`, or `none` for plain text.
        prompt_embeds, negative_prompt_embeds: outputs of `encode`, (b, tokens, width), instead of prompts.
        callback_on_step_end: called after each step. The "latents" that it returns replace the state. (unipc evaluates
            the network at them, but then continues from its own corrected state.)
        Raises UserError for arguments that don't fit, RunError if the image is non-finite.
        """
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type {output_type!r}: choose {', '.join(get_args(OutputType))}")
        model = self.model
        guidance = GuidanceSettings(
            scale=guidance_scale,
            rescale=guidance_rescale,
            interval=guidance_interval,
            threshold=dynamic_threshold,
            compose=compose,
            weak=weak.model if weak else None,
            weak_scale=weak_scale,
            classifier=classifier,
            classifier_scale=classifier_scale,
            reuse_features=reuse_features,
        )
        image_input = ImageInput.read(image, mask_image, strength)
        texts = Texts.read(model, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, prompt_weights)
        request = Request(texts, image_input, num_images_per_prompt)
        noise = NoiseSource(request.shape(model, height, width), generator, self.device)
        sampler = sampler or self.process.sampler
        record = make_sampler(sampler, eta)
        if record.uses_learned_variance and self.process.variance == "learned" and not guidance.only_prompts:
            raise UserError(
                f"sampler {sampler}: with a learned variance, only prompts can guide it; leave out guidance rescale, "
                "weaker model and classifier, or choose another sampler"
            )
        plan = self._plan(record.grid, num_inference_steps, spacing)
        prepared = prepare(model, request, record, plan, noise, latents)
        denoise = guide(model, request, guidance, prepared.context)
        with model.on_device(self.unet), weak.model.on_device(weak.unet) if weak else nullcontext():
            z = self._sample(denoise, prepared, noise, callback_on_step_end, progress)
        return Images(z if output_type == "latent" else _to_output_type(self._composite(z, request), output_type))

    def _sample(
        self, denoise: Denoise, prepared: Prepared, noise: NoiseSource, callback: StepCallback | None, progress: bool
    ) -> Tensor:
        """Run the sampling loop; update the progress bar and call the callback after each step."""
        recording = _RecordingDenoiser(denoise)
        with tqdm(total=len(prepared.pairs), disable=not progress, dynamic_ncols=True) as bar:

            def on_step_end(k: int, pair: LevelPair, x: Tensor) -> Tensor:
                bar.update()
                if callback is None:
                    return x
                changed = callback(self, k, pair.now.model_time, {"latents": x, "denoised": recording.last.x0})
                latents = (changed or {}).get("latents", x)
                if latents.shape != x.shape:
                    raise UserError(
                        f"callback_on_step_end returned latents of shape {tuple(latents.shape)}: must be "
                        f"{tuple(x.shape)}"
                    )
                return latents.to(x)

            return sample(recording, prepared.x, prepared.pairs, prepared.step, noise, on_step_end)

    def _composite(self, z: Tensor, request: Request) -> Tensor:
        """Decode, crop to the size of the input image, and restore its pixels outside the mask."""
        pixels, image, expand = self.decode(z), request.image, request.expand
        if image is None:
            return pixels
        pixels = pixels[..., : image.pixels.shape[2], : image.pixels.shape[3]]
        return pixels if image.mask is None else paste(pixels.cpu(), expand(image.pixels), expand(image.mask))

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

        Sampling must use ddim with eta 0 and guidance scale 1, and the same number of steps and spacing.

        prompt: one for all, or one for each. refinements: additional evaluations per step, for a more exact inversion.
        Raises UserError if the number of prompts or of steps, or the spacing, doesn't fit.
        """
        prompts = [prompt] * len(latents) if isinstance(prompt, str) else list(prompt)
        if len(prompts) != len(latents):
            raise UserError(
                f"{len(prompts)} prompts for {len(latents)} latents: give one string for all, or one for each"
            )
        network = self.text_network(*latents.shape[2:])
        denoise = Conditioned(Denoiser(network, self.process.target, self.backbone.dtype), self.encode(prompts))
        plan = self._plan(make_sampler("ddim").grid, num_inference_steps, spacing)
        with self.model.on_device(self.unet):
            return invert(denoise, latents.to(self.device, torch.float32), plan.pairs, refinements) / plan.start_std

    def _plan(self, grid: Grid, steps: int, spacing: Spacing | None) -> Plan:
        p = self.process
        spacing = spacing or p.spacing
        if spacing not in get_args(Spacing):
            raise UserError(f"spacing {spacing!r}: choose {', '.join(get_args(Spacing))}")
        if grid.consistency and not p.solver_steps:
            warn_once("sampler lcm: the model isn't saved as a consistency model; other models need another sampler")
        solver_steps = p.solver_steps or SOLVER_STEPS
        return make_plan(p.schedule, grid, steps, spacing, p.steps_offset, p.set_alpha_to_one, solver_steps)

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
        """Whether the backbone was trained to inpaint, with the mask and the masked image's latents as its context."""
        return self.model.task == "inpaint"

    @property
    def device(self) -> torch.device:
        """Device on which the networks run."""
        return self.model.device

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the networks to a device and a dtype. The autoencoder uses fp32 for fp16, in which it overflows."""
        self.model.to(device, dtype)
        return self

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the networks in main memory and move each to the device only while it runs.

        The device then needs memory only for the largest network. Raises UserError if the device can't be used.
        """
        try:
            offload = torch.device(device)
            torch.empty(1, device=offload)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {str(device)!r} can't be used: {str(error).strip().splitlines()[0]}") from None
        self.to("cpu")
        self.model.offload = offload

    def optimize(self, engine: EngineKind = "auto", seconds: float = math.inf) -> EngineKind:
        """Run the networks with a faster engine, and return its name: "compile", "openvino" or "off".

        engine: `auto` is OpenVINO on a CPU if it is installed, else torch's compiler; `off` undoes it.
        seconds: expected time of the work without an engine; `auto` chooses no engine if compiling would cost more
            time than it saves.

        OpenVINO compiles each new size or batch size when it first occurs. torch's compiler does so only with the first
        one, and with others after 200 calls of the network. Call it after `to`, and again after changing weights.
        Raises UserError if the engine can't be used.
        """
        return self.model.optimize(engine, seconds)

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

    # -- calling one network ------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], prompt_weights: PromptWeights = "none") -> Tensor:
        """Return the text features of prompts, (b, tokens, width); each distinct prompt is encoded once."""
        return self.model.encode(prompts, prompt_weights)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (b, c, h, w) to images (b, 3, H, W) in [0, 1], a few at a time."""
        return self.model.decode(latents)

    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Return fast previews of latents (b, c, h, w) by a linear map to colours, one pixel per latent.

        Raises UserError for an autoencoder without that map.
        """
        if self.autoencoder.colours is None:
            raise UserError(
                "this model's autoencoder has no preview colours (vae/preview.json), which stage 1 writes: fit them "
                "with autoencoder.preview.fit_colours"
            )
        return to_pil(self.autoencoder.colours(latents) / 2 + 0.5)

    def text_network(self, h: int, w: int) -> Network:
        """Return the text-to-image network for states (b, c, h, w). An inpainting network gets an all-white mask."""
        network = self.model.network()
        return with_context(network, self.model.white_context(h, w)) if self.inpaints else network

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of the latents of images of this size in pixels; None: the model's own size.

        Raises UserError for a size that the model doesn't support.
        """
        return self.model.latent_size(height, width)


class _RecordingDenoiser:
    """A denoiser that stores its last output in `last`."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise

    def __call__(self, x_t: Tensor, level: Level) -> Denoised:
        self.last = self.denoise(x_t, level)
        return self.last


def _to_output_type(pixels: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pt":
        return pixels
    return to_pil(pixels) if output_type == "pil" else pixels.permute(0, 2, 3, 1).cpu().numpy()


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """Convert images (b, 3, h, w) in [0, 1] to PIL."""
    array = (pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(image) for image in array]
