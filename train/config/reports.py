"""What the commands that measure and report are told."""

import os
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from train.config.data import SourceConfig
from train.config.sampling import SamplingOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(SamplingOptions):
    """Measure a model: reconstruction and likelihood of held-out pictures and, on a Shapes set, whether pictures fit their prompts."""

    model: str = ""
    """Folder of the model, e.g. runs/ldm/model."""
    data: str = ""
    """Captioned pictures, as for training."""
    split: Literal["test", "train"] = "test"
    """Which part of them; without a split of its own, the held-out share is the test part."""
    out: str = "report"
    """Folder for report.json and samples.png."""
    prompts: int = 256
    """Shapes prompts of each kind, seen and unseen."""
    pictures: int = 1000
    """Pictures that are reconstructed, at most."""
    likelihoods: int = 128
    """Pictures whose latents the variational bound is worked out for, at most; 33 evaluations of the network each."""
    seed: int = 0
    """Of the prompts and of the noise."""
    batch_size: int = 64
    """Pictures painted at once."""
    device: str = ""
    """Device, e.g. cpu or cuda:1; empty: the GPU if there is one."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """How the pictures are found."""


@dataclass(frozen=True, kw_only=True)
class EvaluateVaeOptions:
    """Measure an autoencoder: reconstructions of pictures, and the health of its latents."""

    vae: str = ""
    """Folder (or hub id) of an AutoencoderKL, or of a pipeline, e.g. runs/vae/model."""
    data: str = ""
    """Pictures, as for training, with captions or without."""
    split: Literal["test", "train"] = "test"
    """Which part of them; without a split of its own, the held-out share is the test part."""
    resolution: int = 256
    """Side of the square pictures, a multiple of the autoencoder's factor."""
    pictures: int = 1000
    """Pictures measured, at most."""
    perceptual: Literal["none", "lpips_vgg", "lpips_alex", "clip"] = "none"
    """Perceptual distance to measure."""
    perceptual_model: str = ""
    """Its weights, as `perceptual.model` of stage 1."""
    tile: Annotated[int | None, tyro.conf.arg(metavar="LATENTS")] = None
    """Encode and decode in overlapping tiles of this side, for large pictures in little memory; whole unless given."""
    features: str = ""
    """Of the Fréchet distance: `inception`, `dinov2`, `clip`, or a folder or hub id; empty: not measured."""
    out: str = "report-vae"
    """Folder for report.json and reconstructions.png."""
    seed: int = 0
    """Of the noise."""
    batch_size: int = 16
    """Pictures at once."""
    device: str = ""
    """Device, e.g. cpu or cuda:1; empty: the GPU if there is one."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """How the pictures are found."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Look at pictures and captions before training on them."""

    data: str = ""
    """Pictures, as for training, with captions or without."""
    split: Literal["all", "train", "test"] = "all"
    """Which part of them; without a split of its own, the held-out share is the test part."""
    resolution: int = 256
    """Side of the pictures that are to be trained on; how many are smaller is told."""
    text_encoder: str = ""
    """Whose tokenizer counts the captions' tokens: a folder, a hub id or openclip:…; empty: the one that stage 0 would learn
    from these captions."""
    limit: int = 0
    """Pictures looked at, at most, spread evenly; 0: all."""
    out: str = "report-data"
    """Folder for report.json, contact_sheet.png and, where there is something to list, damaged.jsonl and duplicates.jsonl."""
    workers: int = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    """Processes that decode; 0 decodes in this one."""
    input: SourceConfig = field(default_factory=SourceConfig)
    """How the pictures are found."""
