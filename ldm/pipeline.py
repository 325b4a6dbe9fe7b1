"""Text to pictures from one folder: text encoder → guided sampling in latent space → autoencoder.

The folder is a complete, explicit Stable-Diffusion-shaped diffusers checkpoint: stock
`diffusers.DiffusionPipeline.from_pretrained` loads it as a StableDiffusionPipeline and, given the same seed, sampler
and steps, paints the same picture.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self, get_args

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from autoencoder.model import Autoencoder
from conditioning.clip import ClipTextEncoder
from ldm.denoiser import Denoiser
from ldm.errors import RunError, UserError
from ldm.guidance import ClassifierFree
from ldm.parameterization import PREDICTION_TYPE, Target, target_from_diffusers
from ldm.samplers import SamplerKind, make_step, plan, sample
from ldm.schedule import Schedule, Spacing
from ldm.unet import use_attention

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
        schedule: Schedule,
        target: Target,
        spacing: Spacing = "trailing",
        steps_offset: int = 1,
        set_alpha_to_one: bool = False,
    ) -> None:
        if unet.config.in_channels != autoencoder.latent_channels:
            raise UserError(
                f"the UNet takes {unet.config.in_channels} latent channels, the autoencoder "
                f"gives {autoencoder.latent_channels}: they don't belong together"
            )
        self.unet, self.autoencoder, self.text_encoder = unet, autoencoder, text_encoder
        self.schedule, self.target = schedule, target
        self.spacing, self.steps_offset, self.set_alpha_to_one = spacing, steps_offset, set_alpha_to_one
        if spacing not in get_args(Spacing):
            raise UserError(f"timestep spacing {spacing!r}: choose {', '.join(get_args(Spacing))}")

    # -- folders ----------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """From the folder that stage 2 writes, or any Stable-Diffusion-1.x/2.x-shaped diffusers folder.

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
            ClipTextEncoder.load(folder),
            Schedule.from_diffusers(config),
            target_from_diffusers(config.get("prediction_type", "epsilon")),
            config.get("timestep_spacing", "leading"),
            config.get("steps_offset", 0),
            config.get("set_alpha_to_one", True),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole folder, safetensors and JSON only, every key of the scheduler spelled out."""
        folder = Path(folder)
        self.unet.save_pretrained(str(folder / "unet"), safe_serialization=True)
        self.autoencoder.vae.save_pretrained(str(folder / "vae"), safe_serialization=True)
        self.text_encoder.save(folder)
        self.scheduler().save_pretrained(str(folder / "scheduler"))
        parts = {
            "scheduler": ["diffusers", "DDIMScheduler"],
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

    def scheduler(self) -> DDIMScheduler:
        """Our process as diffusers' scheduler; its configuration makes every other one by `from_config`."""
        betas = self.schedule.betas.tolist()
        return DDIMScheduler(
            num_train_timesteps=len(betas),
            beta_start=betas[0],
            beta_end=betas[-1],
            trained_betas=betas,
            clip_sample=False,
            set_alpha_to_one=self.set_alpha_to_one,
            steps_offset=self.steps_offset,
            timestep_spacing=self.spacing,
            prediction_type=PREDICTION_TYPE[self.target],
        )

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move, and choose the arithmetic. The autoencoder stays fp32 under fp16, in which its activations overflow."""
        move = torch.nn.Module.to  # diffusers' own warns of modules to be kept in fp32, even where there are none
        move(self.unet, device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        move(self.autoencoder.vae, device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)
        return self

    # -- painting ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 5.0,
        sampler: SamplerKind = "dpmpp_2m",
        eta: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        progress: bool = False,
    ) -> Pictures:
        """Paint `num_images_per_prompt` pictures of each prompt.

        guidance_scale: 1 is the conditional prediction, larger follows the prompt more closely (Ho & Salimans 2022).
        generator: one for all pictures, or a list with one for each; on the CPU it gives the same noise for any device.
        latents: starting noise (b, c, h, w) of unit variance, instead of drawing it.
        Raises UserError for arguments that don't fit, RunError when the picture comes out non-finite.
        """
        if sampler not in get_args(SamplerKind):
            raise UserError(f"sampler {sampler!r}: choose {', '.join(get_args(SamplerKind))}")
        if num_images_per_prompt < 1:
            raise UserError(f"num_images_per_prompt {num_images_per_prompt}: at least 1")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if not prompts or len(negatives) != len(prompts):
            raise UserError(
                f"{len(prompts)} prompts and {len(negatives)} negative prompts: give one negative for all, or each"
            )
        count = len(prompts) * num_images_per_prompt
        shape = (count, self.autoencoder.latent_channels, *self._latent_size(height, width))
        if isinstance(generator, list) and len(generator) != count:
            raise UserError(f"{len(generator)} generators for {count} pictures: give one, or one for each picture")
        if latents is not None and tuple(latents.shape) != shape:
            raise UserError(f"latents of shape {tuple(latents.shape)}: these pictures need {shape}")

        device = self.unet.device
        noise = lambda: randn_tensor(shape, generator, device, torch.float32)  # noqa: E731
        steps = plan(
            self.schedule, sampler, num_inference_steps, self.spacing, self.steps_offset, self.set_alpha_to_one
        )  # fmt: skip
        start = noise() if latents is None else latents.to(device, torch.float32)
        with tqdm(total=num_inference_steps, disable=not progress, dynamic_ncols=True) as bar:
            z = sample(
                self._guided(prompts, negatives, guidance_scale, num_images_per_prompt),
                steps.start(start),
                steps.legs,
                make_step(sampler, eta),
                noise,
                callback=lambda *_: bar.update(),
            )
        if output_type == "latent":
            return Pictures(z)
        return Pictures(_finish(self.decode(z), output_type))

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (b, c, h, w) to pictures (b, 3, H, W) in [0, 1], in portions."""
        pixels = torch.cat([self.autoencoder.decode(part) for part in latents.split(DECODED_AT_ONCE)])
        if not torch.isfinite(pixels).all():
            raise RunError(
                "the picture came out non-finite: try fp32 or bf16 in place of fp16, a lower guidance scale, or more steps"
            )
        return (pixels / 2 + 0.5).clamp(0, 1)

    def _network(self, x: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        return self.unet(x, index, condition, return_dict=False)[0]

    def _guided(self, prompts: list[str], negatives: list[str], scale: float, each: int) -> ClassifierFree:
        condition = self._encode(prompts).repeat_interleave(each, 0)
        negative = self._encode(negatives).repeat_interleave(each, 0)
        denoiser = Denoiser(self._network, self.target, self.unet.dtype)
        return ClassifierFree(denoiser, condition, negative, scale)

    def _encode(self, prompts: list[str]) -> Tensor:
        """Each distinct prompt once: (b, tokens, width)."""
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


def _finish(
    pixels: Tensor, output_type: Literal["pil", "np", "pt", "latent"]
) -> list[Image.Image] | np.ndarray | Tensor:
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (b, h, w, 3)
    if output_type == "np":
        return array
    if output_type == "pil":
        return [Image.fromarray(picture) for picture in (array * 255).round().astype(np.uint8)]
    raise UserError(f"output_type {output_type!r}: choose pil, np, pt or latent")
