"""Small models with random weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from autoencoder.model import Autoencoder, build_autoencoder
from conditioning.clip import ClipTextEncoder
from conditioning.contrastive import build_clip, save_clip
from conditioning.tokenizer import train_tokenizer
from ldm.formats.scheduler_config import Process
from ldm.networks.unet import build_unet, widen
from ldm.pipeline import LatentDiffusionPipeline
from ldm.schedule import Schedule
from train.data.synthetic.shapes import prompts

PROMPTS = ["a small red star on a blue background", "a large green circle"]
"""Captions of Shapes images, whose words are tokens of tiny_pipeline."""


def small_clip_model(tokenizer: CLIPTokenizer, **change: int) -> CLIPModel:
    """Build a CLIP; `change` replaces arguments of build_clip."""
    shape = {
        "text_width": 32,
        "text_layers": 2,
        "text_heads": 2,
        "vision_width": 32,
        "vision_layers": 1,
        "vision_heads": 2,
        "patch_size": 8,
        "image_size": 16,
        "projection_dim": 16,
    }
    return build_clip(tokenizer, **shape | change)


def small_unet(std: float = 0.05, **change: Any) -> UNet2DConditionModel:
    """Build a UNet in which no weight is zero, so that every layer counts.

    `change` replaces arguments of build_unet.
    """
    shape: dict[str, Any] = {
        "channels": (32, 64),
        "layers": 1,
        "attention": (True, True),
        "heads": (2, 4),
        "groups": 16,
        "latent_channels": 4,
        "latent_size": 16,
        "text_width": 32,
    }
    unet = build_unet(**shape | change)
    generator = torch.Generator().manual_seed(1)
    for weight in unet.parameters():
        if not weight.detach().any():
            nn.init.normal_(weight, std=std, generator=generator)
    return unet


def small_vae() -> AutoencoderKL:
    """Build an autoencoder of factor 2 in which no weight is zero."""
    torch.manual_seed(0)
    vae = build_autoencoder(channels=(8, 16), layers=1, latent_channels=4, groups=2, attention=False)
    with torch.no_grad():
        for weight in vae.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    return vae


def uneven_vae() -> AutoencoderKL:
    """Build an autoencoder whose latents are far from normalised, differently in each channel."""
    torch.manual_seed(0)
    vae = build_autoencoder(channels=(16, 32), layers=1, latent_channels=4, groups=8, attention=True)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= torch.tensor([1.0, 30.0, 0.2, 5.0]).view(4, 1, 1, 1)
        vae.quant_conv.bias[:4] = torch.tensor([0.0, 3.0, -7.0, 0.5])
        vae.quant_conv.bias[4:] = torch.tensor([-8.0, -2.0, -9.0, -4.0])
    return vae.eval()


def small_autoencoder() -> Autoencoder:
    return Autoencoder(small_vae())


def tiny_pipeline(
    target: str = "v",
    spacing: str = "trailing",
    schedule: str = "scaled_linear",
    variance: str = "fixed_small",
    inpaints: bool = False,
    **process: float,
) -> LatentDiffusionPipeline:
    """Build a pipeline for images of 32 × 32 whose UNet has no weight that is zero."""
    torch.manual_seed(0)
    captions = [scene.caption for scene in prompts("seen", 60, 0)]
    tokenizer = train_tokenizer(captions, 700, 16)
    clip = small_clip_model(tokenizer, image_size=32, projection_dim=32)
    vae = build_autoencoder(channels=(16, 32), layers=1, latent_channels=4, groups=8, attention=False)
    unet = small_unet(learned_variance=variance == "learned")
    if inpaints:
        widen(unet, 9)
        generator = torch.Generator().manual_seed(2)
        nn.init.normal_(unet.conv_in.weight[:, 4:].detach(), std=0.1, generator=generator)
    return LatentDiffusionPipeline(
        unet.eval().requires_grad_(False),
        Autoencoder(vae),
        ClipTextEncoder(clip.text_model, tokenizer),
        Process(schedule=Schedule.build(schedule, **process), target=target, spacing=spacing, variance=variance),
    )


def distilled_pipeline() -> LatentDiffusionPipeline:
    """Build a consistency model that reads its guidance scale, all its weights random."""
    pipe = tiny_pipeline("eps")
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 32, "_use_default_values": []})
    unet.load_state_dict(pipe.unet.state_dict(), strict=False)
    nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.5, generator=torch.Generator().manual_seed(0))
    process = replace(pipe.process, solver_steps=50)
    return LatentDiffusionPipeline(unet.eval(), pipe.autoencoder, pipe.text_encoder, process)


def save_models(folder: Path) -> None:
    """Write a pipeline, model/, the same as a single file, single.safetensors, and a CLIP, clip/."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "model")
    pipe.save_single_file(folder / "single.safetensors")
    torch.manual_seed(0)
    tokenizer = pipe.text_encoder.tokenizer
    save_clip(small_clip_model(tokenizer), tokenizer, folder / "clip")
