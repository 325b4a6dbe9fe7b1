"""The options of the commands that measure and write a report."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from train.config.data import SourceConfig
from train.config.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SamplingOptions):
    """Measure a model: reconstruction and likelihood of held-out images; on Shapes, also prompt accuracy."""

    model: str = ""
    """Folder of the model, e.g. runs/ldm/model."""
    data: str = ""
    """Captioned images, as for training."""
    split: Literal["test", "train"] = "test"
    """Split to use; if the dataset has no validation split, `test` is the held-out share."""
    out: str = "report"
    """Folder for report.json and samples.png."""
    prompts: int = 256
    """Number of Shapes prompts of each kind (seen and unseen)."""
    images: int = 1000
    """Largest number of images to reconstruct."""
    likelihoods: int = 128
    """Largest number of images whose variational bound is computed; each takes 33 network evaluations."""
    seed: int = 0
    """Seed of the prompts and of the noise."""
    batch_size: int = 64
    """Images processed at once."""
    device: str = ""
    """Device, e.g. cpu or cuda:1; empty: the GPU if there is one."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """Settings that locate and decode the images."""


@dataclass(frozen=True, kw_only=True)
class EvaluateVaeOptions:
    """Measure an autoencoder: its reconstructions and the statistics of its latents."""

    vae: str = ""
    """Folder (or hub id) of an AutoencoderKL, or of a pipeline, e.g. runs/vae/model."""
    data: str = ""
    """Images, as for training, with or without captions."""
    split: Literal["test", "train"] = "test"
    """Split to use; if the dataset has no validation split, `test` is the held-out share."""
    resolution: int = 256
    """Side of the square images, a multiple of the autoencoder's factor."""
    images: int = 1000
    """Largest number of images to measure."""
    perceptual: Literal["none", "lpips_vgg", "lpips_alex", "clip"] = "none"
    """Perceptual distance to measure."""
    perceptual_model: str = ""
    """Weights of the perceptual distance, as in `perceptual.model` of stage 1."""
    tile: Annotated[int | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Side of overlapping tiles for encoding and decoding; tiles save memory for large images. Default: no tiles."""
    features: str = ""
    """Features of the Fréchet distance: `inception`, `dinov2`, `clip`, or a folder or hub id; empty: not measured."""
    out: str = "report-vae"
    """Folder for report.json and reconstructions.png."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 16
    """Images processed at once."""
    device: str = ""
    """Device, e.g. cpu or cuda:1; empty: the GPU if there is one."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """Settings that locate and decode the images."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Inspect images and captions before training on them."""

    data: str = ""
    """Images, as for training, with or without captions."""
    split: Literal["all", "train", "test"] = "all"
    """Split to use; if the dataset has no validation split, `test` is the held-out share."""
    resolution: int = 256
    """Side of the intended training images; the report counts the images that are smaller."""
    text_encoder: str = ""
    """Text encoder whose tokenizer counts the captions' tokens: a folder, a hub id or openclip:…; empty: the one
    that stage 0 would learn from these captions."""
    limit: int = 0
    """Largest number of images to inspect, spread evenly over the dataset; 0: all."""
    out: str = "report-data"
    """Folder for report.json, contact_sheet.png and, unless they would be empty, damaged.jsonl and duplicates.jsonl."""
    workers: int = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    """Number of decoding processes; 0 decodes in the main process."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """Settings that locate and decode the images."""
