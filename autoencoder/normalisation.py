"""Normalisation of latents, folded into the weights of an autoencoder.

Diffusion needs latents of mean 0 and variance 1. For that, Stable Diffusion's tools have one number,
`scaling_factor`, and most have 0.18215 hard-coded. So the normalisation, a linear map, is folded into the two 1×1
convolutions next to the latent (`fold`). Then latent × 0.18215 is correct for every loader.

There are two such maps. `by_channels` divides each channel by its standard deviation. `by_pixels` mixes and scales the
channels so that errors of the same size change the image equally in every direction of the channel space, on average
over positions and images. The loss of a diffusion model is the squared error of its latents. After `by_channels`,
directions that hardly change the image have the same weight in it as those that change it most.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from autoencoder.model import Posterior
from ldm.errors import UserError
from ldm.float64 import double, float64_device
from ldm.libraries import AutoencoderKL

_DEAD = 0.05  # a channel is dead if its mean varies by less than this share of its standard deviation
_LEAST_STD = 1e-3  # smallest standard deviation of a channel, as a share of the largest
_LEAST_SCALE = 0.03  # smallest standard deviation of a direction after by_pixels, as a share of the largest
_NUDGE = 0.05  # size of the change that measures the decoder's sensitivity, in standard deviations of the latents


class LatentStatistics(NamedTuple):
    """Statistics of latents over a dataset and its positions, float64 on the CPU."""

    mean: Tensor
    """Mean of posterior samples, (c,)."""
    covariance: Tensor
    """Covariance of posterior samples, (c, c)."""
    log_variance: Tensor
    """Mean log variance of the posterior, (c,)."""
    signal: Tensor
    """Standard deviation of the posterior's mean, (c,)."""

    @property
    def std(self) -> Tensor:
        """Standard deviation of posterior samples, (c,), with a lower bound."""
        std = self.covariance.diagonal().clamp_min(0).sqrt()
        return torch.maximum(std, _LEAST_STD * std.max().clamp_min(1e-6))

    @property
    def dead(self) -> list[int]:
        """Channels whose posterior mean hardly depends on the image."""
        return (self.signal < _DEAD * self.std).nonzero().flatten().tolist()


def latent_sums(posterior: Posterior, noise: Tensor) -> Tensor:
    """Return sums over positions and images, (c, 5 + c) float64, from which `latent_statistics` are computed.

    Columns: the count, Σ sample, Σ mean, Σ mean², Σ log variance, and Σ of the products of samples.
    """
    mean, std, noise = double(posterior.mean), double(posterior.std), double(noise)
    sample = Posterior(mean, std).sample(noise)
    log_variance = 2 * std.clamp_min(1e-10).log()
    each = torch.stack([torch.ones_like(mean), sample, mean, mean**2, log_variance])  # (5, b, c, h, w)
    rows = sample.movedim(1, 0).flatten(1)  # (c, b h w)
    return torch.cat([each.sum(dim=(1, 3, 4)).T, rows @ rows.T], 1)


def latent_statistics(sums: Tensor) -> LatentStatistics:
    """Return the statistics from `latent_sums` added up over a dataset (and over processes)."""
    sums = double(sums).cpu()
    sample, mean, mean_square, log_variance = (sums[:, 1:5] / sums[:, :1]).unbind(1)
    covariance = sums[:, 5:] / sums[:, :1] - sample[:, None] * sample
    return LatentStatistics(sample, covariance, log_variance, (mean_square - mean**2).clamp_min(0).sqrt())


@torch.no_grad()
def measure(vae: AutoencoderKL, batches: Iterable[tuple[Tensor, Tensor]], channels: int) -> Tensor:
    """Return `latent_sums` of an unfolded autoencoder over batches of (images, noise); zeros without batches."""
    total = torch.zeros(channels, 5 + channels, dtype=torch.float64, device=float64_device(vae.device))
    for pixels, noise in batches:
        q = vae.encode(pixels.to(vae.device)).latent_dist
        total += latent_sums(Posterior(q.mean, q.std), noise.to(vae.device))
    return total


@torch.no_grad()
def sensitivity(vae: AutoencoderKL, batches: Iterable[tuple[Tensor, Tensor]], std: Tensor) -> Tensor:
    """Return how the squared change of the image depends on the direction of a change of the latent, (c, c) float64.

    It is Jᵀ J, the metric that the decoder with Jacobian J gives its latents (Arvanitidis et al. 2018, arXiv
    1710.11379, sec. 2), for changes at one position, summed over positions and images. All positions of one channel
    are changed at once, by noise; each channel gets the same noise. The noise of different positions is independent, so
    the mean of the products of two channels' changes is this sum (Hutchinson's estimator).

    batches: images and standard normal noise (b, c, h, w), of which the first channel is used. std: (c,), of the
    channels of unfolded latents. Returns zeros without batches.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # whose rounding is as large as small changes
        return _changes(vae, batches, std)


def _changes(vae: AutoencoderKL, batches: Iterable[tuple[Tensor, Tensor]], std: Tensor) -> Tensor:
    total = torch.zeros(len(std), len(std), dtype=torch.float64, device=float64_device(vae.device))
    for pixels, noise in batches:
        z = vae.encode(pixels.to(vae.device)).latent_dist.mean
        decoded = vae.decode(z).sample
        changes = []
        for channel, size in enumerate((_NUDGE * std).tolist()):
            nudged = z.clone()
            nudged[:, channel] += size * noise[:, 0].to(z)
            changes.append((vae.decode(nudged).sample - decoded).flatten() / size)
        jacobian = torch.stack(changes)  # times the noise, (c, b 3 H W)
        total += double(jacobian @ jacobian.T)
    return total


def by_channels(statistics: LatentStatistics) -> Tensor:
    """Return the diagonal map (c, c) that gives each channel a standard deviation of 1."""
    return torch.diag(1 / statistics.std)


def by_pixels(statistics: LatentStatistics, sensitivity: Tensor) -> Tensor:
    """Return the symmetric map (c, c) after which the sensitivity is equal in all directions.

    It is √S for the sensitivity S, (c, c), scaled so that the mean over channels of the variance is 1. Directions
    with a standard deviation below 0.03 of the largest are enlarged to it. Otherwise a sampler's errors would be large
    compared with the latents.
    """
    half, inverse = (_power(statistics.covariance, k, _LEAST_STD) for k in (0.5, -0.5))
    contributions = _power(half @ double(sensitivity).cpu() @ half, 1.0, _LEAST_SCALE)  # of each direction to pixels
    root = _power(inverse @ contributions @ inverse, 0.5, 0.0)
    return root / ((root @ half).square().sum() / len(root)).sqrt()


def _power(matrix: Tensor, exponent: float, least: float) -> Tensor:
    """Return a power of a symmetric matrix; nan if it isn't finite, as after a divergence.

    least: lower bound of the eigenvalues' roots, as a share of the largest.
    """
    matrix = double(matrix)
    if not matrix.isfinite().all():
        return torch.full_like(matrix, math.nan)
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(max(least**2 * float(values[-1]), 1e-30))
    return (vectors * values.pow(exponent)) @ vectors.T


@torch.no_grad()
def fold(vae: AutoencoderKL, statistics: LatentStatistics, matrix: Tensor) -> None:
    """Fold z → M (z − mean) into `quant_conv` and `post_quant_conv`, in place.

    The encoder's mean becomes M (z − mean) / scaling_factor, and the decoder undoes this, both exactly. Only weights
    change, as the convolutions are 1×1. The posterior stays diagonal. Correlations that M gives to its noise are left
    out, and the logarithm of its variances, diag(M Σ Mᵀ), is linearised at the mean log variances, which makes it a
    little too small. For a diagonal M, the posterior is exact too.

    matrix: M, (c, c), invertible. Raises UserError for an autoencoder without these convolutions: folding wouldn't be
    exact, since the decoder pads with zeros.
    """
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise UserError(
            "the autoencoder has no quant convolutions, so normalising its latents isn't exact: use one that has them"
        )
    device = float64_device(vae.device)
    mean, log_variance = double(statistics.mean).to(device), double(statistics.log_variance).to(device)
    m = double(matrix).to(device) / vae.config.scaling_factor
    quant, post = vae.quant_conv, vae.post_quant_conv
    c = len(mean)
    variances = m**2 * log_variance.exp()  # (c, c), what each old channel adds to the variance of each new one
    total = variances.sum(1)
    shares = variances / total[:, None]

    weight, bias = double(quant.weight)[:, :, 0, 0], double(quant.bias)
    weight, logvar_weight = m @ weight[:c], shares @ weight[c:]
    bias, logvar_bias = m @ (bias[:c] - mean), total.log() + shares @ (bias[c:] - log_variance)
    quant.weight.copy_(torch.cat([weight, logvar_weight])[:, :, None, None])
    quant.bias.copy_(torch.cat([bias, logvar_bias]))
    weight = double(post.weight)[:, :, 0, 0]
    post.bias.copy_(double(post.bias) + weight @ mean)
    post.weight.copy_((weight @ torch.linalg.inv(m))[:, :, None, None])
