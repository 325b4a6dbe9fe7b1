"""Autoencoders of any size of image, and loading that refuses files which it can't interpret correctly."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from autoencoder.model import Autoencoder, build_autoencoder
from autoencoder.tiling import Tiles
from ldm.errors import UserError
from support.images import smooth_pixels
from support.models import uneven_vae


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="32"):
        build_autoencoder(channels=(48,), layers=1, latent_channels=4)


@torch.no_grad()
def test_images_of_any_size_go_through_in_tiles() -> None:
    vae = uneven_vae()
    for name, module in vae.named_modules():
        if name.endswith(".conv2"):
            module.weight.copy_(0.02 * torch.randn(module.weight.shape))  # so that no branch is zero
    x = nn.functional.interpolate(smooth_pixels(2), size=(45, 71), mode="bilinear")
    untiled, tiles = Autoencoder(vae), Autoencoder(vae, Tiles(12, 6))
    posterior, tiled = untiled.encode(x), tiles.encode(x)
    assert posterior.mean.shape == tiled.mean.shape == (2, 4, 23, 36)
    for a, b in zip(tiled, posterior, strict=True):
        assert (a - b).square().mean() < 2e-2 * b.var()
    made, again = untiled.decode(posterior.mean), tiles.decode(posterior.mean)
    assert made.shape == (2, 3, 46, 72)
    assert (made - again).square().mean() < 1e-2 * made.var()
    # Images that have the right size aren't padded.
    torch.testing.assert_close(
        untiled.encode(x[..., :44, :70]).mean, vae.encode(x[..., :44, :70]).latent_dist.mean * untiled.scale
    )


def test_loading_errors_name_the_problem(tmp_path) -> None:
    with pytest.raises(UserError, match=r"contains no autoencoder: .*config\.json"):
        Autoencoder.load(tmp_path)
    with pytest.raises(UserError, match="no autoencoder at 'runs/no/such/model'"):
        Autoencoder.load("runs/no/such/model")
    shifted = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, shift_factor=0.1)
    shifted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="shift_factor"):
        Autoencoder.load(tmp_path)


def test_the_digest_follows_the_weights() -> None:
    vae = uneven_vae()
    before = Autoencoder(vae).digest
    assert Autoencoder(vae).digest == before
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-7
    assert Autoencoder(vae).digest != before
