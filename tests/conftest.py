"""Small models and data that several tests share."""

from pathlib import Path

import pytest
import torch

from autoencoder.model import Autoencoder, build_autoencoder
from conditioning.clip import ClipTextEncoder
from conditioning.contrastive import build_clip, save_clip
from conditioning.tokenizer import train_tokenizer
from ldm.formats.scheduler_config import Process
from ldm.networks.unet import build_unet, widen
from ldm.pipeline import LatentDiffusionPipeline
from ldm.schedule import Schedule
from train.data.synthetic.shapes import prompts, write_shapes

torch.set_num_threads(1)  # tests run side by side


def tiny_pipeline(
    target: str = "v",
    spacing: str = "trailing",
    schedule: str = "scaled_linear",
    variance: str = "fixed_small",
    inpaints: bool = False,
    **process: float,
) -> LatentDiffusionPipeline:
    """Random weights, but none of them zero: every part of the network speaks."""
    torch.manual_seed(0)
    captions = [scene.caption for scene in prompts("seen", 60, 0)]
    tokenizer = train_tokenizer(captions, 700, 16)
    clip = build_clip(
        tokenizer,
        text_width=32,
        text_layers=2,
        text_heads=2,
        vision_width=32,
        vision_layers=1,
        vision_heads=2,
        patch_size=8,
        image_size=32,
        projection_dim=32,
    )
    vae = build_autoencoder(channels=(16, 32), layers=1, latent_channels=4, groups=8, attention=False)
    unet = build_unet(
        channels=(32, 64),
        layers=1,
        attention=(True, True),
        heads=(2, 4),
        groups=16,
        latent_channels=4,
        latent_size=16,
        text_width=32,
        learned_variance=variance == "learned",
    )
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    if inpaints:
        widen(unet, 9)
        torch.nn.init.normal_(unet.conv_in.weight[:, 4:].detach(), std=0.1, generator=generator)
    return LatentDiffusionPipeline(
        unet.eval().requires_grad_(False),
        Autoencoder(vae),
        ClipTextEncoder(clip.text_model, tokenizer),
        Process(schedule=Schedule.build(schedule, **process), target=target, spacing=spacing, variance=variance),
    )


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Shapes dataset of 64 training and 24 test images."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(folder, 32, 64, 24, 0)
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a CLIP with random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red star"], 600, 8)
    clip = build_clip(
        tokenizer,
        text_width=16,
        text_layers=1,
        text_heads=2,
        vision_width=16,
        vision_layers=2,
        vision_heads=2,
        patch_size=8,
        image_size=16,
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("clip")
    save_clip(clip, tokenizer, folder)
    return folder
