"""Folding normalises latents exactly, and loading refuses files that it can't interpret correctly."""

import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from autoencoder.model import Autoencoder, Posterior, build_autoencoder, fold, latent_statistics, latent_sums, measure
from autoencoder.tiling import Tiles
from ldm.errors import UserError
from support.images import smooth_pixels


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    vae = build_autoencoder(channels=(16, 32), layers=1, latent_channels=4, groups=8, attention=True)
    # Latents are far from normalised, differently in each channel.
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= torch.tensor([1.0, 30.0, 0.2, 5.0]).view(4, 1, 1, 1)
        vae.quant_conv.bias[:4] = torch.tensor([0.0, 3.0, -7.0, 0.5])
        vae.quant_conv.bias[4:] = torch.tensor([-8.0, -2.0, -9.0, -4.0])
    return vae.eval()


@torch.no_grad()
def test_folding_is_an_exact_change_of_coordinates() -> None:
    vae, x = small_vae().double(), smooth_pixels(16).double()
    before = vae.encode(x).latent_dist
    z = before.mean + before.std * torch.randn(before.mean.shape, generator=torch.Generator().manual_seed(1)).double()
    decoded = vae.decode(z).sample
    mean, std = torch.tensor([0.1, -2.0, 3.0, 0.0]).double(), torch.tensor([2.0, 0.01, 7.0, 1.0]).double()
    fold(vae, mean, std)
    after, c = vae.encode(x).latent_dist, Autoencoder(vae)
    m, s = mean.view(1, 4, 1, 1), std.view(1, 4, 1, 1)
    torch.testing.assert_close(after.mean * c.scale, (before.mean - m) / s, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.std * c.scale, before.std / s, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vae.decode((z - m) / s / c.scale).sample, decoded, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("factor", [4, 8, 16])
@pytest.mark.parametrize("latent_channels", [4, 8, 16])
def test_shapes_of_latents(factor: int, latent_channels: int) -> None:
    """Every factor and number of channels: the latents' size, a gradient for every weight, and exact folding."""
    channels = (8,) * factor.bit_length()
    torch.manual_seed(0)
    vae = build_autoencoder(channels=channels, layers=1, latent_channels=latent_channels, groups=4, attention=False)
    x = smooth_pixels(2)
    q = vae.encode(x).latent_dist
    assert q.mean.shape == (2, latent_channels, 32 // factor, 32 // factor)
    made = vae.decode(q.mean + q.std).sample
    assert made.shape == x.shape
    made.square().mean().backward()
    assert all(p.grad is not None for p in vae.parameters())
    mean, std = torch.randn(latent_channels), torch.rand(latent_channels) + 0.1
    fold(vae, mean, std)
    again = vae.encode(x).latent_dist
    s = std.view(-1, 1, 1) * vae.config.scaling_factor
    torch.testing.assert_close(again.mean * s + mean.view(-1, 1, 1), q.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(again.mean + again.std).sample, made, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_measured_statistics_make_posterior_samples_standard() -> None:
    vae, x = small_vae(), smooth_pixels(256)
    noise = torch.randn(256, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    batches = list(zip(x.split(64), noise.split(64), strict=True))
    statistics = latent_statistics(measure(vae, batches, 4))
    fold(vae, statistics.mean, statistics.std)
    z = Autoencoder(vae).encode(x).sample(noise)
    assert vae.config.scaling_factor == 0.18215
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)


def test_sums_add_up_over_any_split() -> None:
    g = torch.Generator().manual_seed(0)
    q = Posterior(torch.randn(12, 3, 4, 4, generator=g), torch.rand(12, 3, 4, 4, generator=g))
    noise = torch.randn(12, 3, 4, 4, generator=g)
    parts = [latent_sums(Posterior(q.mean[a:b], q.std[a:b]), noise[a:b]) for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(parts[0] + parts[1], latent_sums(q, noise))
    statistics = latent_statistics(latent_sums(q, noise))
    z = q.sample(noise).double()
    torch.testing.assert_close(statistics.mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(statistics.std, z.std((0, 2, 3), unbiased=False))


def test_channels_without_information_are_reported_and_floored() -> None:
    g = torch.Generator().manual_seed(0)
    mean = torch.randn(64, 3, 4, 4, generator=g)
    std = torch.full_like(mean, 0.1)
    mean[:, 1] = 0.0  # a collapsed posterior, which is only noise
    std[:, 1] = 1.0
    mean[:, 2], std[:, 2] = 5.0, 1e-9  # a constant
    statistics = latent_statistics(latent_sums(Posterior(mean, std), torch.randn(mean.shape, generator=g)))
    assert statistics.dead == [1, 2]
    assert statistics.std[2] == pytest.approx(1e-3 * float(statistics.std.max()), rel=1e-6)


def test_an_autoencoder_without_quant_convolutions_is_refused() -> None:
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=8, latent_channels=4, use_quant_conv=False, use_post_quant_conv=False
    )
    with pytest.raises(UserError, match="quant"):
        fold(vae, torch.zeros(4), torch.ones(4))


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match="32"):
        build_autoencoder(channels=(48,), layers=1, latent_channels=4)


@torch.no_grad()
def test_images_of_any_size_go_through_in_tiles() -> None:
    vae = small_vae()
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
    vae = small_vae()
    before = Autoencoder(vae).digest
    assert Autoencoder(vae).digest == before
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-7
    assert Autoencoder(vae).digest != before
