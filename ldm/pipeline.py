"""Text to pictures, from noise, from a picture or inside a mask: text encoder → guided sampling in latent space →
autoencoder. One loop, whose denoiser guidance wraps and whose step a mask wraps.
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
from ldm.model import PICTURES_AT_ONCE, Model, from_parts, load
from ldm.networks.attention import AttentionBackend
from ldm.networks.backbone import Backbone
from ldm.preparation import Draws, Guides, Prepared, guide, prepare
from ldm.request import Given, Request, Texts
from ldm.samplers import SamplerKind, make_sampler
from ldm.schedule import Level
from ldm.spacing import Grid, Leg, Plan, Spacing, plan
from ldm.steps import invert, sample
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
        if output_type not in get_args(OutputType):
            raise UserError(f"output_type {output_type!r}: choose {', '.join(get_args(OutputType))}")
        model = self.model
        guides = Guides(
            scale=guidance_scale, rescale=guidance_rescale, interval=guidance_interval, compose=compose,
            weak=weak.model if weak else None, weak_scale=weak_scale,
            classifier=classifier, classifier_scale=classifier_scale,
        )  # fmt: skip
        given = Given.read(image, mask_image, strength)
        texts = Texts.read(model, prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        request = Request(texts, given, num_images_per_prompt)
        noise = Draws(request.shape(model, height, width), generator, self.device)
        how = make_sampler(sampler, eta)
        if how.uses_learned_variance and self.process.variance == "learned" and not guides.prompts_alone:
            raise UserError(
                f"{sampler} with a learned variance knows the prompt's guidance only: leave out rescale, weak model and "
                "classifier, or take another sampler"
            )
        begun = prepare(model, request, how, self._plan(how.grid, num_inference_steps, spacing), noise, latents)
        denoise = guide(model, request, guides, begun.context)
        with model.running(self.unet), weak.model.running(weak.unet) if weak else nullcontext():
            z = self._walk(denoise, begun, noise, callback_on_step_end, progress)
        return Pictures(z if output_type == "latent" else _finish(self._painted(z, request), output_type))

    def _walk(
        self, denoise: Denoise, begun: Prepared, noise: Draws, callback: StepCallback | None, progress: bool
    ) -> Tensor:
        """Sample, and tell what happens after each step."""
        watched = _Watched(denoise)
        with tqdm(total=len(begun.legs), disable=not progress, dynamic_ncols=True) as bar:

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

            return sample(watched, begun.x, begun.legs, begun.step, noise, after)

    def _painted(self, z: Tensor, request: Request) -> Tensor:
        """Decode, cut back to the size of the picture that was given, and keep its pixels outside the mask."""
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

    def _plan(self, grid: Grid, steps: int, spacing: Spacing | None) -> Plan:
        p = self.process
        spacing = spacing or p.spacing
        if spacing not in get_args(Spacing):
            raise UserError(f"spacing {spacing!r}: choose {', '.join(get_args(Spacing))}")
        return plan(p.schedule, grid, steps, spacing, p.steps_offset, p.set_alpha_to_one)

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
        return self.model.latent_size(height, width)


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
