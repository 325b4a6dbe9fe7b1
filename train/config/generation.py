"""The options of the commands that generate images."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ldm.kinds import AttentionBackend
from ldm.samplers import SamplerKind
from train.config.run import Precision
from train.config.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SamplingOptions):
    """Options of all commands that run a model."""

    model: str = ""
    """Model to run: a stage 2 run's model/, or a Stable-Diffusion-shaped diffusers folder or hub id."""
    prompt: str = ""
    """Text that describes the image."""
    prompts: str = ""
    """Text file (UTF-8) with one prompt per line, instead of --prompt."""
    negative_prompt: str = ""
    """Text that describes what the image should not show."""
    out: str = "out"
    """Output folder of the images."""
    seed: int = 0
    """Seed of the first image's noise."""
    batch_size: int = 8
    """Images generated at once."""
    device: str = ""
    """Device, e.g. cpu or cuda:1; empty: the GPU if there is one."""
    tile: Annotated[int | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Side of overlapping tiles for decoding, e.g. 64; tiles save memory for large images. Default: no tiles."""
    slice: bool = False
    """Decode images one by one: saves memory for large batches."""
    offload: bool = False
    """Keep each network in main memory while another one runs, for a GPU with little memory."""
    precision: Precision = "fp32"
    """Precision of the network's weights and arithmetic."""
    attention: AttentionBackend = "sdpa"
    """Attention backend of the UNet: sdpa (torch), xformers, or auto: xformers if it works, else sdpa."""
    chunks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Windows of the text encoder's length into which a prompt is split. Default: the model's own number."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Options of all commands that generate separate images."""

    num_images: int = 1
    """Number of images per prompt; image k has seed + k."""
    compose: Annotated[tuple[tuple[str, float], ...], tyro.conf.arg(metavar="PROMPT SCALE …")] = ()
    """Additional prompts for the same image, each with its own guidance scale."""
    weak_model: str = ""
    """Folder of a weaker model, e.g. an earlier one, to guide away from; use --guidance-scale 1, as scales multiply."""
    weak_scale: float = 2.0
    """Guidance scale away from the weaker model; 1 is no guidance."""
    like: str = ""
    """Image made by this command, to make again with its settings; other options on the command line override them."""
    grid: bool = False
    """Also write a PNG with all images in a grid and the settings of the first."""
    preview: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Steps between updates of OUT/preview.png, a rough preview that is removed at the end. 0: no preview."""


@dataclass(frozen=True, kw_only=True)
class Txt2ImgOptions(GenerateOptions):
    """Generate images from a prompt, or from each prompt of a file."""

    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image width. Default: the model's own."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image height. Default: the model's own."""


@dataclass(frozen=True, kw_only=True)
class Img2ImgOptions(GenerateOptions):
    """Generate images that start from given images: variations, or changes that follow a prompt."""

    image: tuple[str, ...] = ()
    """Images to start from, of any size; each is used --num-images times. With --prompts: one, or one per prompt."""
    strength: float = 0.8
    """Amount of change: 0 keeps the image, 1 keeps only its size. Only the last strength · steps steps are run."""


@dataclass(frozen=True, kw_only=True)
class InterpolateOptions(ModelOptions):
    """Interpolate from one prompt to another, or from one seed to another: write the frames and an animation."""

    to: tuple[str, ...] = ()
    """Prompts to interpolate to, in order."""
    to_seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Seed to interpolate to, over all frames; the first frame has --seed."""
    frames: int = 25
    """Frames from one prompt to the next, including both ends."""
    fps: float = 12.5
    """Frames per second, 1 to 50; the duration of a frame is rounded to 1/100 s, as the GIF format requires."""
    loop: bool = True
    """Repeat the animation without end."""
    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image width. Default: the model's own."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image height. Default: the model's own."""


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(GenerateOptions):
    """Inpaint the masked part of an image, or extend it beyond its borders; all other pixels stay exactly the same."""

    sampler: SamplerKind = "dpmpp_2m_sde"
    """Sampler; those that draw noise at each step match the new part to its surroundings better."""
    image: str = ""
    """Image to inpaint, of any size."""
    mask: str = ""
    """Mask of any size: white is inpainted, black and transparent are kept, grey is mixed. Optional with --extend."""
    strength: float = 1.0
    """Amount of change inside the mask: 0 keeps the image, 1 replaces it completely."""
    feather: float = 0.0
    """Width in pixels, approximately, over which the mask's edge is softened on both sides."""
    extend: Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = (0, 0, 0, 0)
    """Pixels to add beyond each border (outpainting)."""
