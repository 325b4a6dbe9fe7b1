"""Folding normalises latents exactly, and the measured sensitivity equals that of the decoder's Jacobian."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from autoencoder.model import Autoencoder, Posterior, build_autoencoder
from autoencoder.normalisation import (
    LatentStatistics,
    by_channels,
    by_pixels,
    fold,
    latent_statistics,
    latent_sums,
    measure,
    sensitivity,
)
from ldm.errors import UserError
from support.images import smooth_pixels
from support.models import small_vae, uneven_vae


def statistics(mean: Tensor, log_variance: Tensor | None = None, covariance: Tensor | None = None) -> LatentStatistics:
    c = len(mean)
    return LatentStatistics(
        mean=mean,
        covariance=torch.eye(c) if covariance is None else covariance,
        log_variance=torch.zeros(c) if log_variance is None else log_variance,
        signal=torch.ones(c),
    )


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- folding ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("diagonal", [True, False])
def test_folding_is_an_exact_change_of_coordinates(diagonal: bool) -> None:
    vae, x = uneven_vae().double(), smooth_pixels(16).double()
    before = vae.encode(x).latent_dist
    z = before.mean + before.std * normal(*before.mean.shape, seed=1).double()
    decoded = vae.decode(z).sample
    mean = torch.tensor([0.1, -2.0, 3.0, 0.0]).double()
    matrix = torch.diag(torch.tensor([0.5, 100.0, 0.15, 1.0]).double()) if diagonal else normal(4, 4).double()
    fold(vae, statistics(mean), matrix)
    after, c = vae.encode(x).latent_dist, Autoencoder(vae)

    def mapped(z: Tensor) -> Tensor:
        return torch.einsum("ij,bjhw->bihw", matrix, z - mean.view(1, 4, 1, 1))

    torch.testing.assert_close(after.mean * c.scale, mapped(before.mean), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(vae.decode(mapped(z) / c.scale).sample, decoded, rtol=1e-9, atol=1e-9)
    if diagonal:
        s = matrix.diagonal().view(1, 4, 1, 1)
        torch.testing.assert_close(after.std * c.scale, before.std * s, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_posterior_of_mixed_channels_has_the_variances_of_the_mixture() -> None:
    """diag(M Σ Mᵀ), exactly where the log variances are their means and else to second order."""
    vae, x = uneven_vae().double(), smooth_pixels(16).double()
    matrix = normal(4, 4, seed=2).double()
    errors = []
    for spread in (0.0, 0.01, 0.02):
        each = copy.deepcopy(vae)
        each.quant_conv.weight[4:] *= spread
        before = each.encode(x).latent_dist
        fold(each, statistics(torch.zeros(4), before.logvar.mean((0, 2, 3))), matrix)
        expected = torch.einsum("ij,bjhw->bihw", matrix**2, before.var).log()
        found = each.encode(x).latent_dist.logvar + 2 * math.log(0.18215)
        errors.append(float((found - expected).abs().max()))
    assert errors[0] < 1e-9
    assert errors[2] == pytest.approx(4 * errors[1], rel=0.1)
    assert 0 < errors[2] < 1e-3


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
    fold(vae, statistics(mean), torch.diag(1 / std))
    again = vae.encode(x).latent_dist
    s = std.view(-1, 1, 1) * vae.config.scaling_factor
    torch.testing.assert_close(again.mean * s + mean.view(-1, 1, 1), q.mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(again.mean + again.std).sample, made, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_without_quant_convolutions_is_refused() -> None:
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=8, latent_channels=4, use_quant_conv=False, use_post_quant_conv=False
    )
    with pytest.raises(UserError, match="quant"):
        fold(vae, statistics(torch.zeros(4)), torch.eye(4))


# -- statistics ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("by", ["channels", "pixels"])
def test_measured_statistics_make_posterior_samples_standard(by: str) -> None:
    """Mean 0, and variance 1 in each channel or on average over channels."""
    vae, x = uneven_vae(), smooth_pixels(256)
    noise = normal(256, 4, 16, 16, seed=2)
    batches = list(zip(x.split(64), noise.split(64), strict=True))
    found = latent_statistics(measure(vae, batches, 4))
    matrix = by_channels(found) if by == "channels" else by_pixels(found, sensitivity(vae, batches[:1], found.std))
    fold(vae, found, matrix)
    z = Autoencoder(vae).encode(x).sample(noise)
    assert vae.config.scaling_factor == 0.18215
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    variance = z.var((0, 2, 3)) if by == "channels" else z.var((0, 2, 3)).mean()
    torch.testing.assert_close(variance, torch.ones_like(variance), atol=2e-3 if by == "channels" else 5e-2, rtol=0)


def test_sums_add_up_over_any_split() -> None:
    q = Posterior(normal(12, 3, 4, 4, seed=1), normal(12, 3, 4, 4, seed=2).abs())
    noise = normal(12, 3, 4, 4, seed=3)
    parts = [latent_sums(Posterior(q.mean[a:b], q.std[a:b]), noise[a:b]) for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(parts[0] + parts[1], latent_sums(q, noise))
    found = latent_statistics(latent_sums(q, noise))
    z = q.sample(noise).double()
    torch.testing.assert_close(found.mean, z.mean((0, 2, 3)))
    torch.testing.assert_close(found.std, z.std((0, 2, 3), unbiased=False))
    torch.testing.assert_close(found.covariance, z.movedim(1, 0).flatten(1).cov(correction=0))
    torch.testing.assert_close(found.log_variance, 2 * q.std.double().log().mean((0, 2, 3)))


def test_channels_without_information_are_reported_and_floored() -> None:
    mean = normal(64, 3, 4, 4)
    std = torch.full_like(mean, 0.1)
    mean[:, 1] = 0.0  # a collapsed posterior, which is only noise
    std[:, 1] = 1.0
    mean[:, 2], std[:, 2] = 5.0, 1e-9  # a constant
    found = latent_statistics(latent_sums(Posterior(mean, std), normal(*mean.shape, seed=1)))
    assert found.dead == [1, 2]
    assert found.std[2] == pytest.approx(1e-3 * float(found.std.max()), rel=1e-6)


# -- sensitivity --------------------------------------------------------------------------------------------------


def linear_autoencoder(weight: Tensor) -> Any:
    """An autoencoder in outline: the encoder is the identity, and the decoder has the Jacobian `weight`, (3, c)."""

    def decode(z: Tensor) -> Any:
        return SimpleNamespace(sample=torch.einsum("ij,bjhw->bihw", weight, z))

    def encode(pixels: Tensor) -> Any:
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))

    return SimpleNamespace(encode=encode, decode=decode, device=torch.device("cpu"))


def test_the_sensitivity_is_that_of_the_jacobian() -> None:
    weight, noise = normal(3, 4).double(), normal(8, 4, 5, 5, seed=1).double()
    batches = [(normal(4, 4, 5, 5, seed=k).double(), part) for k, part in enumerate(noise.split(4))]
    found = sensitivity(linear_autoencoder(weight), batches, torch.tensor([1.0, 3.0, 0.1, 2.0]))
    torch.testing.assert_close(found, weight.T @ weight * noise[:, 0].square().sum(), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_after_normalisation_by_pixels_the_sensitivity_is_equal_in_all_directions() -> None:
    vae, x = small_vae().double(), normal(64, 3, 32, 32).double()  # noise, which gives latents of full rank
    batches = [(x, normal(64, 4, 16, 16, seed=2).double())]

    def measured() -> tuple[LatentStatistics, Tensor, float]:
        found = latent_statistics(measure(vae, batches, 4))
        metric = sensitivity(vae, batches, found.std)
        values = torch.linalg.eigvalsh(metric)
        return found, metric, float(values[-1] / values[0])

    found, _, _ = measured()
    fold(vae, found, by_channels(found))
    found, metric, before = measured()
    fold(vae, found, by_pixels(found, metric))
    _, _, after = measured()
    assert before > 5
    assert after == pytest.approx(1, abs=0.1)


def test_normalisation_by_pixels_does_not_depend_on_the_coordinates() -> None:
    """Latents A z have the normalised latents of z, up to a rotation."""
    a, root = normal(4, 4).double(), normal(4, 4, seed=1).double()
    covariance, jacobian = root @ root.T, normal(9, 4, seed=2).double()
    back = torch.linalg.inv(a)
    one = by_pixels(statistics(torch.zeros(4), covariance=covariance), jacobian.T @ jacobian)
    other = by_pixels(
        statistics(torch.zeros(4), covariance=a @ covariance @ a.T), back.T @ jacobian.T @ jacobian @ back
    )
    rotation = other @ a @ torch.linalg.inv(one)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(4).double(), rtol=1e-8, atol=1e-8)
    assert (one @ covariance @ one).trace() == pytest.approx(4)


def test_a_direction_that_the_decoder_ignores_is_not_scaled_to_nothing() -> None:
    std = torch.tensor([1.0, 10.0, 1.0, 2.0])
    jacobian = torch.diag(torch.tensor([1.0, 0.1, 0.0, 0.25]))  # the second is as important as the first
    found = by_pixels(statistics(torch.zeros(4), covariance=torch.diag(std**2)), jacobian.T @ jacobian)
    scales = found.diagonal() * std
    torch.testing.assert_close(scales / scales[0], torch.tensor([1.0, 1.0, 0.03, 0.5]).double())
    constant = by_pixels(statistics(torch.zeros(3)), torch.zeros(3, 3))
    torch.testing.assert_close(constant, torch.eye(3).double())


@torch.no_grad()
def test_a_diverged_network_is_normalised_to_nan() -> None:
    """Without an error: validation then reports nan, and the run goes back to its last good weights."""
    vae = small_vae()
    vae.encoder.conv_in.bias.fill_(torch.nan)
    batches = [(normal(2, 3, 32, 32), normal(2, 4, 16, 16))]
    found = latent_statistics(measure(vae, batches, 4))
    fold(vae, found, by_pixels(found, sensitivity(vae, batches, found.std)))
    assert vae.post_quant_conv.weight.isnan().all()
