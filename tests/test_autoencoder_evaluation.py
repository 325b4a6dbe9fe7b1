"""Each metric of an autoencoder on data with a known value, and the sums over several processes."""

import json
import math
import os
import sys
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats
import torch
import torch.nn.functional as F
import torchmetrics.image.fid
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import BertConfig, BertModel, CLIPModel, CLIPVisionModel, Dinov2Config, Dinov2Model

from autoencoder.model import Posterior
from ldm.errors import UserError
from support.draws import draw
from support.images import smooth_pixels
from support.models import small_autoencoder
from train.evaluation.autoencoder import (
    LatentHealth,
    LatentSums,
    measure_reconstruction,
    noise_robustness,
    psnr,
    reconstruction_quality,
    ssim,
)
from train.evaluation.features import Features, eight_bits, load_features
from train.evaluation.frechet import FrechetSums, frechet

# The Fréchet distance


def sums(features: Tensor) -> FrechetSums:
    total = FrechetSums(features.shape[1])
    total.add(features)
    return total


def exactly(mean: Tensor, covariance: Tensor, n: int = 50) -> Tensor:
    """Return features with exactly this mean and this unbiased covariance."""
    x = draw(n, len(mean))
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_that_commute() -> None:
    q, _ = torch.linalg.qr(draw(4, 4, seed=1))
    one, other = torch.tensor([4.0, 1.0, 0.25, 9.0]).double(), torch.tensor([1.0, 1.0, 4.0, 0.01]).double()
    mean_one, mean_other = draw(4, seed=2), draw(4, seed=3)
    a, b = exactly(mean_one, q * one @ q.T), exactly(mean_other, q * other @ q.T)
    expected = (mean_one - mean_other).square().sum() + (one.sqrt() - other.sqrt()).square().sum()
    assert frechet(sums(a), sums(b)) == pytest.approx(float(expected), rel=1e-10)
    # A mean far from zero costs digits and doesn't change the distance.
    assert frechet(sums(a + 1e4), sums(b + 1e4)) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_two_pairs() -> None:
    """Covariances of rank 1, v vᵀ and w wᵀ in 64 dimensions: tr (S₁ S₂)^½ = |v · w|."""
    a, b = draw(2, 64, seed=1), draw(2, 64, seed=2)
    v, w = (a[0] - a[1]) / 2**0.5, (b[0] - b[1]) / 2**0.5
    expected = (a.mean(0) - b.mean(0)).square().sum() + v @ v + w @ w - 2 * (v @ w).abs()
    assert frechet(sums(a), sums(b)) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_agrees_with_torchmetrics() -> None:
    network = nn.Flatten()
    network.num_features = 12
    reference = FrechetInceptionDistance(network, normalize=True).set_dtype(torch.float64)
    a, b = draw(90, 3, 2, 2, seed=1), draw(70, 3, 2, 2, seed=2) ** 2
    reference.update(a, real=True)
    reference.update(b, real=False)
    assert frechet(sums(a.flatten(1)), sums(b.flatten(1))) == pytest.approx(float(reference.compute()), rel=1e-9)


def test_frechet_distance_of_a_dataset_to_itself_is_zero_even_with_fewer_images_than_features() -> None:
    for n in (20, 400):
        x = draw(n, 100)
        assert frechet(sums(x), sums(x.flip(0))) == pytest.approx(0, abs=1e-10)


def test_features_add_up_and_too_few_or_non_finite_ones_give_no_distance() -> None:
    x = draw(30, 5).float()
    parts = FrechetSums(5)
    for part in (x[:7], x[7:7], x[7:8], x[8:]):
        parts.add(part)
    torch.testing.assert_close(parts.sums, sums(x).sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.gaussian()[1], torch.cov(x.double().T), rtol=1e-10, atol=1e-12)
    with pytest.raises(UserError, match="there are 1"):
        frechet(sums(x[:1]), sums(x))
    assert math.isnan(frechet(sums(x), sums(x / 0)))


# Quality of images


@pytest.mark.parametrize("size", [(32, 32), (8, 40)])
def test_psnr_and_ssim_are_those_of_torchmetrics(size: tuple[int, int]) -> None:
    x = torch.rand(4, 3, *size) * 2 - 1
    made = x + 0.2 * torch.randn_like(x)
    a, b = eight_bits(made) / 255, eight_bits(x) / 255
    theirs = peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(psnr(made, x), theirs)
    torch.testing.assert_close(
        ssim(made, x), structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    )


def test_quality_of_known_reconstructions() -> None:
    x = torch.full((2, 3, 16, 16), -0.2)
    made = x.clone()
    made[1] += 20 / 255  # ten steps of 8 bits
    perfect, ten = 20 * math.log10(2 * 255), 20 * math.log10(255 / 10)
    assert psnr(made, x).tolist() == pytest.approx([perfect, ten], rel=1e-5)
    assert reconstruction_quality(made, x)[0] == pytest.approx((perfect + ten) / 2, rel=1e-5)  # mean over images
    assert reconstruction_quality(x, x)[1] == pytest.approx(1, abs=1e-6)
    # Constant images differ only in luminance: (2 a b + c) / (a² + b² + c), Wang et al. 2004, eq. 6.
    a, b, c = 102 / 255, 112 / 255, 0.01**2
    expected = (1 + (2 * a * b + c) / (a * a + b * b + c)) / 2
    assert reconstruction_quality(made, x)[1] == pytest.approx(expected, abs=2e-4)  # float32 variances
    assert psnr(x + 0.9 / 255, x)[0] == pytest.approx(perfect)  # less than half a step is no error in 8 bits
    assert psnr(x * 0 + 7, x * 0 + 1)[0] == pytest.approx(perfect)  # values that are clipped are no error either


class Plain:
    """Autoencoder whose latents are the images."""

    latent_channels = 3

    def decode(self, latents: Tensor) -> Tensor:
        return latents


@pytest.mark.parametrize("level", [0.1, 0.2])
def test_noise_robustness_of_an_autoencoder_that_passes_noise_on(level) -> None:
    x = smooth_pixels(8) * 0.1  # far from the limits, where clipping would hide noise
    q = Posterior(x, torch.full_like(x, 3.0))  # the posterior's own deviation isn't used
    noise = draw(*x.shape).float()
    noise /= noise.square().mean((1, 2, 3), keepdim=True).sqrt()
    # Noise of `level` in [−1, 1], and the 8-bit rounding of both images, each with a variance of 1/12 step.
    error = (level / 2) ** 2 + 2 / 12 / 255**2
    assert noise_robustness(Plain(), x, q, noise, [level, 0.0]) == pytest.approx(
        [-10 * math.log10(error), 20 * math.log10(2 * 255)], abs=0.01
    )


# Latents


def health(mean: Tensor, std: float | Tensor = 1e-3, noise: Tensor | None = None) -> LatentHealth:
    total = LatentSums(mean.shape[1])
    total.add(Posterior(mean, torch.ones_like(mean) * std), torch.zeros_like(mean) if noise is None else noise)
    return total.health()


def test_moments_of_latents() -> None:
    shape = (400, 3, 12, 12)
    m, s = torch.tensor([0.0, 2.0, -0.5]).double(), torch.tensor([1.0, 0.5, 1.4]).double()
    signal, noise = s * 0.8, s * 0.6  # 0.8² + 0.6² = 1
    mean = draw(*shape) * signal.view(3, 1, 1) + m.view(3, 1, 1)
    std = noise.view(3, 1, 1).expand(shape).contiguous()
    found = health(mean, std, draw(*shape, seed=1))
    torch.testing.assert_close(found.mean, m, atol=0.03, rtol=0)
    torch.testing.assert_close(found.std, s, rtol=0.02, atol=0)
    torch.testing.assert_close(found.signal, signal, rtol=0.02, atol=0)
    torch.testing.assert_close(found.noise, noise)
    q, p = torch.distributions.Normal(mean, std), torch.distributions.Normal(torch.zeros(()).double(), 1.0)
    torch.testing.assert_close(found.kl, torch.distributions.kl_divergence(q, p).mean((0, 2, 3)))
    assert found.dead == []
    for normal in (found.skewness, found.kurtosis, found.autocorrelation):
        torch.testing.assert_close(normal, torch.zeros_like(normal), atol=0.06, rtol=0)
    assert found.w1.max() < 0.02


N = 200_000
SHAPES = {
    "uniform": scipy.stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)),
    "laplace": scipy.stats.laplace(0, math.sqrt(0.5)),
    "exponential": scipy.stats.expon(-1, 1),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (-0.7, 0.5)])
def test_departures_from_the_normal(name, shift, scale) -> None:
    """Latents are at the quantiles of a distribution of mean 0 and deviation 1. Shift and scale must not matter."""
    law = SHAPES[name]
    z = law.ppf((np.arange(N) + 0.5) / N) * scale + shift
    found = health(torch.from_numpy(z).view(50, 1, 40, 100))
    skewness, kurtosis = law.stats("sk")
    gap = lambda x: abs(law.cdf(x) - scipy.stats.norm.cdf(x))  # noqa: E731
    w1, _ = scipy.integrate.quad(gap, -15, 15, points=[-2, -1, 0, 1, 2], limit=500)
    assert float(found.skewness) == pytest.approx(float(skewness), abs=0.01)
    assert float(found.kurtosis) == pytest.approx(float(kurtosis), abs=0.05)
    assert float(found.w1) == pytest.approx(w1, abs=2e-3)


def test_latents_beyond_the_histogram_count_as_its_ends() -> None:
    z = scipy.stats.norm.ppf((np.arange(N) + 0.5) / N)
    for far in (1e30, -1e30):
        total = LatentSums(1)
        total.add(Posterior(torch.full((1, 1, 1, 1), far), torch.ones(1, 1, 1, 1)), torch.zeros(1, 1, 1, 1))
        assert total.sums["histogram"][0, -1 if far > 0 else 0] == 1
        assert total.sums["histogram"].sum() == 1
    assert float(health(torch.from_numpy(z).view(50, 1, 40, 100)).w1) < 2e-3


def test_spatial_autocorrelation() -> None:
    """AR(1) along each side: ρ at distance 1, ρ² at 2. Each channel has its own ρ, unequal sides and a mean."""
    n, (h, w), seeds = 300, (24, 16), 3
    along = [(0.0, 0.0), (0.8, 0.8), (0.9, 0.0)]  # vertically, horizontally

    def factor(rho: float, side: int) -> Tensor:
        return torch.from_numpy(scipy.linalg.cholesky(scipy.linalg.toeplitz(rho ** np.arange(side)), lower=True))

    white = draw(n, seeds, h, w)
    z = torch.stack([factor(v, h) @ white[:, c] @ factor(u, w).T for c, (v, u) in enumerate(along)], 1)
    found = health(z + torch.tensor([1.0, -2.0, 3.0]).view(3, 1, 1)).autocorrelation
    # Pairs along both sides count equally: (h − lag) w vertical ones and h (w − lag) horizontal ones.
    expected = torch.tensor(
        [
            [(v**lag * (h - lag) * w + u**lag * h * (w - lag)) / ((h - lag) * w + h * (w - lag)) for v, u in along]
            for lag in (1, 2)
        ]
    )
    torch.testing.assert_close(found, expected.double(), atol=0.02, rtol=0)


def test_autocorrelation_is_about_the_mean_of_all_places() -> None:
    """A slope across the latent: places with a neighbour have a mean that differs from the overall mean."""
    z = draw(3, 1, 4, 6) + torch.arange(6) ** 2
    centred = (z - z.mean()) / z.std(unbiased=False)
    for found, lag in zip(health(z, 1e-9).autocorrelation, (1, 2), strict=True):
        across, down = centred[..., lag:] * centred[..., :-lag], centred[..., lag:, :] * centred[..., :-lag, :]
        torch.testing.assert_close(found[0], torch.cat([across.flatten(), down.flatten()]).mean())


def test_latents_too_small_for_a_neighbour() -> None:
    found = health(draw(50, 2, 2, 1)).autocorrelation
    assert found.isnan().tolist() == [[False, False], [True, True]]


def test_correlated_and_dead_channels() -> None:
    z = draw(200, 4, 10, 10)
    z[:, 1] = 0.6 * z[:, 0] + 0.8 * z[:, 1]
    z[:, 2] = -3 * z[:, 0] + 1
    z[:, 3] = 0.5  # all noise
    std = torch.full_like(z, 1e-3)
    std[:, 3] = 1.0
    found = health(z, std, draw(*z.shape, seed=1))
    expected = torch.eye(4).double()
    for (i, j), r in {(0, 1): 0.6, (0, 2): -1.0, (1, 2): -0.6}.items():
        expected[i, j] = expected[j, i] = r
    torch.testing.assert_close(found.correlation, expected, atol=0.02, rtol=0)
    assert found.dead == [3]
    z[:, 3], std[:, 3] = 0.25, 1e-9  # a constant can't be standardised, yet every metric is finite
    constant = health(z, std, draw(*z.shape, seed=1))
    assert constant.dead == [3]
    assert all(torch.as_tensor(value, dtype=torch.float64).isfinite().all() for value in constant)


def test_latents_add_up_over_any_split() -> None:
    q, noise = Posterior(draw(12, 3, 5, 4), draw(12, 3, 5, 4, seed=1).exp()), draw(12, 3, 5, 4, seed=2)
    parts, total = [LatentSums(3) for _ in range(3)], LatentSums(3)
    for part, where in zip(parts, (slice(0, 5), slice(5, 5), slice(5, 12)), strict=True):
        part.add(Posterior(q.mean[where], q.std[where]), noise[where])
    total.add(q, noise)
    for name, expected in total.sums.items():
        torch.testing.assert_close(sum(part.sums[name] for part in parts), expected, rtol=1e-12, atol=1e-10)
    assert total.sums["histogram"].sum() == 12 * 3 * 5 * 4


# All metrics


class Colours(Features):
    """Features that are the mean and deviation of each colour."""

    def __init__(self) -> None:
        super().__init__("colours", 6)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)


def distance(made: Tensor, pixels: Tensor) -> Tensor:
    return (made - pixels).square().mean()


Part = tuple[Tensor, Tensor]


def in_processes(shares: list[list[Part]], measured: Callable[..., dict[str, float]]) -> list[dict[str, float]]:
    """Return the metrics that each of several processes computes; threads stand in for processes and sum together."""
    meeting, held = threading.Barrier(len(shares), timeout=60), [torch.zeros(0)] * len(shares)

    def reduce(rank: int, tensor: Tensor) -> Tensor:
        held[rank] = tensor
        meeting.wait()
        total = torch.stack(held).sum(0)
        meeting.wait()
        return total

    with ThreadPoolExecutor(len(shares)) as pool:
        runs = [pool.submit(measured, share, reduce=partial(reduce, rank)) for rank, share in enumerate(shares)]
        return [run.result() for run in runs]


def test_all_metrics_of_a_small_autoencoder_agree_in_one_process_and_in_three() -> None:
    autoencoder, x, noise = small_autoencoder(), smooth_pixels(14), draw(14, 4, 16, 16).float()
    parts = [(x[where], noise[where]) for where in (slice(0, 6), slice(6, 12), slice(12, 14))]
    measured = partial(measure_reconstruction, autoencoder, perceptual=distance, features=Colours())
    latents = LatentSums(4)
    scores = measured(parts, latents=latents)

    posterior = autoencoder.encode(x)
    made, z = autoencoder.decode(posterior.mean), posterior.sample(noise).double()
    quality = reconstruction_quality(made, x)
    assert (scores["psnr"], scores["ssim"]) == pytest.approx(quality, rel=1e-5)
    assert scores["perceptual"] == pytest.approx(float(distance(made, x)), rel=1e-5)
    for level in (0.1, 0.2, 0.5):
        noisy = autoencoder.decode(posterior.mean + level * noise)
        assert scores[f"noise_psnr_{level}"] == pytest.approx(reconstruction_quality(noisy, x)[0], rel=1e-5)
    assert scores["frechet"] == pytest.approx(frechet(sums(Colours()(x)), sums(Colours()(made))), rel=1e-4)
    std = z.std((0, 2, 3), unbiased=False)
    assert scores["latent_mean_max"] == pytest.approx(float(z.mean((0, 2, 3)).abs().max()), rel=1e-5)
    assert scores["latent_std_min"] == pytest.approx(float(std.min()), rel=1e-5)
    assert scores["latent_std_max"] == pytest.approx(float(std.max()), rel=1e-5)
    of_each = z.movedim(1, 0).flatten(1)
    r = np.corrcoef(of_each.numpy())
    assert scores["latent_correlation"] == pytest.approx(np.abs(r[~np.eye(4, dtype=bool)]).max(), rel=1e-5)
    assert scores["latent_skewness"] == pytest.approx(np.abs(scipy.stats.skew(of_each, axis=1)).max(), rel=1e-4)
    assert scores["latent_kurtosis"] == pytest.approx(np.abs(scipy.stats.kurtosis(of_each, axis=1)).max(), rel=1e-4)
    record = latents.health()
    assert scores["kl"] == pytest.approx(float(record.kl.mean()))
    assert scores["latent_w1"] == pytest.approx(float(record.w1.max()))
    assert scores["latent_autocorrelation"] == pytest.approx(float(record.autocorrelation[0].mean()))
    assert scores["dead_channels"] == len(record.dead)

    shares = [parts[:1], [], parts[1:]]
    for found in in_processes(shares, measured):
        assert found == pytest.approx(scores, rel=1e-9, abs=1e-12)
    assert set(measure_reconstruction(autoencoder, parts)) == set(scores) - {"perceptual", "frechet"}


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(UserError, match="no held-out images"):
        measure_reconstruction(small_autoencoder(), [])


# Feature networks


def in_bytes(pixels: Tensor) -> Tensor:
    return (pixels.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def test_features_of_our_own_clip(small_clip) -> None:
    folder, clip = small_clip, CLIPModel.from_pretrained(small_clip).eval()
    features = load_features(str(folder))
    assert (features.name, features.dim) == (str(folder), 16)
    assert not features.tower.training
    assert not any(p.requires_grad for p in features.parameters())
    x = smooth_pixels(3, 16) * 1.2  # partly out of range
    expected = clip.visual_projection(clip.vision_model(pixel_values=in_bytes(x)).pooler_output)
    torch.testing.assert_close(features(x), expected, rtol=1e-4, atol=1e-5)
    resized = F.interpolate(in_bytes(smooth_pixels(3, 32)), size=(16, 16), mode="bicubic", antialias=True)
    expected = clip.visual_projection(clip.vision_model(pixel_values=resized).pooler_output)
    torch.testing.assert_close(features(smooth_pixels(3, 32)), expected, rtol=1e-4, atol=1e-5)


def test_a_clip_tower_without_projection_gives_its_pooled_output(small_clip, tmp_path) -> None:
    folder, clip = small_clip, CLIPModel.from_pretrained(small_clip).eval()
    CLIPVisionModel.from_pretrained(folder).save_pretrained(tmp_path)  # a folder without the preprocessor's constants
    features = load_features(str(tmp_path))
    assert features.dim == 24
    x = smooth_pixels(3, 16)
    mean, std = (
        torch.tensor([0.4815, 0.4578, 0.4082]).view(3, 1, 1),
        torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1),
    )
    inputs = (in_bytes(x) / 2 + 0.5 - mean) / std
    torch.testing.assert_close(features(x), clip.vision_model(pixel_values=inputs).pooler_output, rtol=1e-2, atol=2e-3)


@torch.no_grad()
def test_features_of_a_dinov2(tmp_path) -> None:
    torch.manual_seed(0)
    dino = Dinov2Model(
        Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    ).eval()
    dino.half().save_pretrained(tmp_path)
    dino.float()
    features = load_features(str(tmp_path))
    x = smooth_pixels(3, 28)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = dino((in_bytes(x) / 2 + 0.5 - mean) / std).last_hidden_state[:, 0]
    assert (features.dim, features(x).dtype) == (24, torch.float32)
    torch.testing.assert_close(features(x), expected, rtol=1e-4, atol=1e-5)
    # A preprocessor overrides the published constants, and its crop overrides the training resolution.
    for crop in ({"height": 14, "width": 14}, 14):
        processing = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "crop_size": crop}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processing))
        small_x = F.interpolate(in_bytes(x), size=(14, 14), mode="bicubic", antialias=True)
        expected = dino(small_x).last_hidden_state[:, 0]
        torch.testing.assert_close(load_features(str(tmp_path))(x), expected, rtol=1e-4, atol=1e-5)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"preprocessor_config\.json of .* can't be read"):
        load_features(str(tmp_path))


def test_unusable_feature_networks_are_refused(small_clip, tmp_path) -> None:
    for nowhere in ("resnet", "./no/such/folder", "/no/such"):
        with pytest.raises(UserError, match="use 'inception'"):
            load_features(nowhere)
    with pytest.raises(UserError, match=r"no config\.json"):
        load_features(str(tmp_path))
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"model_type 'bert'; must be clip, clip_vision_model or dinov2"):
        load_features(str(tmp_path / "bert"))
    tower = CLIPVisionModel.from_pretrained(small_clip)
    weights = {k: v for k, v in tower.state_dict().items() if not k.endswith("patch_embedding.weight")}
    tower.save_pretrained(tmp_path / "part", state_dict=weights)
    with pytest.raises(UserError, match="weights are missing"):
        load_features(str(tmp_path / "part"))
    torch.save(tower.state_dict(), tmp_path / "part" / "pytorch_model.bin")  # a pickle isn't used as a substitute
    (tmp_path / "part" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        load_features(str(tmp_path / "part"))


class FakeInception(nn.Module):
    """Stand-in for the network, which would be downloaded: it records its arguments and returns the images."""

    def __init__(self, name: str, features_list: list[str], **how) -> None:
        super().__init__()
        self.made = {"features_list": features_list, **how}
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return x.flatten(1)


def test_inception_is_given_bytes_and_resizes_as_published(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", FakeInception)
    extractor = types.SimpleNamespace(URL_INCEPTION_V3="https://example.org/inception-0123abcd.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", extractor)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = tmp_path / "hub/checkpoints/inception-0123abcd.pth"

    def download(url: str, **how: bool) -> None:
        assert (url, how) == (extractor.URL_INCEPTION_V3, {"check_hash": True, "weights_only": True})
        published.parent.mkdir(parents=True)
        torch.save({"fc.weight": torch.zeros(1)}, published)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    x = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 5.0]).view(2, 3, 1, 1)
    features = load_features("inception")
    assert features.network.made == {
        "features_list": ["2048"],
        "feature_extractor_weights_path": str(published),
        "antialias": False,
    }
    assert not features.network.training
    assert features(x).flatten().tolist() == [0, 0, 128, 255, 255, 255]
    assert (features.name, features.dim) == ("inception", 2048)
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "weights.pth")
    made = load_features(f"inception:{tmp_path / 'weights.pth'}").network.made
    assert made["feature_extractor_weights_path"] == str(tmp_path / "weights.pth")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_inception_without_torch_fidelity_or_with_bad_weights(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torchmetrics.image.fid, "_TORCH_FIDELITY_AVAILABLE", False)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UserError, match="inception"):
        load_features("inception")
    with pytest.raises(UserError, match=r"none\.pth"):
        load_features(f"inception:{tmp_path / 'none.pth'}")
    monkeypatch.setattr(torchmetrics.image.fid, "NoTrainInceptionV3", FakeInception)
    monkeypatch.chdir(tmp_path)
    torch.save(Malicious(), tmp_path / "bad.pth")
    with pytest.raises(UserError, match=r"bad\.pth.*than tensors"):
        load_features(f"inception:{tmp_path / 'bad.pth'}")
    assert not (tmp_path / "ran").exists()
