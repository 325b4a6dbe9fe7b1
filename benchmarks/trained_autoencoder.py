"""Measure what a trained autoencoder of the Shapes dataset keeps: for the checker, in previews, and in tiles.

    python benchmarks/trained_autoencoder.py --model runs/demo/model

The images are those of the dataset, rendered here. Tiles are compared with decoding the whole at once. Half a minute
on one core.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.model import Autoencoder
from autoencoder.preview import fit_colours
from autoencoder.tiling import Tiles, tiled
from train.commands.main import command
from train.config.load import overlay
from train.data.synthetic.shapes import Split, example, render
from train.data.synthetic.shapes_checker import score_images
from train.evaluation.sheets import to_uint8

SIDE = 32


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure what an autoencoder of the Shapes dataset keeps."""

    model: str = "runs/demo/model"
    """Folder of the autoencoder, or of a model that contains it."""
    images: int = 1000
    """Number of held-out images of 32 pixels."""


def rendered(split: Split, count: int, side: int = SIDE) -> Tensor:
    """Return the dataset's first images, (n, 3, side, side) in [−1, 1]."""
    images = [render(scene, side, rng) for scene, rng in (example(0, split, k) for k in range(count))]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1) / 127.5 - 1


def decibels(a: Tensor, b: Tensor) -> float:
    """Return the PSNR of images in [−1, 1] by their mean squared difference."""
    return 10 * math.log10(4 / (a - b).double().square().mean().item())


def show_checker(autoencoder: Autoencoder, images: Tensor) -> None:
    scenes = [example(0, "test", k)[0] for k in range(len(images))]
    decoded = torch.cat([autoencoder.decode(autoencoder.encode(part).mean) for part in images.split(100)])
    for name, seen in (("original", images), ("reconstructed", decoded)):
        print(f"checker, {name} images: {score_images(list(to_uint8(seen)), scenes)['all']:.4f} all correct")


def show_previews(autoencoder: Autoencoder, fitted: Tensor, images: Tensor) -> None:
    """Compare maps that are fitted to training images, by the PSNR of reduced held-out images."""

    def small(pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, autoencoder.factor)

    def rows(pixels: Tensor) -> Tensor:  # latents and a one, (b h w, c + 1)
        z = autoencoder.encode(pixels).mean
        return torch.cat([z, torch.ones_like(z[:, :1])], 1).movedim(1, -1).flatten(0, -2).double()

    single = torch.linalg.lstsq(rows(fitted), small(fitted).movedim(1, -1).flatten(0, -2).double()).solution
    colours = fit_colours(autoencoder, fitted.split(128))
    target = small(images)
    maps = {
        "one constant colour": small(fitted).mean((0, 2, 3), keepdim=True).expand_as(target),
        "one latent": (rows(images) @ single).view(*target.movedim(1, -1).shape).movedim(-1, 1),
        "one latent and its neighbours": colours(autoencoder.encode(images).mean),
    }
    for name, preview in maps.items():
        print(f"preview, {name}: {decibels(preview, target):.1f} dB")


def show_tiles(autoencoder: Autoencoder) -> None:
    mosaic = rendered("test", 16).unflatten(0, (4, 4)).permute(2, 0, 3, 1, 4).reshape(1, 3, 4 * SIDE, -1)
    coarse = torch.randn(4, autoencoder.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, scale_factor=4, mode="bicubic")
    latents = {
        "mosaic of 16 images": autoencoder.encode(mosaic).mean,
        f"images of {4 * SIDE} pixels": autoencoder.encode(rendered("test", 4, 4 * SIDE)).mean,
        "smooth random latents": smooth / smooth.std(),
    }

    def image(z: Tensor) -> Tensor:
        return autoencoder.vae.decode(z / autoencoder.scale).sample

    decoder = autoencoder.vae.decoder
    for name, z in latents.items():
        whole = autoencoder.decode(z)
        for tiles in (Tiles(16, 8), Tiles(8, 4)):
            part = partial(tiled, image, z, tiles, up=autoencoder.factor)
            own, shared = decibels(part(), whole), decibels(part(network=decoder), whole)
            print(f"tiles of {tiles.side}, {name}: own statistics {own:.0f} dB, the whole image's {shared:.0f} dB")


@command
def main() -> None:
    o = overlay(Options, Options())
    autoencoder, images = Autoencoder.load(o.model), rendered("test", o.images)
    with torch.no_grad():
        show_checker(autoencoder, images)
        show_previews(autoencoder, rendered("train", 512), images)
        show_tiles(autoencoder)


if __name__ == "__main__":
    main()
