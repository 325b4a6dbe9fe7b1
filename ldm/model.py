"""A trained model: its networks, and functions that load, save, move and call them.

The folder that stores a model is a complete diffusers checkpoint in the shape of Stable Diffusion, with all settings
explicit. `diffusers.DiffusionPipeline.from_pretrained` loads it and generates the same image, given the same
seed, sampler and steps.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from autoencoder.model import Autoencoder, Decoder, Encoder, Halves, Posterior
from conditioning import PromptWeights
from conditioning.clip import ClipTextEncoder
from conditioning.openclip import published_tokenizer
from conditioning.tokenizer import load_tokenizer
from ldm.denoiser import ScaledNetwork
from ldm.editing import inpainting_context, masked_image
from ldm.errors import RunError, UserError, one_line
from ldm.files import read_json
from ldm.formats import MAX_PIXELS
from ldm.formats.hub import PARTS, find_pipeline
from ldm.formats.original_names import Parts
from ldm.formats.scheduler_config import Process
from ldm.kinds import EngineKind
from ldm.libraries import CLIPTokenizer, UNet2DConditionModel, diffusers
from ldm.networks.attention import use_attention
from ldm.networks.backbone import Backbone
from ldm.networks.compilation import Engine, EngineNetwork, choose_engine
from ldm.networks.unet import UNet, load_unet
from ldm.task import Task, context_channels, task_by_channels

IMAGES_AT_ONCE = 32  # maximum in one call of the autoencoder, the network that needs the most memory
_PIXELS_AT_ONCE = 2**23  # maximum in one call of the autoencoder
_PIPELINE_CLASSES: dict[Task, str] = {"txt2img": "StableDiffusionPipeline", "inpaint": "StableDiffusionInpaintPipeline"}
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
        """Combine the parts. task: task of the model; None: decided by the backbone's channels.

        Raises UserError if the parts don't fit together.
        """
        c = autoencoder.latent_channels
        self.backbone = UNet.wrap(backbone, c) if isinstance(backbone, UNet2DConditionModel) else backbone
        self.autoencoder, self.text_encoder, self.process = autoencoder, text_encoder, process
        by_channels = task_by_channels(self.backbone.in_channels - c, c)
        self.task: Task = task or by_channels
        if self.task != by_channels:
            raise UserError(
                f"task {task}: the network needs {context_channels(self.task, c)} context channels, but it has "
                f"{self.backbone.context_channels}, which fits task {by_channels}"
            )
        if process.variance == "learned" and self.backbone.out_channels != 2 * c:
            raise UserError(
                f"variance learned: needs a network with {2 * c} output channels, but this one has "
                f"{self.backbone.out_channels}; choose fixed_small or fixed_large, or train with diffusion.variance "
                "learned"
            )
        self.images_at_once = IMAGES_AT_ONCE
        self.offload: torch.device | None = None
        """Device that each network is moved to while it runs; None: the networks stay where they are."""
        self.engine: Engine | None = None
        """Engine that runs the backbone's core; None: torch runs it as it is."""

    # -- moving --------------------------------------------------------------------------------------------------------

    def to(self, device: str | torch.device | None, dtype: torch.dtype | None) -> None:
        """Move the networks to a device and a dtype. The autoencoder uses fp32 for fp16, in which it overflows."""
        if device is not None:
            self.offload = None
        self.optimize("off")
        move = nn.Module.to  # diffusers' own `to` warns about modules to keep in fp32, even if there are none
        move(self.backbone.module, device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        move(self.autoencoder.vae, device=device, dtype=torch.float32 if dtype == torch.float16 else dtype)

    @property
    def device(self) -> torch.device:
        """Device on which the networks run."""
        return self.offload or self.backbone.device

    @contextmanager
    def on_device(self, network: nn.Module) -> Iterator[None]:
        """Return a context in which an offloaded network is on the device."""
        if self.offload is None:
            yield
            return
        nn.Module.to(network, device=self.offload)
        try:
            yield
        finally:
            nn.Module.to(network, device="cpu")

    def optimize(self, kind: EngineKind, seconds: float = math.inf) -> EngineKind:
        """Choose the engine of the backbone and the autoencoder, and return its name. Raises UserError.

        seconds: see `choose_engine`.
        """
        if kind not in ("auto", "off") and self.offload is not None:
            raise UserError(f"optimize {kind}: can't be used with offloading; leave one of them out")
        dtype, vae = self.backbone.dtype, self.autoencoder.vae
        engine = None if self.offload is not None else choose_engine(kind, self.device, dtype, seconds)
        self.engine = self.autoencoder.compiled = None
        if engine is None:
            return "off"
        backbone, encoder, decoder = (
            engine(module, required=kind != "auto") for module in (self.backbone.core(), Encoder(vae), Decoder(vae))
        )
        self.engine, self.autoencoder.compiled = backbone, Halves(encoder, decoder)
        return engine.kind

    def seconds(self, images: int, steps: int) -> float:
        """Return a rough estimate of the time to generate images of the model's size, without an engine.

        It doesn't depend on the machine's load, so that the choice of `auto` doesn't either.
        """
        parameters, (h, w) = sum(p.numel() for p in self.backbone.module.parameters()), self.backbone.sample_size
        return images * steps * 0.8 * parameters * h * w / (1e11 if self.device.type == "cpu" else 1e14)

    def network(self, reuse_features: int = 1) -> ScaledNetwork:
        """Return the backbone for sampling. What depends only on the condition is computed once for each condition.

        reuse_features: see `Backbone.for_sampling`. Raises UserError above 1 with an engine.
        """
        if self.engine is None:
            return self.backbone.for_sampling(reuse_features)
        if reuse_features != 1:
            raise UserError(f"reuse features {reuse_features}: can't be used with optimize; leave one of them out")
        return EngineNetwork(self.backbone, self.engine)

    # -- calling -------------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[str], rules: PromptWeights = "none") -> Tensor:
        """Return the text features of prompts, (b, tokens, width); each distinct prompt is encoded once.

        rules: those of weights such as (word:1.3), see conditioning/weights.py.
        """
        distinct = list(dict.fromkeys(prompts))
        with self.on_device(self.text_encoder.model):
            rows = self.text_encoder.encode(distinct, rules).to(self.device, self.backbone.dtype)
        return rows[[distinct.index(p) for p in prompts]]

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (b, c, h, w) to images (b, 3, H, W) in [0, 1], a few at a time."""
        with self.on_device(self.autoencoder.vae):
            at_once = self._at_once(latents.shape[2:].numel() * self.autoencoder.factor**2)
            pixels = torch.cat([self.autoencoder.decode(part) for part in latents.split(at_once)])
        if not torch.isfinite(pixels).all():
            raise RunError(
                "the generated image contains NaN or infinity: try fp32 or bf16 instead of fp16, a lower guidance "
                "scale, or more steps"
            )
        return (pixels / 2 + 0.5).clamp(0, 1)

    def posterior(self, pixels: Tensor) -> Posterior:
        """Encode images (b, 3, H, W) in [−1, 1] to the distribution of their latents, float32, a few at a time."""
        with self.on_device(self.autoencoder.vae):
            parts = [self.autoencoder.encode(part) for part in pixels.split(self._at_once(pixels.shape[2:].numel()))]
        mean, std = (torch.cat(each).to(self.device, torch.float32) for each in zip(*parts, strict=True))
        return Posterior(mean, std)

    def white_context(self, h: int, w: int) -> Tensor:
        """Return the context of an inpainting network for latents (h, w) and an all-white mask, (1, 1 + c, h, w)."""
        white = torch.ones(1, 1, h * self.autoencoder.factor, w * self.autoencoder.factor)
        masked_latents = self.posterior(masked_image(white.expand(-1, 3, -1, -1), white)).mean
        return inpainting_context(white.to(self.device), masked_latents)

    @property
    def size_multiple(self) -> int:
        """Number of pixels that must divide the width and the height of an image."""
        return self.autoencoder.factor * self.backbone.size_multiple

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of the latents of images of this size in pixels; None: the model's own size.

        Raises UserError for a size that the model doesn't support.
        """
        factor, multiple = self.autoencoder.factor, self.size_multiple
        default_h, default_w = self.backbone.sample_size
        h = default_h * factor if height is None else height
        w = default_w * factor if width is None else width
        if h <= 0 or w <= 0 or h % multiple or w % multiple:
            raise UserError(f"width {w}, height {h}: must be positive multiples of {multiple} for this model")
        if h * w > MAX_PIXELS:
            raise UserError(f"width {w}, height {h}: an image can have up to {MAX_PIXELS:,} pixels")
        return h // factor, w // factor

    def _at_once(self, pixels: int) -> int:
        """Return the number of images in one call of the autoencoder, for images of `pixels` pixels each."""
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
            if limits := part.diffusers_limits():
                warn_once(limits)
        network = type(backbone.module)
        index = {
            "_class_name": _PIPELINE_CLASSES[self.task],
            "_diffusers_version": diffusers.__version__,
            "requires_safety_checker": False,
            "scheduler": ["diffusers", type(scheduler).__name__],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            backbone.part: [network.__module__.partition(".")[0], network.__name__],
            "vae": ["diffusers", "AutoencoderKL"],
            **{name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")},
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


ModelParts = tuple[Backbone, Autoencoder, ClipTextEncoder, Process, Task | None]
"""The arguments of `Model`."""


def load(folder: str | Path, chunks: int | None, backbone: Backbone | None) -> ModelParts:
    """Read a model's parts from a folder or hub id; a given backbone replaces the folder's UNet. Raises UserError."""
    folder = find_pipeline(folder, [part for part in PARTS if backbone is None or part != UNet.part])
    autoencoder = Autoencoder.load(folder / "vae")
    if backbone is None:
        backbone = UNet.wrap(load_unet(folder).eval().requires_grad_(False), autoencoder.latent_channels)
    text_encoder, process = ClipTextEncoder.load(folder, chunks=chunks), Process.load(folder)
    return backbone, autoencoder, text_encoder, process, _task_from_index(folder, backbone)


def from_parts(parts: Parts, folder: str | Path | None, chunks: int | None) -> ModelParts:
    """Return a model's parts, made of loaded networks and their tokenizer. folder: the pipeline's, if there is one.

    Raises UserError if the tokenizer can't be read.
    """
    tokenizer = tokenizer_of(parts)
    use_attention(parts.unet)
    autoencoder, encoder = Autoencoder(parts.vae), ClipTextEncoder(parts.text_encoder, tokenizer, chunks=chunks)
    backbone = UNet.wrap(parts.unet, autoencoder.latent_channels)
    return backbone, autoencoder, encoder, parts.process, _task_from_index(Path(folder), backbone) if folder else None


def tokenizer_of(parts: Parts) -> CLIPTokenizer:
    """Return the tokenizer of a single file's networks. Raises UserError if it can't be read."""
    text = parts.text_encoder.config
    if parts.tokenizer is None:
        return published_tokenizer(text.max_position_embeddings, text.pad_token_id)
    try:
        return load_tokenizer(parts.tokenizer)
    except Exception as error:  # for a damaged file, the library may raise any error
        raise UserError(f"tokenizer {str(parts.tokenizer)!r} can't be read: {one_line(error, 300)}") from None


def _task_from_index(folder: Path, backbone: Backbone) -> Task | None:
    """Return the task that the class in model_index.json names; None without that file or for another class."""
    try:
        class_name = read_json(folder / "model_index.json")["_class_name"]
    except (OSError, ValueError, KeyError):
        return None
    task = next((task for task, name in _PIPELINE_CLASSES.items() if name == class_name), None)
    # diffusers' inpainting pipeline also takes a network without context channels; it then inpaints by blending.
    return "txt2img" if task == "inpaint" and not backbone.context_channels else task


@cache
def warn_once(line: str) -> None:
    """Log a warning, unless the process has logged the same one before."""
    logging.getLogger(__name__).warning(line)
