"""How the painting scripts are told what to paint, and with what."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from ldm.kinds import AttentionBackend
from ldm.samplers import SamplerKind
from train.config.run import Precision
from train.config.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SamplingOptions):
    """What all commands that run a model share."""

    model: str = ""
    """The model: a stage 2 run's model/, or a Stable-Diffusion-shaped diffusers folder or hub id."""
    prompt: str = ""
    """What to paint."""
    prompts: str = ""
    """A file (UTF-8) with a prompt a line, instead."""
    negative_prompt: str = ""
    """What to stay away from."""
    out: str = "out"
    """Folder the pictures go to."""
    seed: int = 0
    """Of the first picture's noise."""
    batch_size: int = 8
    """Pictures painted at once."""
    device: str = ""
    """Device, e.g. cpu or cuda:1; empty: the GPU if there is one."""
    tile: Annotated[int | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Decode in overlapping tiles of this side, e.g. 64, for large pictures in little memory; whole unless given."""
    slice: bool = False
    """Decode pictures one by one, for large batches in little memory."""
    offload: bool = False
    """Keep each network in main memory while another runs, for a small GPU."""
    precision: Precision = "fp32"
    """Of the network's weights and arithmetic."""
    attention: AttentionBackend = "sdpa"
    """What computes the UNet's attention: torch itself (sdpa), xformers, or auto: xformers where it works, else sdpa."""
    chunks: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Read prompts in N parts, each as long as the text encoder takes; the model's own number unless given."""


@dataclass(frozen=True, kw_only=True)
class PaintOptions(ModelOptions):
    """What all commands that paint pictures share."""

    num_images: int = 1
    """How many of each prompt; picture k has seed + k."""
    compose: Annotated[tuple[tuple[str, float], ...], tyro.conf.arg(metavar="PROMPT SCALE …")] = ()
    """Further prompts that the picture follows too, each with its own guidance scale."""
    weak_model: str = ""
    """Folder of a weaker model, e.g. an earlier one, to be guided away from; with --guidance-scale 1, as they multiply."""
    weak_scale: float = 2.0
    """How far away from the weaker model; 1 is without."""
    like: str = ""
    """A picture painted by this command, to be painted again; options given beside it are taken in place of its own."""
    grid: bool = False
    """Write one PNG more, with all the pictures in rows and the settings of the first."""
    preview: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 0
    """Every so many steps, show in OUT/preview.png what is under way, in cheap colours; removed at the end. 0: never."""


@dataclass(frozen=True, kw_only=True)
class InterpolateOptions(ModelOptions):
    """Paint the way from one prompt to another, or from one seed to another: frames, and an animation of them."""

    to: tuple[str, ...] = ()
    """Prompts to go to, one after the other."""
    to_seed: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Seed to go to, over all the frames; the first frame has --seed."""
    frames: int = 25
    """Pictures from a prompt to the next, both ends included."""
    fps: float = 12.5
    """Frames a second, 1 to 50; the animation takes the nearest that its format has, a whole number of 1/100 s a frame."""
    loop: bool = True
    """Let the animation begin again at its end."""
    width: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Width; the model's own unless given."""
    height: Annotated[int | None, tyro.conf.arg(metavar="PIXELS")] = None
    """Height; the model's own unless given."""


@dataclass(frozen=True, kw_only=True)
class InpaintOptions(PaintOptions):
    """Paint inside a mask, or beyond a picture's borders; the rest stays as it is, bit by bit."""

    sampler: SamplerKind = "dpmpp_2m_sde"
    """How a step is taken; those that draw noise on the way fit what they paint to its surroundings better."""
    image: str = ""
    """The picture, of any size."""
    mask: str = ""
    """White is painted, black and transparent stay, grey is mixed; of any size. May be left out with --extend."""
    strength: float = 1.0
    """How much of what is inside the mask is given up: 0 nothing, 1 all."""
    feather: float = 0.0
    """Soften the mask's edge over about so many pixels, on both its sides."""
    extend: Annotated[tuple[int, int, int, int], tyro.conf.arg(metavar="LEFT TOP RIGHT BOTTOM")] = (0, 0, 0, 0)
    """Pixels to paint beyond the borders (outpainting)."""
