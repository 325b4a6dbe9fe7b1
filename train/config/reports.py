"""The options of the commands that measure and write a report."""

import os
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from ldm.kinds import EngineKind
from train.config.clip import ClipConfig, TextTowerConfig
from train.config.data import SourceConfig
from train.config.ldm import LdmConfig
from train.config.limits import MOST_WORKERS, Number, Side
from train.config.run import Precision, RunConfig
from train.config.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Comparison of guidance scales and numbers of steps."""

    guidance: tuple[float, ...] = ()
    """Guidance scales to compare, e.g. 1 2 4 8. Empty: only --guidance-scale."""
    steps: tuple[int, ...] = ()
    """Numbers of sampler steps to compare, e.g. 10 25. Empty: only --steps. Without both, nothing is compared."""
    samples: Number = 256
    """Number of images generated for each combination, from the same captions and noise."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SamplingOptions):
    """Measure a model: its autoencoder, its likelihood, and images that it generates from the dataset's captions.

    docs/evaluation.md explains each number, and how many images it needs.
    """

    model: str = ""
    """Folder or hub id of the model, e.g. runs/ldm/model. Required."""
    data: str = ""
    """Captioned images, in any form that training accepts (docs/data.md). Required."""
    split: Literal["test", "train"] = "test"
    """Split of the dataset; `test` is its validation split, or the held-out share of the images if it has none."""
    out: str = "report"
    """Output folder for report.json, sheets, and generated images, with which an interrupted evaluation continues."""
    features: tuple[str, ...] = ()
    """Networks in whose features generated and real images are compared.
    Any of `inception`, `inception:WEIGHTS.pth`, `dinov2` and `clip`, and folders or hub ids of other CLIPs or DINOv2s.
    Empty: the CLIP of stage 0 with which the model was trained, if it has an image tower."""
    samples: Number = 1000
    """Number of images generated from the split's captions and compared with its images. 0: none."""
    seeds: Number = 8
    """Number of images generated for each of 16 prompts to measure their diversity. 0: none."""
    copies: Number = 50_000
    """Largest number of training images among which copies are searched. 0: none.
    If there are more, --seed chooses them."""
    sweep: SweepOptions = field(default_factory=SweepOptions)
    """Comparison of guidance scales and numbers of steps."""
    prompts: Number = 256
    """Number of prompts of each kind, seen and unseen in training, to measure prompt accuracy on Shapes, and the
    composition of concepts and styles on emoji-styles."""
    images: Number = 1000
    """Largest number of images whose reconstructions are measured. If there are more, --seed chooses them."""
    likelihoods: Number = 128
    """Largest number of images whose variational bound is computed; each takes 33 network evaluations."""
    seed: int = 0
    """Seed of the choice of images, of the prompts and of the noise."""
    batch_size: Number = 64
    """Number of images processed at once."""
    device: str = ""
    """Device to run on, e.g. cpu, cuda:1 or mps; empty: the GPU if there is one (cuda or Apple's mps), else the CPU."""
    precision: Precision = "fp32"
    """Number format of the UNet's arithmetic when it generates images (autocast); bf16 and fp16 are faster.
    The autoencoder and the likelihood are measured in fp32."""
    optimize: EngineKind = "auto"
    """Faster engine that runs the networks: openvino (CPU; needs the package openvino), compile (torch.compile), off.
    auto: one of them, but only if there is enough to generate that it saves more time than compiling takes."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """Settings to find and decode the images and captions."""

    def generation(self) -> dict[str, Any]:
        """Return the options as arguments of `generate_batch`."""
        return {**self.sampling(), "precision": self.precision}


@dataclass(frozen=True, kw_only=True)
class EvaluateVaeOptions:
    """Measure an autoencoder: the quality of its reconstructions and the statistics of its latents."""

    vae: str = ""
    """Folder or hub id of a diffusers AutoencoderKL, or of a pipeline that has one, e.g. runs/vae/model. Required."""
    data: str = ""
    """Images, in any form that training accepts (docs/data.md), with or without captions. Required."""
    split: Literal["test", "train"] = "test"
    """Split of the dataset; `test` is its validation split, or the held-out share of the images if it has none."""
    resolution: Side = 256
    """Side of the square images, in pixels; must be a multiple of the autoencoder's downsampling factor (often 8)."""
    images: Number = 1000
    """Largest number of images to measure. If there are more, --seed chooses them."""
    perceptual: Literal["none", "lpips_vgg", "lpips_alex", "clip"] = "none"
    """Perceptual distance to measure.
    `lpips_vgg`, `lpips_alex`: LPIPS (Zhang et al. 2018) with VGG16 or AlexNet.
    `clip`: the distance between features of a CLIP's image tower."""
    perceptual_model: str = ""
    """Folder or hub id of the CLIP, or file of torchvision's VGG16 or AlexNet weights.
    Empty: VGG16 and AlexNet are downloaded; `clip` needs a folder or hub id."""
    tile: Annotated[int | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Side of the tiles in which a large image is encoded and decoded to save memory, in latent pixels, e.g. 64.
    At least 4. None: no tiles."""
    features: str = ""
    """Network that computes features for the Fréchet distance between images and reconstructions.
    One of `inception`, `inception:WEIGHTS.pth`, `dinov2` and `clip`, or folder or hub id of another CLIP or DINOv2.
    Empty: the distance isn't measured."""
    out: str = "report-vae"
    """Output folder for report.json and reconstructions.png."""
    seed: int = 0
    """Seed of the choice of images and of the noise."""
    batch_size: Number = 16
    """Number of images processed at once."""
    device: str = ""
    """Device to run on, e.g. cpu, cuda:1 or mps; empty: the GPU if there is one (cuda or Apple's mps), else the CPU."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """Settings to find and decode the images and captions."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Settings of the tokenizer that stage 0 learns, with the names that they have there."""

    vocab_size: Number = TextTowerConfig.vocab_size
    """Largest number of tokens in the vocabulary that is learned from the captions, 600 to 49408."""
    max_length: Side = TextTowerConfig.max_length
    """Length of a caption in tokens, including begin and end tokens."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Inspect images and captions before training on them."""

    data: str = ""
    """Images, in any form that training accepts (docs/data.md), with or without captions. Required."""
    split: Literal["all", "train", "test"] = "all"
    """Split of the dataset; `test` is its validation split, or the held-out share of the images if it has none."""
    resolution: Side = 256
    """Side of the intended training images, in pixels; the report counts the images that are smaller."""
    text_encoder: str = ""
    """Text encoder whose tokenizer counts the captions' tokens: a folder, a hub id or openclip:ARCHITECTURE/TAG.
    Empty: the tokenizer that stage 0 would learn from these captions."""
    text: TokenizerOptions = field(default_factory=TokenizerOptions)
    """Tokenizer that stage 0 would learn."""
    text_chunks: int = 0
    """Number of chunks into which stage 2 would split a long caption, each as long as the text encoder accepts.
    0: the number saved with the text encoder, else 1."""
    limit: int = 0
    """Largest number of images to inspect, spread evenly over the dataset; 0: all."""
    out: str = "report-data"
    """Output folder for report.json, contact_sheet.png and, if there are any, damaged.jsonl and duplicates.jsonl."""
    workers: Annotated[int, Field(le=MOST_WORKERS)] = min(
        8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    """Number of decoding processes; 0 decodes in the main process."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """Settings to find and decode the images and captions."""


@dataclass(frozen=True, kw_only=True)
class InspectLossesOptions:
    """Find odd images and wrong captions, by the losses of a model that was trained on the dataset.

    It writes two sheets: the images with the highest loss, and those whose caption helps the model least, compared with
    the empty caption at the same noise. Use a model that doesn't know its images by heart yet: best is model-best/.
    """

    model: str = ""
    """Folder or hub id of the model, e.g. runs/ldm/model-best. Required."""
    data: str = ""
    """Captioned images, in any form that training accepts (docs/data.md). Required."""
    split: Literal["train", "test"] = "train"
    """Split of the dataset; `test` is its validation split, or the held-out share of the images if it has none."""
    out: str = "report-losses"
    """Output folder for odd_images.png, wrong_captions.png, losses.jsonl (all images), report.json and report.html."""
    levels: Number = 8
    """Number of noise levels at which each image is measured; each takes two network evaluations."""
    shown: Number = 64
    """Number of images in each sheet."""
    limit: Number = 0
    """Largest number of images to measure, spread evenly over the dataset; 0: all."""
    seed: int = 0
    """Seed of the noise, and of the choice of a caption if an image has several."""
    batch_size: Number = 64
    """Number of images processed at once."""
    device: str = ""
    """Device to run on, e.g. cpu, cuda:1 or mps; empty: the GPU if there is one (cuda or Apple's mps), else the CPU."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """Settings to find and decode the images and captions."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Write a report of one or several evaluated models as one HTML file, with the models in columns."""

    reports: tuple[str, ...] = ()
    """Output folders of evaluate.py, inspect_losses.py or evaluate_vae.py, one per model. Required."""
    out: str = "report.html"
    """HTML file to write."""
    names: tuple[str, ...] = ()
    """Names of the models; empty: the paths of their folders."""
    samples: Number = 32
    """Largest number of generated images to show of each model, the first ones."""


def inspection_of(config: RunConfig) -> InspectOptions:
    """Return the options that inspect a dataset as a training command with this configuration would read it."""
    shared = {f.name: getattr(config.input, f.name) for f in fields(SourceConfig)}
    options = InspectOptions(data=config.data, resolution=config.input.resolution, input=SourceConfig(**shared))
    match config:
        case ClipConfig():
            tokenizer = TokenizerOptions(vocab_size=config.text.vocab_size, max_length=config.text.max_length)
            return replace(options, text=tokenizer)
        case LdmConfig():
            return replace(options, text_encoder=config.text_encoder, text_chunks=config.text_chunks)
        case _:
            return options
