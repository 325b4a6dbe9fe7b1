"""Text to pictures from one folder: text encoder → guided sampling in latent space → autoencoder.

The folder is a complete, explicit Stable-Diffusion-shaped diffusers checkpoint: stock
`diffusers.DiffusionPipeline.from_pretrained` loads it as a StableDiffusionPipeline and, given the same seed, sampler
and steps, paints the same picture.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, Self, get_args

import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder.model import Autoencoder, Posterior
from autoencoder.tiling import Tiles
from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import load_tokenizer
from ldm.denoiser import Denoise, Denoiser, Network, beside
from ldm.editing import Blended, Pixels, on_latents, pad, paste, steps_of, to_mask, to_pixels, without
from ldm.errors import RunError, UserError
from ldm.guidance import Autoguided, ClassifierFree, ClassifierGuided, Conditioned, Interval, LogProbability
from ldm.hub import find_pipeline
from ldm.interchange import Process
from ldm.samplers import Step, invert, make_step, sample
from ldm.schedule import Level
from ldm.single_file import Parts, load_single_file, save_single_file
from ldm.spacing import Leg, Plan, SamplerKind, Spacing, plan
from ldm.unet import AttentionBackend, load_unet, use_attention

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[["LatentDiffusionPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | None]
"""(pipe, step, timestep, {"latents": the state after it, "denoised": what was made out in it}) → the same, as changed."""
_AT_ONCE = 32  # pictures that the autoencoder is given; it takes the most memory of all


class TextEncoder(Protocol):
    """What conditions the UNet."""

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts to token features (b, tokens, width)."""
        ...


@dataclass(frozen=True)
class Pictures:
    """The pipeline's output: PIL pictures, a NumPy array (b, h, w, 3) in [0, 1], or a tensor (b, 3, h, w) in [0, 1]."""

    images: list[Image.Image] | np.ndarray | Tensor


class LatentDiffusionPipeline:
    """A trained model, ready to paint. Argument names are those of diffusers' pipelines."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        autoencoder: Autoencoder,
        text_encoder: ClipTextEncoder,
        process: Process,
    ) -> None:
        c = autoencoder.latent_channels
        if unet.config.in_channels not in (c, 2 * c + 1):
            raise UserError(
                f"the UNet takes {unet.config.in_channels} channels, the autoencoder's latents have {c} (to inpaint, "
                f"{2 * c + 1} are taken): they don't belong together"
            )
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.inpaints: bool = unet.config.in_channels != c
        """Whether the UNet was trained to inpaint: it is shown the mask, and what that leaves of the picture."""
        self._offload: torch.device | None = None
        self._at_once = _AT_ONCE
        self.process = process
        if process.variance == "learned" and unet.config.out_channels != 2 * autoencoder.latent_channels:
            raise UserError(
                f"a learned variance needs {2 * autoencoder.latent_channels} output channels, the UNet has "
                f"{unet.config.out_channels}: choose fixed_small or fixed_large, or train with diffusion.variance learned"
            )

    # -- folders ----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, chunks: int | None = None) -> Self:
        """From the folder that stage 2 writes, or any Stable-Diffusion-1.x/2.x-shaped diffusers folder or hub id.

        chunks: of max_length tokens in which prompts are read; the model's own unless given.
        Raises UserError when parts are missing or not understood.
        """
        folder = find_pipeline(folder)
        return cls(
            load_unet(folder).eval().requires_grad_(False),
            Autoencoder.load(folder / "vae"),
            ClipTextEncoder.load(folder, chunks=chunks),
            Process.load(folder),
        )

    @classmethod
    def from_single_file(cls, path: str | Path, *, config: str | Path, chunks: int | None = None) -> Self:
        """From one safetensors file with the original key names, e.g. of Stable Diffusion 1.5.

        config: a local diffusers folder of the same shape, of which JSON and tokenizer are read. Nothing is downloaded.
        chunks: as in `from_pretrained`. Raises UserError where file and configuration can't be read or don't fit.
        """
        return cls.from_parts(load_single_file(path, config), config, chunks=chunks)

    @classmethod
    def from_parts(cls, parts: Parts, folder: str | Path, *, chunks: int | None = None) -> Self:
        """From networks at hand and the tokenizer of a pipeline's folder. Raises UserError where it can't be read."""
        try:
            tokenizer = load_tokenizer(Path(folder) / "tokenizer")
        except Exception as error:  # a broken file makes the library raise almost anything
            raise UserError(f"{str(folder)!r} has no tokenizer/ that can be read: {error}") from None
        use_attention(parts.unet)
        encoder = ClipTextEncoder(parts.text_encoder, tokenizer, chunks=chunks)
        return cls(parts.unet, Autoencoder(parts.vae), encoder, parts.process)

    def save_single_file(self, path: str | Path) -> None:
        """Write one new safetensors file with the original key names; see `ldm.single_file.save_single_file`."""
        save_single_file(self, path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole folder, safetensors and JSON only, every key of the scheduler spelled out."""
        folder = Path(folder)
        self.unet.save_pretrained(str(folder / "unet"), safe_serialization=True)
        self.autoencoder.vae.save_pretrained(str(folder / "vae"), safe_serialization=True)
        self.text_encoder.save(folder)
        scheduler = self.process.to_diffusers()
        scheduler.save_pretrained(str(folder / "scheduler"))
        for limits in (self.process.stock_limits(), self.text_encoder.stock_limits()):
            if limits:
                _warn_once(limits)
        parts = {
            "scheduler": ["diffusers", type(scheduler).__name__],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        absent = {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
        index = {
            "_class_name": "StableDiffusionInpaintPipeline" if self.inpaints else "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "requires_safety_checker": False,
            **parts,
            **absent,
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move, and choose the arithmetic. The autoencoder stays fp32 under fp16, in which its activations overflow."""
        if device is not None:
            self._offload = None
        move = nn.Module.to  # diffusers' own warns of modules to be kept in fp32, even where there are none
        move(self.unet, device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        move(self.autoencoder.vae, device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return self._offload or self.unet.device

    def enable_model_cpu_offload(self, device: str | torch.device = "cuda") -> None:
        """Keep the networks in main memory, and each on the device only while it runs: the largest has to fit, not all."""
        self.to("cpu")
        self._offload = torch.device(device)

    @contextmanager
    def _running(self, network: nn.Module) -> Iterator[None]:
        if self._offload is None:
            yield
            return
        nn.Module.to(network, device=self._offload)
        try:
            yield
        finally:
            nn.Module.to(network, device="cpu")

    def set_attention(self, backend: AttentionBackend) -> Literal["sdpa", "xformers"]:
        """How the UNet's attention is computed, tried on its present device and dtype; returns what `auto` came to.

        Raises UserError where xformers is asked for and doesn't work.
        """
        return use_attention(self.unet, backend)

    def enable_vae_tiling(self, tiles: Tiles | None = None) -> None:
        """Decode and encode large pictures tile by tile, for small memory."""
        self.autoencoder.tiles = tiles or Tiles()

    def disable_vae_tiling(self) -> None:
        """Whole pictures again."""
        self.autoencoder.tiles = None

    def enable_vae_slicing(self) -> None:
        """Decode and encode a batch's pictures one by one, for small memory."""
        self._at_once = 1

    def disable_vae_slicing(self) -> None:
        """Several at once again."""
        self._at_once = _AT_ONCE

    # -- painting ---------------------------------------------------------------------------------------------

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
        callback_on_step_end: called after each step; what it returns as "latents" takes their place.
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
        if image is not None and (height or width):
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

        multiple = self.autoencoder.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if given is not None:  # odd sizes are painted a little larger, and cut back
            height, width = (side + -side % multiple for side in given.shape[2:])
        shape = (count, self.autoencoder.latent_channels, *self._latent_size(height, width))
        if isinstance(generator, list) and len(generator) != count:
            raise UserError(f"{len(generator)} generators for {count} pictures: give one, or one for each picture")
        if latents is not None and tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)}: these pictures need {shape}")

        route = self._plan(sampler, num_inference_steps, spacing)
        process = self.process
        step: Step = make_step(sampler, eta, process.variance, process.schedule.zero_terminal_snr)
        learned = sampler in ("ddpm", "predictor_corrector") and process.variance == "learned"
        if learned and (guidance_rescale or weak is not None or classifier is not None):
            raise UserError(
                f"{sampler} with a learned variance knows the prompt's guidance only: leave out rescale, weak model and "
                "classifier, or take another sampler"
            )
        strength = (0.8 if mask is None else 1.0) if strength is None else strength
        k = steps_of(strength, len(route.legs)) if given is not None else len(route.legs)
        legs = route.legs[len(route.legs) - k :]

        # Noise is drawn in diffusers' order: of the picture's posterior, to begin with, and of what a mask leaves.
        noise = lambda: randn_tensor(shape, generator, self.device, torch.float32)  # noqa: E731
        pixels = None if given is None else spread(pad(given, multiple) * 2 - 1)
        x0: Tensor | None = None
        if pixels is not None and (strength < 1 or (mask is not None and not self.inpaints)):
            x0 = self._posterior(pixels).sample(noise())
        start = noise() if latents is None else latents.to(self.device, torch.float32)
        network: Network = self.text_network(*shape[2:]) if mask is None else self.network
        if pixels is not None and mask is not None:
            inside = spread(pad(mask, multiple))
            if self.inpaints:
                network = beside(network, self._context(pixels, inside, noise()))
            elif x0 is not None:
                seen = on_latents(inside, self.autoencoder.factor).to(self.device)
                step = Blended(step, x0, start, seen, route.legs[-1].next)

        denoiser = Denoiser(network, process.target, self.unet.dtype, fraction=learned)
        also = [(self.encode([text]), scale) for text, scale in compose]
        conditions = [(spread(found), scale) for found, scale in ((condition, guidance_scale), *also)]
        denoise: Denoise = ClassifierFree(denoiser, spread(negative), conditions, guidance_rescale)
        if guidance_interval is not None:
            denoise = Interval(denoise, Conditioned(denoiser, spread(condition)), *guidance_interval)
        if weak is not None:
            if not (weak.unet.config.in_channels == self.unet.config.in_channels
                    and torch.equal(weak.process.schedule.alpha, process.schedule.alpha)):  # fmt: skip
                raise UserError(
                    "the weaker model has other latents or another noise schedule: give one of the same kind"
                )
            guide = Denoiser(weak.network, weak.process.target, weak.unet.dtype)
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
                made = watched.last[:, : shape[1]]
                changed = callback_on_step_end(self, k, leg.now.index, {"latents": x, "denoised": made})
                return (changed or {}).get("latents", x)

            with self._running(self.unet):
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
        denoise = Conditioned(Denoiser(network, self.process.target, self.unet.dtype), self.encode(prompts))
        route = self._plan("ddim", num_inference_steps, spacing)
        with self._running(self.unet):
            return invert(denoise, latents.to(self.device, torch.float32), route.legs, refinements) / route.start_std

    def _plan(self, sampler: SamplerKind, steps: int, spacing: Spacing | None) -> Plan:
        p = self.process
        for name, value, kinds in (("sampler", sampler, SamplerKind), ("spacing", spacing or p.spacing, Spacing)):
            if value not in get_args(kinds):
                raise UserError(f"{name} {value!r}: choose {', '.join(get_args(kinds))}")
        return plan(p.schedule, sampler, steps, spacing or p.spacing, p.steps_offset, p.set_alpha_to_one)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (b, c, h, w) to pictures (b, 3, H, W) in [0, 1], in portions."""
        with self._running(self.autoencoder.vae):
            pixels = torch.cat([self.autoencoder.decode(part) for part in latents.split(self._at_once)])
        if not torch.isfinite(pixels).all():
            raise RunError(
                "the picture came out non-finite: try fp32 or bf16 in place of fp16, a lower guidance scale, or more steps"
            )
        return (pixels / 2 + 0.5).clamp(0, 1)

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
        return _to_pil(colours.clamp(0, 1))

    def network(self, x: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        """The UNet's output for states x (b, c, h, w) at index (b,), given text features (b, tokens, width).

        A UNet that inpaints wants the mask and what that leaves beside the state, (b, 2c + 1, h, w).
        """
        return self.unet(x.to(self.unet.dtype), index, condition, return_dict=False)[0]

    def text_network(self, h: int, w: int) -> Network:
        """The network of states (b, c, h, w) as for text-to-image: one that inpaints sees a mask that is white all over."""
        if not self.inpaints:
            return self.network
        white = torch.ones(1, 3, h * self.autoencoder.factor, w * self.autoencoder.factor)
        return beside(self.network, self._context(white, white[:, :1], torch.zeros(())))

    def _context(self, pixels: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        """What a UNet that inpaints sees beside the state: the mask, and the latent of what that leaves, (b, 1 + c, h, w)."""
        mask = (mask > 0).float()  # what is mixed in has to be painted too
        around = self._posterior(without(pixels, mask)).sample(noise.to(self.device))
        return torch.cat([on_latents(mask, self.autoencoder.factor).to(self.device), around], 1)

    def _posterior(self, pixels: Tensor) -> Posterior:
        """Of pictures (b, 3, H, W) in [−1, 1], float32, in portions."""
        with self._running(self.autoencoder.vae):
            parts = [self.autoencoder.encode(part) for part in pixels.split(self._at_once)]
        mean, std = (torch.cat(each).to(self.device, torch.float32) for each in zip(*parts, strict=True))
        return Posterior(mean, std)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text features of prompts, (b, tokens, width); each distinct one is worked out once."""
        distinct = list(dict.fromkeys(prompts))
        with self._running(self.text_encoder.model):
            rows = self.text_encoder.encode(distinct).to(self.device, self.unet.dtype)
        return rows[[distinct.index(p) for p in prompts]]

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
        return [], embeds.to(self.device, self.unet.dtype)

    def _latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        factor = self.autoencoder.factor
        size = self.unet.config.sample_size
        natural = (size, size) if isinstance(size, int) else tuple(size)
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        h, w = height or natural[0] * factor, width or natural[1] * factor
        if h <= 0 or w <= 0 or h % multiple or w % multiple:
            raise UserError(
                f"a picture of {w}×{h} pixels: width and height must be multiples of {multiple} for this model"
            )
        return h // factor, w // factor


@cache
def _warn_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


class _Watched:
    """A denoiser that keeps what it gave last."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise

    def __call__(self, x_t: Tensor, level: Level) -> Tensor:
        self.last = self.denoise(x_t, level)
        return self.last


def _to_pil(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [0, 1]."""
    array = (pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in array]


def _finish(pixels: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pt":
        return pixels
    return _to_pil(pixels) if output_type == "pil" else pixels.permute(0, 2, 3, 1).cpu().numpy()
