"""The KL autoencoder (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1)."""

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from autoencoder.preview import Colours
from autoencoder.tiling import Tiles, pad_to_multiple, tiled
from ldm.errors import UserError
from ldm.formats.hub import WEIGHTS, fetch, is_hub_id, load_network, model_folder
from ldm.libraries import AutoencoderKL

SCALING_FACTOR = 0.18215  # diffusers' default, hard-coded elsewhere
_FIRST_LOGVAR = -6.0  # log variance of the posterior before training, a standard deviation of 0.05


def build_autoencoder(
    *,
    channels: Sequence[int],
    layers: int,
    latent_channels: int,
    groups: int = 32,
    attention: bool = True,
    resolution: int = 32,
) -> AutoencoderKL:
    """Build an AutoencoderKL with random weights. A latent's sides are 2^(levels − 1) times shorter than the image's.

    Raises UserError if `groups` doesn't divide a level's channels.
    """
    if indivisible := [c for c in channels if c % groups]:
        raise UserError(
            f"model.groups {groups} doesn't divide {indivisible} of model.channels: choose a common divisor"
        )
    levels = len(channels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(channels),
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        mid_block_add_attention=attention,
        sample_size=resolution,
        scaling_factor=SCALING_FACTOR,
    )
    # Every residual branch starts at zero and the posterior is narrow. With diffusers' initial values, the first
    # thousand steps only remove noise (comparison in docs/LOG.md).
    for name, module in vae.named_modules():
        if name.endswith((".conv2", ".to_out.0")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        vae.quant_conv.weight[latent_channels:] *= 0.1
        vae.quant_conv.bias[latent_channels:] = _FIRST_LOGVAR
    return vae


def digest(module: nn.Module, about: str = "") -> str:
    """Return a hash of a network's weights and of the text `about`."""
    total = hashlib.sha256(about.encode())
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Posterior(NamedTuple):
    """The autoencoder's posterior q(z | x), a diagonal Gaussian over latents."""

    mean: Tensor  # (b, c, h, w)
    std: Tensor  # (b, c, h, w)

    def sample(self, noise: Tensor) -> Tensor:
        """Return mean + std × noise, where noise has the mean's shape."""
        return self.mean + self.std * noise


class Encoder(nn.Module):
    """The encoder's half of an AutoencoderKL, from images to the posterior's mean and std, (b, 2c, h, w)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        q = self.vae.encode(pixels).latent_dist
        return torch.cat([q.mean, q.std], 1)


class Decoder(nn.Module):
    """The decoder's half of an AutoencoderKL, from latents to images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample


class Halves(NamedTuple):
    """Functions to call instead of the two halves."""

    encoder: Callable[[Tensor], Tensor]
    decoder: Callable[[Tensor], Tensor]


class LastLayer(NamedTuple):
    """The encoder's last layer, a 1×1 convolution or none, which gives the posterior of normalised latents."""

    layer: nn.Module
    scale: float

    @torch.no_grad()
    def __call__(self, hidden: Tensor) -> Posterior:
        mean, logvar = self.layer(hidden).chunk(2, 1)
        std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))  # as diffusers does
        return Posterior(mean * self.scale, std * self.scale)


class Autoencoder:
    """An AutoencoderKL with the interface for diffusion: normalised latents, images in [−1, 1].

    `encode` returns the posterior already multiplied by the scaling factor; `decode` takes such latents. With `tiles`,
    images larger than a tile are encoded and decoded tile by tile, in the memory of one (autoencoder/tiling.py).
    `colours` previews latents without decoding them (autoencoder/preview.py); None if they haven't been fitted.
    """

    def __init__(self, vae: AutoencoderKL, tiles: Tiles | None = None) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.tiles = tiles
        self.colours: Colours | None = None
        self.compiled: Halves | None = None
        """Compiled halves, which run instead of the network's own; None: not compiled."""
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)  # pixels per latent and side
        self.latent_channels: int = vae.config.latent_channels
        self.scale: float = vae.config.scaling_factor
        if not (isinstance(self.scale, int | float) and 0 < self.scale < math.inf):
            raise UserError(f"the autoencoder's scaling_factor {self.scale!r}: must be a number above 0")

    @classmethod
    def load(cls, where: str | Path) -> Self:
        """Read a folder (an AutoencoderKL, a pipeline with `vae/` in it, or a run) or a hub id; safetensors only."""
        where = model_folder(where)
        folder = Path(where)
        if not folder.is_dir():
            if not is_hub_id(str(where)):
                raise UserError(
                    f"no autoencoder at {str(where)!r}: give the model/ folder of a train_vae run, or a hub id"
                )
            files = [part + file for part in ("", "vae/") for file in ("config.json", "preview.json")]
            folder = fetch(str(where), files, {"": WEIGHTS, "vae/": WEIGHTS})
        folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise UserError(f"{str(where)!r} contains no autoencoder: must contain config.json or vae/config.json")
        vae: AutoencoderKL = load_network(AutoencoderKL, folder, f"an autoencoder from {str(where)!r}", _try)
        if vae.config.get("shift_factor") or vae.config.get("latents_mean"):
            raise UserError(
                f"the autoencoder at {str(where)!r} sets shift_factor or latents_mean, which diffusers' own "
                "pipelines ignore: use one that sets only scaling_factor"
            )
        autoencoder = cls(vae)
        autoencoder.colours = Colours.load(folder, autoencoder.latent_channels)
        return autoencoder

    def save(self, folder: str | Path) -> None:
        """Write the weights, config.json and, if there are colours, preview.json."""
        self.vae.save_pretrained(str(folder), safe_serialization=True)
        if self.colours is not None:
            self.colours.save(folder)

    @property
    def digest(self) -> str:
        """Hash of the weights and the scaling factor, equal if and only if the latents are equal."""
        return digest(self.vae, repr(self.scale))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Posterior:
        """Encode images (b, 3, H, W) in [−1, 1] to the posterior of normalised latents.

        Its mean and std are (b, c, ⌈H / f⌉, ⌈W / f⌉). If a side isn't a multiple of the factor f, the last row or
        column is repeated up to the next multiple.
        """
        pixels = pad_to_multiple(pixels, self.factor).to(self.vae.device, self.vae.dtype)

        moments = Encoder(self.vae) if self.compiled is None else self.compiled.encoder
        t, f = self.tiles, self.factor
        found = moments(pixels) if t is None else tiled(moments, pixels, t, down=f, network=self.vae.encoder)
        mean, std = found.chunk(2, 1)
        return Posterior(mean * self.scale, std * self.scale)

    @property
    def encoder_digest(self) -> str:
        """Hash of the encoder's weights without its last layer, `quant_conv`, which normalisation changes."""
        return digest(self.vae.encoder)

    @torch.no_grad()
    def hidden(self, pixels: Tensor) -> Tensor:
        """Return the encoder's outputs before its last layer, (b, 2c, h, w), for images as in `encode`."""
        return self.vae.encoder(pad_to_multiple(pixels, self.factor).to(self.vae.device, self.vae.dtype))

    def last_layer(self) -> "LastLayer":
        """Return the function from outputs of `hidden` to the posterior, in fp32 on the CPU."""
        return LastLayer(copy.deepcopy(self.vae.quant_conv or nn.Identity()).float().cpu(), self.scale)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (b, c, h, w) to float32 images (b, 3, H, W), not clipped."""
        z = latents.to(self.vae.device, self.vae.dtype) / self.scale

        decoder = Decoder(self.vae) if self.compiled is None else self.compiled.decoder
        t, f = self.tiles, self.factor
        return (decoder(z) if t is None else tiled(decoder, z, t, up=f, network=self.vae.decoder)).float()


def _try(vae: AutoencoderKL) -> None:
    """Encode and decode a small image. Raises ValueError if the sizes aren't those expected."""
    side = 2 ** len(vae.config.block_out_channels)  # twice the factor
    moments = vae.encode(torch.empty(1, 3, side, side)).latent_dist.parameters
    decoded = vae.decode(moments[:, : vae.config.latent_channels]).sample
    if (moments.shape[2], *decoded.shape[1:]) != (2, 3, side, side):
        raise ValueError(
            f"its config.json gives latents of {tuple(moments.shape[2:])} and an image of {tuple(decoded.shape[1:])} "
            f"for an image of {(3, side, side)}"
        )
