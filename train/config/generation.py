"""The options of the commands that generate images."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import tyro

from conditioning import PromptWeights
from ldm.kinds import AttentionBackend, EngineKind
from ldm.samplers import SamplerKind
from train.config.limits import Number
from train.config.run import Precision
from train.config.sampling import SamplingOptions

Resize = Literal["auto", "always", "never"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SamplingOptions):
    """Options of all commands that run a model."""

    model: str = ""
    """Model to run: folder of a stage 2 run, or folder or hub id of a diffusers pipeline like Stable Diffusion.
    Required."""
    prompt: str = ""
    """Text that describes the image; empty: an image of any content."""
    prompts: str = ""
    """Text file (UTF-8) with one prompt per line, used instead of --prompt."""
    negative_prompt: str = ""
    """Text that describes what the image should not show; it has no effect with --guidance-scale 1."""
    prompt_weights: PromptWeights = "none"
    """Rules of weights such as (word:1.3) in prompts: those of AUTOMATIC1111's web UI or of ComfyUI.
    none: brackets are plain text."""
    out: str = "out"
    """Output folder of the images."""
    seed: int = 0
    """Seed of the first image's noise, at least 0."""
    batch_size: Number = 8
    """Number of images generated at once; fewer need less memory."""
    device: str = ""
    """Device to run on, e.g. cpu, cuda:1 or mps; empty: the GPU if there is one (cuda or Apple's mps), else the CPU."""
    tile: Annotated[int | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Side of the tiles in which a large image is decoded to save memory, in latent pixels, e.g. 64; at least 4.
    None: no tiles."""
    slice: bool = False
    """Decode the images of a batch one by one, to save memory."""
    offload: bool = False
    """Keep only the running network on the GPU and the others in main memory, for a GPU with little memory."""
    precision: Precision = "fp32"
    """Number format of the weights and the arithmetic."""
    attention: AttentionBackend = "sdpa"
    """Attention implementation of the UNet: sdpa (torch), xformers, or auto (xformers if it works, else sdpa)."""
    optimize: EngineKind = "auto"
    """Faster engine that runs the networks: openvino (CPU; needs the package openvino), compile (torch.compile), off.
    auto: one of them, but only if there is enough to generate that it saves more time than compiling takes."""
    chunks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of chunks into which a long prompt is split, each as long as the text encoder accepts.
    None: the model's own number."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ModelOptions):
    """Options of all commands that generate separate images."""

    num_images: Number = 1
    """Number of images per prompt; image k (from 0) has seed + k."""
    compose: Annotated[tuple[tuple[str, float], ...], tyro.conf.arg(metavar="PROMPT SCALE …")] = ()
    """Additional prompts for the same image, each followed by its guidance scale, e.g. "a blue star" 2."""
    weak_model: str = ""
    """Folder of a weaker model to guide away from, e.g. an earlier checkpoint of the same model.
    Use it with --guidance-scale 1, because the two scales are multiplied."""
    weak_scale: float = 2.0
    """Guidance scale away from the weaker model; 1: no guidance away from it."""
    like: str = ""
    """PNG made by this command, whose settings are used again, including its model and input images.
    Other options on the command line override them."""
    grid: bool = False
    """Also write a PNG with all images in a grid, and with the settings of the first image."""
    preview: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Number of steps between updates of OUT/preview.png, a rough preview that is removed at the end; 0: no preview."""


@dataclass(frozen=True, kw_only=True)
class Txt2ImgOptions(GenerateOptions):
    """Generate images from a prompt, or from each prompt of a file."""

    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image width. None: the model's own."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image height. None: the model's own."""


@dataclass(frozen=True, kw_only=True)
class EditOptions(GenerateOptions):
    """Options of all commands that edit given images."""

    resize: Resize = "auto"
    """Resizing of a given image to about the number of pixels that the model was trained at, and of the result back.
    `auto`: if the two differ by a factor of more than 2.25; `never`: the image is generated at its own size."""


@dataclass(frozen=True, kw_only=True)
class Img2ImgOptions(EditOptions):
    """Generate images that start from given images: variations, or changes that follow a prompt."""

    image: tuple[str, ...] = ()
    """Images to start from, of any size; each is used --num-images times. Required.
    With --prompts: one image, or one per prompt."""
    strength: float = 0.8
    """Amount of change, 0 to 1: 0 keeps the image, 1 keeps only its size.
    Only the last strength · steps steps are run."""


@dataclass(frozen=True, kw_only=True)
class InterpolateOptions(ModelOptions):
    """Interpolate from one prompt to another, or from one seed to another, and write the frames and an animation."""

    to: tuple[str, ...] = ()
    """Prompts to interpolate to, in order; the first frame has --prompt. Required without --prompts and --to-seed."""
    to_seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Seed of the last frame's noise; the first frame has --seed, and the noise changes gradually in between.
    None: all frames have --seed."""
    frames: Number = 25
    """Number of frames from one prompt to the next, including both ends."""
    fps: float = 12.5
    """Number of frames per second, 1 to 50; a frame's duration is rounded to 1/100 s, as the GIF format requires."""
    loop: bool = True
    """Repeat the animation endlessly."""
    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image width. None: the model's own."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Image height. None: the model's own."""


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(EditOptions):
    """Inpaint the masked part of an image, or extend it beyond its borders; all other pixels stay exactly the same."""

    sampler: SamplerKind | None = None
    """Sampler; samplers that draw noise at each step match the new part to its surroundings better.
    None: lcm for a consistency model, and dpmpp_2m_sde for all others."""
    image: str = ""
    """Image file to inpaint, of any size. Required."""
    mask: str = ""
    """Mask file, of any size: white areas are inpainted, black and transparent ones are kept, grey ones are mixed.
    Required without --extend."""
    strength: float = 1.0
    """Amount of change inside the mask, 0 to 1: 0 keeps the image, 1 replaces it completely."""
    feather: float = 0.0
    """Approximate width, in pixels, over which the mask's edge is softened on both sides; 0: not softened."""
    extend: Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = (0, 0, 0, 0)
    """Number of pixels to add beyond each border (outpainting)."""

    def for_sampler(self, own: SamplerKind) -> Self:
        return super().for_sampler("dpmpp_2m_sde" if own == "dpmpp_2m" else own)
