"""Metrics of an autoencoder on held-out images: quality of its reconstructions, and statistics of its latents.

Every metric is computed from sums over images, in float64, which are added up over batches and processes. A process
without images has zeros. `reduce` returns the sum of a tensor over all processes.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from autoencoder.model import Autoencoder, Posterior
from autoencoder.normalisation import latent_statistics, latent_sums
from ldm.errors import UserError
from ldm.float64 import double, float64_device
from train.evaluation.features import Features, eight_bits
from train.evaluation.frechet import FrechetSums, Reduce, frechet

_WINDOW, _WINDOW_STD = 11, 1.5  # of SSIM, in pixels
NOISE_LEVELS = (0.1, 0.2, 0.5)  # in standard deviations of a normalised latent
LAGS = (1, 2)  # distances of neighbours, in latent pixels
_BINS, _REACH = 4096, 8.0  # the histogram of latents has _BINS bins over [−_REACH, _REACH]


def psnr(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the PSNR (dB) of each 8-bit image, (b,). Both inputs: (b, 3, h, w) in [−1, 1]."""
    error = (eight_bits(decoded) / 255 - eight_bits(pixels) / 255).square().mean(dim=(1, 2, 3))
    # The infinite PSNR of a perfect reconstruction would dominate the mean: use that of half a grey level of error.
    return (-10 * error.log10()).clamp(max=20 * math.log10(2 * 255))


def ssim(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the SSIM of each 8-bit image, (b,) (Wang et al. 2004, eq. 13). Both inputs: (b, 3, h, w) in [−1, 1].

    It is torchmetrics' with its default settings; importing torchmetrics takes seconds. Images are mirrored at their
    borders.
    """
    a, b = (F.pad(eight_bits(image) / 255, [_WINDOW // 2] * 4, mode="reflect") for image in (decoded, pixels))
    place = torch.arange(_WINDOW, device=a.device) - _WINDOW // 2
    window = torch.exp(-((place / _WINDOW_STD) ** 2) / 2)
    window = window / window.sum()

    def local(x: Tensor) -> Tensor:
        """Return the means over the windows, (b, 3, h, w)."""
        x = x.flatten(0, 1)[:, None]
        x = F.conv2d(F.conv2d(x, window[None, None, :, None]), window[None, None, None, :])
        return x[:, 0].unflatten(0, a.shape[:2])

    mean_a, mean_b = local(a), local(b)
    variance = local(a * a) - mean_a**2 + local(b * b) - mean_b**2
    covariance = local(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return (likeness * (2 * covariance + 0.03**2) / (variance + 0.03**2)).mean(dim=(1, 2, 3))


def reconstruction_quality(decoded: Tensor, pixels: Tensor) -> tuple[float, float]:
    """Return PSNR (dB) and SSIM of 8-bit images, each a mean over the images. Both inputs: (b, 3, h, w) in [−1, 1]."""
    return float(psnr(decoded, pixels).mean()), float(ssim(decoded, pixels).mean())


class LatentHealth(NamedTuple):
    """Statistics of each channel of the latents, float64 on the CPU.

    Those of the distribution (std, skewness, kurtosis, w1 and correlations) use posterior samples.
    """

    mean: Tensor
    """Mean, (c,)."""
    std: Tensor
    """Standard deviation, (c,), with the lower bound of `latent_statistics`."""
    signal: Tensor
    """Standard deviation of the posterior's mean, (c,)."""
    noise: Tensor
    """Average standard deviation of the posterior, (c,)."""
    dead: list[int]
    """Channels whose posterior mean hardly depends on the image."""
    kl: Tensor
    """KL(q(z | x) ‖ N(0, 1)) in nats per element of the latent, (c,)."""
    skewness: Tensor
    """Skewness, (c,): 0 if normal."""
    kurtosis: Tensor
    """Excess kurtosis, (c,): 0 if normal."""
    w1: Tensor
    """Wasserstein-1 distance between the standardised channel and N(0, 1), (c,)."""
    correlation: Tensor
    """Correlation between channels at the same position, (c, c)."""
    autocorrelation: Tensor
    """Correlation with neighbours at distances 1 and 2, horizontal and vertical, (lags, c); nan without neighbours."""


class LatentSums:
    """Sums from which `LatentHealth` is computed.

    Latents should be roughly normalised: the histogram has steps of 1/256 and counts values beyond ±8 as ±8.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.channels = channels
        shapes = {
            "statistics": (channels, 5 + channels),  # from `latent_sums`
            "moments": (channels, 4),  # Σ sample³, Σ sample⁴, Σ posterior deviation, Σ KL
            "pairs": (len(LAGS), channels, 3),  # neighbours: count, Σ product, Σ sum
            "histogram": (channels, _BINS),
        }
        device = float64_device(device)
        self.sums = {k: torch.zeros(s, dtype=torch.float64, device=device) for k, s in shapes.items()}

    def add(self, posterior: Posterior, noise: Tensor) -> None:
        """Add a posterior of normalised latents. noise: (b, c, h, w), with which it is sampled."""
        mean, std, noise = double(posterior.mean), double(posterior.std), double(noise)
        z = Posterior(mean, std).sample(noise)  # (b, c, h, w)
        kl = 0.5 * (mean**2 + std**2 - 1) - std.log()
        self.sums["statistics"] += latent_sums(Posterior(mean, std), noise)
        self.sums["moments"] += torch.stack([z**3, z**4, std, kl]).sum(dim=(1, 3, 4)).T
        rows = z.movedim(1, 0).flatten(1)  # (c, b h w)
        for sums, lag in zip(self.sums["pairs"], LAGS, strict=True):
            for one, other in ((z[..., lag:], z[..., :-lag]), (z[..., lag:, :], z[..., :-lag, :])):
                sums += torch.stack([torch.ones_like(one), one * other, one + other]).sum(dim=(1, 3, 4)).T
        bins = ((rows.clamp(-_REACH, _REACH) + _REACH) * (_BINS / (2 * _REACH))).long().clamp(0, _BINS - 1)
        bins += _BINS * torch.arange(self.channels, device=z.device)[:, None]
        self.sums["histogram"] += bins.flatten().bincount(minlength=_BINS * self.channels).view(self.channels, _BINS)

    def reduce(self, reduce: Reduce) -> None:
        self.sums = {name: reduce(sums) for name, sums in self.sums.items()}

    def health(self) -> LatentHealth:
        """Return the statistics; all are nan if nothing was added."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        n = sums["statistics"][:, :1]  # (c, 1)
        statistics = latent_statistics(sums["statistics"])
        mean, std = statistics.mean, statistics.std
        square = statistics.covariance.diagonal() + mean**2
        cube, fourth, noise, kl = (sums["moments"] / n).unbind(1)
        pairs, product, both = sums["pairs"].unbind(2)  # (lags, c) each
        edges = torch.linspace(-_REACH, _REACH, _BINS + 1, dtype=torch.float64)
        x = (edges - mean[:, None]) / std[:, None]  # (c, bins + 1)
        cdf = F.pad(sums["histogram"].cumsum(1) / n, (1, 0))
        return LatentHealth(
            mean=mean,
            std=std,
            signal=statistics.signal,
            noise=noise,
            dead=statistics.dead,
            kl=kl,
            skewness=(cube - 3 * mean * square + 2 * mean**3) / std**3,
            kurtosis=(fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / std**4 - 3,
            w1=torch.trapezoid((cdf - torch.special.ndtr(x)).abs(), x),  # ∫ |F − Φ|
            correlation=statistics.covariance / torch.outer(std, std),
            autocorrelation=(product / pairs - mean * both / pairs + mean**2) / std**2,
        )


def noise_robustness(
    autoencoder: Autoencoder,
    pixels: Tensor,
    posterior: Posterior,
    noise: Tensor,
    levels: Sequence[float] = NOISE_LEVELS,
) -> list[float]:
    """Return the PSNR (dB) of decode(posterior mean + level × noise) against the images, for each level.

    A sampler's latents always have errors. If the PSNR is low here but that of reconstructions is high, the decoder
    amplifies such errors.
    """
    return [float(psnr(autoencoder.decode(posterior.mean + s * noise), pixels).mean()) for s in levels]


@torch.no_grad()
def measure_reconstruction(
    autoencoder: Autoencoder,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    features: Features | None = None,
    reduce: Reduce = lambda sums: sums,
    levels: Sequence[float] = NOISE_LEVELS,
    latents: LatentSums | None = None,
    on_decoded: Callable[[Tensor], object] = lambda decoded: None,
) -> dict[str, float]:
    """Measure reconstructions and latents over batches of (images, noise).

    Images are (b, 3, h, w) in [−1, 1]; the noise has their latents' shape.
    Reconstructions use the posterior mean. `perceptual` returns the mean distance between reconstructions and images of
    a batch. `features` returns features for the Fréchet distance. Both are on the autoencoder's device. Every process
    must call this, with or without images. For statistics of each channel, pass empty `latents` and call their `health`
    afterwards. `on_decoded` is called with the reconstructions of each batch. Raises UserError if no process has an
    image.
    """
    device = autoencoder.vae.device
    names = ["psnr", "ssim", *(f"noise_psnr_{level:g}" for level in levels)]
    names += ["perceptual"] if perceptual is not None else []
    # count, and Σ of each metric
    quality = torch.zeros(1 + len(names), dtype=torch.float64, device=float64_device(device))
    latents = LatentSums(autoencoder.latent_channels, device) if latents is None else latents
    dim = features.dim if features is not None else 0
    originals, reconstructed = FrechetSums(dim, device), FrechetSums(dim, device)
    for pixels, noise in batches:
        pixels = pixels.to(device)
        posterior = autoencoder.encode(pixels)
        noise = noise.to(posterior.mean)
        decoded = autoencoder.decode(posterior.mean)
        on_decoded(decoded)
        row = [1.0, *reconstruction_quality(decoded, pixels)]
        row += noise_robustness(autoencoder, pixels, posterior, noise, levels)
        row += [float(perceptual(decoded, pixels))] if perceptual is not None else []
        quality += len(pixels) * torch.tensor(row, dtype=torch.float64, device=quality.device)
        latents.add(posterior, noise)
        if features is not None:
            originals.add(features(pixels))
            reconstructed.add(features(decoded))
    quality = reduce(quality)
    for sums in (latents, originals, reconstructed):
        sums.reduce(reduce)
    if not (count := float(quality[0])):
        raise UserError("no held-out images to measure: at least 1 is needed, and 2 for a Fréchet distance")
    scores = dict(zip(names, (quality[1:] / count).tolist(), strict=True)) | _latent_scores(latents.health())
    return scores | ({"frechet": frechet(originals, reconstructed)} if features is not None else {})


def _latent_scores(health: LatentHealth) -> dict[str, float]:
    """Return the statistics of the worst channel; for KL and autocorrelation (distance 1), the mean of all channels."""
    scores = {
        "kl": health.kl.mean(),
        "latent_mean_max": health.mean.abs().max(),
        "latent_std_min": health.std.min(),
        "latent_std_max": health.std.max(),
        "latent_skewness": health.skewness.abs().max(),
        "latent_kurtosis": health.kurtosis.abs().max(),
        "latent_w1": health.w1.max(),
        "latent_correlation": health.correlation.clone().fill_diagonal_(0).abs().max(),
        "latent_autocorrelation": health.autocorrelation[0].mean(),
    }
    return {"dead_channels": float(len(health.dead))} | {name: float(value) for name, value in scores.items()}
