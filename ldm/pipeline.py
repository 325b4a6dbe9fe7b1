"""Text to pictures from one folder: text encoder → guided sampling in latent space → autoencoder.

The folder is a complete, explicit Stable-Diffusion-shaped diffusers checkpoint: stock
`diffusers.DiffusionPipeline.from_pretrained` loads it as a StableDiffusionPipeline and, given the same seed, sampler
and steps, paints the same picture.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, Protocol, Self, get_args

import diffusers
import numpy as np
import torch
from diffusers import (
    UNet2DConditionModel,
)
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder.model import Autoencoder, Posterior
from autoencoder.tiling import Tiles
from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import load_tokenizer
from ldm.denoiser import Denoise, Denoiser
from ldm.editing import Blended, Pixels, on_latents, pad, paste, steps_of, to_mask, to_pixels
from ldm.errors import RunError, UserError
from ldm.guidance import Autoguided, ClassifierFree, ClassifierGuided, Conditioned, Interval, LogProbability
from ldm.interchange import Process
from ldm.samplers import Step, invert, make_step, sample
from ldm.single_file import Parts, load_single_file, save_single_file
from ldm.spacing import Plan, SamplerKind, Spacing, plan
from ldm.unet import AttentionBackend, use_attention

OutputType = Literal["pil", "np", "pt", "latent"]
DECODED_AT_ONCE = 32  # pictures; decoding takes the most memory of all


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
        if unet.config.in_channels != autoencoder.latent_channels:
            raise UserError(
                f"the UNet takes {unet.config.in_channels} latent channels, the autoencoder "
                f"gives {autoencoder.latent_channels}: they don't belong together"
            )
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.process = process
        if process.variance == "learned" and unet.config.out_channels != 2 * autoencoder.latent_channels:
            raise UserError(
                f"a learned variance needs {2 * autoencoder.latent_channels} output channels, the UNet has "
                f"{unet.config.out_channels}: choose fixed_small or fixed_large, or train with diffusion.variance learned"
            )

    # -- folders ----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, chunks: int | None = None) -> Self:
        """From the folder that stage 2 writes, or any Stable-Diffusion-1.x/2.x-shaped diffusers folder.

        chunks: of max_length tokens in which prompts are read; the model's own unless given.
        Raises UserError when parts are missing or not understood.
        """
        folder = Path(folder)
        if missing := [
            p for p in ("unet", "vae", "text_encoder", "tokenizer", "scheduler") if not (folder / p).is_dir()
        ]:
            raise UserError(f"{str(folder)!r} is no pipeline folder: it lacks {', '.join(f'{m}/' for m in missing)}")
        try:
            config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
            unet = UNet2DConditionModel.from_pretrained(
                str(folder / "unet"), use_safetensors=True, low_cpu_mem_usage=False
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"can't load {str(folder)!r}: {error}") from None
        use_attention(unet)
        return cls(
            unet.eval().requires_grad_(False),
            Autoencoder.load(folder / "vae"),
            ClipTextEncoder.load(folder, chunks=chunks),
            Process.from_diffusers(config),
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
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": diffusers.__version__,
            "requires_safety_checker": False,
            **parts,
            **absent,
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move, and choose the arithmetic. The autoencoder stays fp32 under fp16, in which its activations overflow."""
        move = torch.nn.Module.to  # diffusers' own warns of modules to be kept in fp32, even where there are none
        move(self.unet, device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        move(self.autoencoder.vae, device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)
        return self

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

    # -- painting ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
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
        output_type: OutputType = "pil",
        progress: bool = False,
    ) -> Pictures:
        """Paint `num_images_per_prompt` pictures of each prompt, from noise, from a picture, or inside a mask.

        image: one for all prompts, or one each (or several for one prompt), of any size. What is painted has that size.
        strength: how much of the picture is given up: of n steps the last ⌊n · strength⌋ are walked, at least one. At 1
            only its size counts, as in text-to-image, at 0 it comes back through the autoencoder. 0.8 unless given, and 1
            with a mask.
        mask_image: white is painted, black stays as it is, bit by bit, and grey is mixed; of any size.
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
        Raises UserError for arguments that don't fit, RunError when the picture comes out non-finite.
        """
        scales = (guidance_scale, weak_scale, classifier_scale, *(scale for _, scale in compose))
        if not all(map(math.isfinite, scales)):
            raise UserError(f"guidance scales {', '.join(map(str, scales))}: give finite numbers")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt {num_images_per_prompt}: at least 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if not prompts or len(negatives) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts and {len(negatives)} negative prompts: give one negative for all, or each"
            )
        given: Tensor | None = None
        if image is None:
            if mask_image is not None or strength is not None:
                raise UserError("mask_image and strength speak of a picture: give image too")
        else:
            given = to_pixels(image)  # (b, 3, h, w)
            if height or width:
                raise UserError(f"height {height} and width {width} with an image: its own size holds")
            if len(given) > 1 and len(prompts) == 1:
                prompts, negatives = prompts * len(given), negatives * len(given)
            if len(given) not in (1, len(prompts)):
                raise UserError(f"{len(given)} pictures for {len(prompts)} prompts: give one for all, or as many")
            given = given.expand(len(prompts), -1, -1, -1).repeat_interleave(num_images_per_prompt, 0)
        count = len(prompts) * num_images_per_prompt
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

        def encode(texts: Sequence[str], by: LatentDiffusionPipeline = self) -> Tensor:
            return by.encode(texts).repeat_interleave(num_images_per_prompt, 0)

        denoiser = Denoiser(self.network, process.target, self.unet.dtype, fraction=learned)
        condition = encode(prompts)
        also = [(encode([text] * len(prompts)), scale) for text, scale in compose]
        denoise: Denoise = ClassifierFree(
            denoiser, encode(negatives), [(condition, guidance_scale), *also], guidance_rescale
        )  # fmt: skip
        if guidance_interval is not None:
            denoise = Interval(denoise, Conditioned(denoiser, condition), *guidance_interval)
        if weak is not None:
            same = weak.unet.config.in_channels == self.unet.config.in_channels
            if not (same and torch.equal(weak.process.schedule.alpha, process.schedule.alpha)):
                raise UserError(
                    "the weaker model has other latents or another noise schedule: give one of the same kind"
                )
            guide = Denoiser(weak.network, weak.process.target, weak.unet.dtype)
            denoise = Autoguided(denoise, Conditioned(guide, encode(prompts, weak)), weak_scale)
        if classifier is not None:
            denoise = ClassifierGuided(denoise, classifier, classifier_scale)

        device = self.unet.device
        noise = lambda: randn_tensor(shape, generator, device, torch.float32)  # noqa: E731
        strength = (0.8 if mask_image is None else 1.0) if strength is None else strength
        k = steps_of(strength, len(route.legs)) if given is not None else len(route.legs)
        legs = route.legs[len(route.legs) - k :]
        mask: Tensor | None = None
        x0: Tensor | None = None
        if given is not None:
            posterior = self.autoencoder.encode(pad(given, multiple) * 2 - 1)
            x0 = Posterior(posterior.mean.float(), posterior.std.float()).sample(noise())
        start = noise() if latents is None else latents.to(device, torch.float32)
        if x0 is not None and mask_image is not None:
            assert given is not None
            mask = to_mask(mask_image, (given.shape[2], given.shape[3]))
            if len(mask) not in (1, count):
                raise UserError(f"{len(mask)} masks for {count} pictures: give one for all, or as many")
            inside = on_latents(pad(mask, multiple), self.autoencoder.factor).to(device)
            step = Blended(step, x0, start, inside, route.legs[-1].next)
        if x0 is None or strength == 1:
            z = route.start(start)
        else:
            z = legs[0].now.alpha * x0 + legs[0].now.sigma * start if legs else x0
        with tqdm(total=len(legs), disable=not progress, dynamic_ncols=True) as bar:
            z = sample(denoise, z, legs, step, noise, callback=lambda *_: bar.update())
        if output_type == "latent":
            return Pictures(z)
        pixels = self.decode(z)
        if given is not None:
            pixels = pixels[..., : given.shape[2], : given.shape[3]]
            if mask is not None:
                pixels = paste(pixels.cpu(), given, mask)
        return Pictures(_finish(pixels, output_type))

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
        denoise = Conditioned(Denoiser(self.network, self.process.target, self.unet.dtype), self.encode(prompts))
        route = self._plan("ddim", num_inference_steps, spacing)
        return invert(denoise, latents.to(self.unet.device, torch.float32), route.legs, refinements) / route.start_std

    def _plan(self, sampler: SamplerKind, steps: int, spacing: Spacing | None) -> Plan:
        p = self.process
        for name, value, kinds in (("sampler", sampler, SamplerKind), ("spacing", spacing or p.spacing, Spacing)):
            if value not in get_args(kinds):
                raise UserError(f"{name} {value!r}: choose {', '.join(get_args(kinds))}")
        return plan(p.schedule, sampler, steps, spacing or p.spacing, p.steps_offset, p.set_alpha_to_one)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (b, c, h, w) to pictures (b, 3, H, W) in [0, 1], in portions."""
        pixels = torch.cat([self.autoencoder.decode(part) for part in latents.split(DECODED_AT_ONCE)])
        if not torch.isfinite(pixels).all():
            raise RunError(
                "the picture came out non-finite: try fp32 or bf16 in place of fp16, a lower guidance scale, or more steps"
            )
        return (pixels / 2 + 0.5).clamp(0, 1)

    def network(self, x: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        """The UNet's output for states x (b, c, h, w) at index (b,), given text features (b, tokens, width)."""
        return self.unet(x.to(self.unet.dtype), index, condition, return_dict=False)[0]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text features of prompts, (b, tokens, width); each distinct one is worked out once."""
        distinct = list(dict.fromkeys(prompts))
        rows = self.text_encoder.encode(distinct).to(self.unet.device, self.unet.dtype)
        return rows[[distinct.index(p) for p in prompts]]

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


def _finish(pixels: Tensor, output_type: OutputType) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (b, h, w, 3)
    if output_type == "np":
        return array
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]
    raise UserError(f"output_type {output_type!r}: choose pil, np, pt or latent")
