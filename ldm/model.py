"""A trained model: its networks and the folder that stores them. Loads, saves and moves the networks and calls each.

The folder is a complete, explicit Stable-Diffusion-shaped diffusers checkpoint: stock
`diffusers.DiffusionPipeline.from_pretrained` loads it and, given the same seed, sampler and steps, generates the same
image.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from autoencoder.model import Autoencoder, Posterior
from conditioning.clip import ClipTextEncoder
from conditioning.tokenizer import load_tokenizer
from ldm.editing import inpainting_context, without
from ldm.errors import RunError, UserError
from ldm.formats import MAX_PIXELS
from ldm.formats.hub import PARTS, find_pipeline
from ldm.formats.scheduler_config import Process
from ldm.formats.single_file import Parts
from ldm.networks.attention import use_attention
from ldm.networks.backbone import Backbone
from ldm.networks.unet import UNet, load_unet
from ldm.task import Task, context_channels, task_by_channels

IMAGES_AT_ONCE = 32  # most images in one call of the autoencoder, the network that needs the most memory
_PIXELS_AT_ONCE = 2**23
_STOCK: dict[Task, str] = {"txt2img": "StableDiffusionPipeline", "inpaint": "StableDiffusionInpaintPipeline"}
"""diffusers' pipeline class of each task, as model_index.json names it."""


class Model:
    """Backbone, autoencoder, text encoder, and the process that the backbone was trained for."""

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
        c = autoencoder.latent_channels
        self.backbone = UNet.of(backbone, c) if isinstance(backbone, UNet2DConditionModel) else backbone
        self.autoencoder, self.text_encoder, self.process = autoencoder, text_encoder, process
        by_channels = task_by_channels(self.backbone.in_channels - c, c)
        self.task: Task = task or by_channels
        if self.task != by_channels:
            raise UserError(
                f"a model said to be for {task}, whose network has {self.backbone.context_channels} context channels: "
                f"{context_channels(self.task, c)} are needed"
            )
        if process.variance == "learned" and self.backbone.out_channels != 2 * c:
            raise UserError(
                f"a learned variance needs {2 * c} output channels, the UNet has {self.backbone.out_channels}: choose "
                "fixed_small or fixed_large, or train with diffusion.variance learned"
            )
        self.images_at_once = IMAGES_AT_ONCE
        self.offload: torch.device | None = None
        """Device that each network is moved to while it runs; None: the networks stay where they are."""

    # -- moving --------------------------------------------------------------------------------------------------------

    def to(self, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
        """Move the networks to a device and a dtype. The autoencoder overflows in fp16 and takes fp32 instead."""
        if device is not None:
            self.offload = None
        move = nn.Module.to  # diffusers' own `to` warns about modules to keep in fp32, even if there are none
        move(self.backbone.module, device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        move(self.autoencoder.vae, device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)

    @property
    def device(self) -> torch.device:
        """Device on which the networks run."""
        return self.offload or self.backbone.device

    @contextmanager
    def running(self, network: nn.Module) -> Iterator[None]:
        """Keep an offloaded network on the device while the context lasts."""
        if self.offload is None:
            yield
            return
        nn.Module.to(network, device=self.offload)
        try:
            yield
        finally:
            nn.Module.to(network, device="cpu")

    # -- calling -------------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return the text features of prompts, (b, tokens, width); each distinct prompt is encoded once."""
        distinct = list(dict.fromkeys(prompts))
        with self.running(self.text_encoder.model):
            rows = self.text_encoder.encode(distinct).to(self.device, self.backbone.dtype)
        return rows[[distinct.index(p) for p in prompts]]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (b, c, h, w) to images (b, 3, H, W) in [0, 1], a few at a time."""
        with self.running(self.autoencoder.vae):
            at_once = self._at_once(latents[0, 0].numel() * self.autoencoder.factor**2)
            pixels = torch.cat([self.autoencoder.decode(part) for part in latents.split(at_once)])
        if not torch.isfinite(pixels).all():
            raise RunError(
                "the image came out non-finite: try fp32 or bf16 in place of fp16, a lower guidance scale, or more steps"
            )
        return (pixels / 2 + 0.5).clamp(0, 1)

    def posterior(self, pixels: Tensor) -> Posterior:
        """Encode images (b, 3, H, W) in [−1, 1] to the distribution of their latents, float32, a few at a time."""
        with self.running(self.autoencoder.vae):
            parts = [self.autoencoder.encode(part) for part in pixels.split(self._at_once(pixels[0, 0].numel()))]
        mean, std = (torch.cat(each).to(self.device, torch.float32) for each in zip(*parts, strict=True))
        return Posterior(mean, std)

    def white_context(self, h: int, w: int) -> Tensor:
        """Return the context of an inpainting network for latents (h, w) and an all-white mask, (1, 1 + c, h, w)."""
        white = torch.ones(1, 1, h * self.autoencoder.factor, w * self.autoencoder.factor)
        around = self.posterior(without(white.expand(-1, 3, -1, -1), white)).mean
        return inpainting_context(white.to(self.device), around)

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which both sides of an image must be multiples."""
        return self.autoencoder.factor * self.backbone.size_multiple

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of the latents of images of this size in pixels; None: the model's own size.

        Raises UserError for a size that the model doesn't support.
        """
        factor, multiple = self.autoencoder.factor, self.size_multiple
        natural_h, natural_w = self.backbone.sample_size
        h = natural_h * factor if height is None else height
        w = natural_w * factor if width is None else width
        if h <= 0 or w <= 0 or h % multiple or w % multiple:
            raise UserError(
                f"an image of {w}×{h} pixels: width and height must be multiples of {multiple} for this model"
            )
        if h * w > MAX_PIXELS:
            raise UserError(f"an image of {w}×{h} pixels: up to {MAX_PIXELS:,} in all are accepted")
        return h // factor, w // factor

    def _at_once(self, pixels: int) -> int:
        """Return how many images of `pixels` pixels each go through the autoencoder at once."""
        return max(1, min(self.images_at_once, _PIXELS_AT_ONCE // pixels))

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the whole folder, safetensors and JSON only, with every scheduler key explicit."""
        backbone, scheduler = self.backbone, self.process.to_diffusers()
        backbone.save(folder / backbone.part)
        self.autoencoder.save(folder / "vae")
        self.text_encoder.save(folder)
        scheduler.save_pretrained(str(folder / "scheduler"))
        for part in (self.process, self.text_encoder, backbone):
            if limits := part.stock_limits():
                _warn_once(limits)
        network = type(backbone.module)
        index = {
            "_class_name": _STOCK[self.task],
            "_diffusers_version": diffusers.__version__,
            "requires_safety_checker": False,
            "scheduler": ["diffusers", type(scheduler).__name__],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            backbone.part: [network.__module__.partition(".")[0], network.__name__],
            "vae": ["diffusers", "AutoencoderKL"],
            **{name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")},
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


Loaded = tuple[Backbone, Autoencoder, ClipTextEncoder, Process, Task | None]


def load(folder: str | Path, chunks: int | None, backbone: Backbone | None) -> Loaded:
    """Read a model's parts from a folder or hub id; a given backbone replaces the folder's UNet. Raises UserError."""
    folder = find_pipeline(folder, [part for part in PARTS if backbone is None or part != UNet.part])
    autoencoder = Autoencoder.load(folder / "vae")
    if backbone is None:
        backbone = UNet.of(load_unet(folder).eval().requires_grad_(False), autoencoder.latent_channels)
    text_encoder, process = ClipTextEncoder.load(folder, chunks=chunks), Process.load(folder)
    return backbone, autoencoder, text_encoder, process, _said_task(folder, backbone)


def from_parts(parts: Parts, folder: str | Path, chunks: int | None) -> Loaded:
    """Return a model's parts, made of loaded networks and the tokenizer of a pipeline's folder. Raises UserError."""
    try:
        tokenizer = load_tokenizer(Path(folder) / "tokenizer")
    except Exception as error:  # a broken file makes the library raise almost anything
        raise UserError(f"{str(folder)!r} has no tokenizer/ that can be read: {error}") from None
    use_attention(parts.unet)
    autoencoder, encoder = Autoencoder(parts.vae), ClipTextEncoder(parts.text_encoder, tokenizer, chunks=chunks)
    backbone = UNet.of(parts.unet, autoencoder.latent_channels)
    return backbone, autoencoder, encoder, parts.process, _said_task(Path(folder), backbone)


def _said_task(folder: Path, backbone: Backbone) -> Task | None:
    """Return the task that the class in model_index.json names; None without that file or for another class."""
    try:
        said = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    task = next((task for task, name in _STOCK.items() if name == said), None)
    # diffusers' inpainting pipeline also takes a network without context channels; it then inpaints by blending.
    return "txt2img" if task == "inpaint" and not backbone.context_channels else task


@cache
def _warn_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)
