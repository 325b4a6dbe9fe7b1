"""The networks of a checkpoint, and the one folder or file that they are: loaded, saved, moved, and called one by one.

The folder is a complete, explicit Stable-Diffusion-shaped diffusers checkpoint: stock
`diffusers.DiffusionPipeline.from_pretrained` loads it and, given the same seed, sampler and steps, paints the same
picture.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, Self

import diffusers
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from autoencoder.model import Autoencoder, Posterior
from autoencoder.tiling import Tiles
from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import load_tokenizer
from ldm.denoiser import Network, beside
from ldm.editing import inpainting_context, without
from ldm.errors import RunError, UserError
from ldm.formats import MAX_PIXELS
from ldm.formats.hub import find_pipeline
from ldm.formats.scheduler_config import Process
from ldm.formats.single_file import Parts, load_single_file, save_single_file
from ldm.networks.attention import AttentionBackend, use_attention
from ldm.networks.unet import load_unet, stock_limits

_AT_ONCE, _PIXELS = 32, 2**23  # pictures and pixels, at most, that the autoencoder is given: it takes the most memory


class Networks:
    """UNet, autoencoder and text encoder, and the process that the UNet was trained for."""

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

    # -- folders and files ----------------------------------------------------------------------------------------------

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
        """Write one new safetensors file with the original key names; see `save_single_file`."""
        save_single_file(self, path)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole folder, safetensors and JSON only, every key of the scheduler spelled out."""
        folder = Path(folder)
        self.unet.save_pretrained(str(folder / "unet"), safe_serialization=True)
        self.autoencoder.save(folder / "vae")
        self.text_encoder.save(folder)
        scheduler = self.process.to_diffusers()
        scheduler.save_pretrained(str(folder / "scheduler"))
        for limits in (
            self.process.stock_limits(),
            self.text_encoder.stock_limits(),
            stock_limits(self.unet, self.inpaints),
        ):
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
        """Keep the networks in main memory, and each on the device only while it runs: the largest has to fit, not all.

        Raises UserError where there is no such device.
        """
        try:
            offload = torch.device(device)
            torch.empty(1, device=offload)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {str(device)!r} can't be used: {str(error).strip().splitlines()[0]}") from None
        self.to("cpu")
        self._offload = offload

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
        return use_attention(self.unet, backend, device=self.device)

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

    # -- the networks, one by one ----------------------------------------------------------------------------------

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (b, c, h, w) to pictures (b, 3, H, W) in [0, 1], in portions."""
        with self._running(self.autoencoder.vae):
            at_once = max(1, min(self._at_once, _PIXELS // (latents[0, 0].numel() * self.autoencoder.factor**2)))
            pixels = torch.cat([self.autoencoder.decode(part) for part in latents.split(at_once)])
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
        return to_pil(colours.clamp(0, 1))

    def network(self, x: Tensor, index: Tensor, condition: Tensor) -> Tensor:
        """The UNet's output for states x (b, c, h, w) at index (b,), given text features (b, tokens, width).

        A UNet that inpaints wants the mask and what that leaves beside the state, (b, 2c + 1, h, w).
        """
        return self.unet(x.to(self.unet.dtype), index, condition, return_dict=False)[0]

    def text_network(self, h: int, w: int) -> Network:
        """The network of states (b, c, h, w) as for text-to-image: one that inpaints sees a mask that is white all over."""
        if not self.inpaints:
            return self.network
        return beside(self.network, self.white_context(h, w))

    def white_context(self, h: int, w: int) -> Tensor:
        """What a UNet that inpaints is shown for latents (h, w) where all is to be painted, (1, 1 + c, h, w)."""
        white = torch.ones(1, 1, h * self.autoencoder.factor, w * self.autoencoder.factor)
        around = self._posterior(without(white.expand(-1, 3, -1, -1), white)).mean
        return inpainting_context(white.to(self.device), around)

    def _posterior(self, pixels: Tensor) -> Posterior:
        """Of pictures (b, 3, H, W) in [−1, 1], float32, in portions."""
        with self._running(self.autoencoder.vae):
            at_once = max(1, min(self._at_once, _PIXELS // pixels[0, 0].numel()))
            parts = [self.autoencoder.encode(part) for part in pixels.split(at_once)]
        mean, std = (torch.cat(each).to(self.device, torch.float32) for each in zip(*parts, strict=True))
        return Posterior(mean, std)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text features of prompts, (b, tokens, width); each distinct one is worked out once."""
        distinct = list(dict.fromkeys(prompts))
        with self._running(self.text_encoder.model):
            rows = self.text_encoder.encode(distinct).to(self.device, self.unet.dtype)
        return rows[[distinct.index(p) for p in prompts]]

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the latents of pictures of so many pixels; None: the model's own. Else UserError."""
        factor = self.autoencoder.factor
        size = self.unet.config.sample_size
        natural = (size, size) if isinstance(size, int) else tuple(size)
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        h = natural[0] * factor if height is None else height
        w = natural[1] * factor if width is None else width
        if h <= 0 or w <= 0 or h % multiple or w % multiple:
            raise UserError(
                f"a picture of {w}×{h} pixels: width and height must be multiples of {multiple} for this model"
            )
        if h * w > MAX_PIXELS:
            raise UserError(f"a picture of {w}×{h} pixels: up to {MAX_PIXELS:,} in all are accepted")
        return h // factor, w // factor


@cache
def _warn_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """(b, 3, h, w) in [0, 1]."""
    array = (pixels.permute(0, 2, 3, 1).cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in array]
