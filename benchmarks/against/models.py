"""Models of the measured shapes, with random weights: speed doesn't depend on their values."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torchvision.models import vgg16

from autoencoder.model import Autoencoder, build_autoencoder
from conditioning.clip import ClipTextEncoder
from conditioning.contrastive import build_clip
from conditioning.tokenizer import train_tokenizer
from ldm.formats.scheduler_config import Process
from ldm.pipeline import LatentDiffusionPipeline
from ldm.schedule import Schedule
from train.config.ldm import UnetConfig
from train.data.synthetic.shapes import prompts, write_shapes


@dataclass(frozen=True)
class Shape:
    """Sizes of a model's networks."""

    unet: UnetConfig
    side: int
    """Side of the latents."""
    tokens: int
    width: int
    """Width of the text features."""
    text_layers: int
    text_heads: int
    vae_channels: tuple[int, ...]
    vae_layers: int
    vae_groups: int
    vae_attention: bool

    @property
    def factor(self) -> int:
        """Number of pixels per latent, along each side."""
        return 2 ** (len(self.vae_channels) - 1)


_SD_VAE: dict[str, Any] = {
    "vae_channels": (128, 256, 512, 512),
    "vae_layers": 2,
    "vae_groups": 32,
    "vae_attention": True,
}
_SD_UNET: dict[str, Any] = {"channels": (320, 640, 1280, 1280), "layers": 2, "attention": (True, True, True, False)}
SHAPES = {
    "demo": Shape(
        UnetConfig(channels=(64, 128), attention=(False, True), heads=(4, 4)),
        8,
        16,
        96,
        3,
        4,
        (32, 64, 64),
        1,
        16,
        False,
    ),
    "sd15": Shape(UnetConfig(**_SD_UNET, heads=(8, 8, 8, 8)), 64, 77, 768, 12, 12, **_SD_VAE),
    "sd2": Shape(
        UnetConfig(**_SD_UNET, heads=(5, 10, 20, 20), linear_projections=True),
        64,
        77,
        1024,
        23,
        16,
        **_SD_VAE,
    ),
    "tiny": Shape(
        UnetConfig(channels=(32, 32), attention=(False, True), heads=(2, 2)),
        8,
        16,
        32,
        1,
        2,
        (16, 16, 16),
        1,
        16,
        False,
    ),
}


def autoencoder(shape: Shape) -> Autoencoder:
    vae = build_autoencoder(
        channels=shape.vae_channels,
        layers=shape.vae_layers,
        latent_channels=4,
        groups=shape.vae_groups,
        attention=shape.vae_attention,
    )
    return Autoencoder(vae)


def text_encoder(shape: Shape) -> ClipTextEncoder:
    tokenizer = train_tokenizer([scene.caption for scene in prompts("seen", 64, 0)], 700, shape.tokens)
    clip = build_clip(
        tokenizer,
        text_width=shape.width,
        text_layers=shape.text_layers,
        text_heads=shape.text_heads,
        vision_width=16,
        vision_layers=1,
        vision_heads=2,
        patch_size=8,
        image_size=16,
        projection_dim=16,
    )
    return ClipTextEncoder(clip.text_model, tokenizer)


def pipeline_folder(name: str, work: Path) -> Path:
    """Return the folder of a pipeline of this shape; written on the first call, in bf16 if it is large."""
    folder, shape = work / name, SHAPES[name]
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        unet = shape.unet.build(latent_channels=4, latent_size=shape.side, text_width=shape.width)
    for parameter in unet.parameters():  # layers that start at zero would hide errors
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.02)
    process = Process(
        schedule=Schedule.build("scaled_linear"), target="eps", spacing="trailing", variance="fixed_small"
    )
    pipe = LatentDiffusionPipeline(unet.eval(), autoencoder(shape), text_encoder(shape), process)
    pipe.to("cpu", dtype=torch.bfloat16 if shape.side > 8 else torch.float32).save_pretrained(folder)
    return folder


def training_inputs(name: str, work: Path, images: int, side: int = 0) -> dict[str, str]:
    """Return the folders that training needs: data, autoencoder, text encoder, and VGG's weights for LPIPS.

    side: of the images; 0: that of the shape.
    """
    shape = SHAPES[name]
    side = side or shape.side * shape.factor
    folder = work / f"{name}-{side}-inputs"
    if not (folder / "vgg.safetensors").exists():
        torch.manual_seed(0)
        write_shapes(folder / "data", side, images, 8, 0)
        autoencoder(shape).save(folder / "vae")
        text_encoder(shape).save(folder / "clip")
        state = vgg16().features.state_dict()
        save_file({f"features.{key}": value for key, value in state.items()}, folder / "vgg.safetensors")
    return {part: str(folder / part) for part in ("data", "vae", "clip", "vgg.safetensors")}
