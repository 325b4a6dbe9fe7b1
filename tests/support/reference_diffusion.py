"""Stage 2's loss, written from the papers' formulas in float64, with plain torch."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.config.ldm import DiffusionConfig, LdmConfig


class Path(NamedTuple):
    """alpha, sigma and the network's times by index, (T,) each."""

    alpha: Tensor
    sigma: Tensor
    times: Tensor


def path_of(d: DiffusionConfig) -> Path:
    T, first, last = d.timesteps, d.beta_start, d.beta_end
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    if d.schedule == "flow":
        sigma = d.shift * t / (1 + (d.shift - 1) * t)
        return Path(1 - sigma, sigma, sigma * T)
    place = torch.linspace(0, 1, T, dtype=torch.float64)
    match d.schedule:
        case "linear":
            betas = first + (last - first) * place
        case "scaled_linear" | "quadratic":
            betas = (first**0.5 + (last**0.5 - first**0.5) * place) ** 2
        case "sigmoid":
            betas = first + (last - first) / (1 + torch.exp(6 - 12 * place))
        case _:
            f = torch.cos((torch.cat([t.new_zeros(1), t]) + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    alpha = torch.cumprod(1 - betas, 0).sqrt()
    if d.zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return Path(alpha, (1 - alpha**2).sqrt(), torch.arange(T))


class Importance:
    """Importance sampling of timesteps (Nichol & Dhariwal 2021), in as many bins as timesteps, 100 at most."""

    def __init__(self, T: int) -> None:
        self.T, self.bins = T, min(100, T)
        self.square, self.seen = [0.0] * self.bins, [0] * self.bins

    def probabilities(self) -> list[float]:
        if 0 in self.seen:
            return [1 / self.bins] * self.bins
        roots = [s**0.5 for s in self.square]
        return [0.95 * r / sum(roots) + 0.05 / self.bins for r in roots]

    def draw(self, u: float) -> tuple[int, float]:
        """Return the index of a uniform number, and its importance weight."""
        below, shares = 0.0, self.probabilities()
        for k, p in enumerate(shares):
            if u < below + p or k == self.bins - 1:
                return int((k + (u - below) / p) * self.T / self.bins), 1 / (self.bins * p)
            below += p
        raise AssertionError

    def update(self, indices: Sequence[int], losses: Sequence[float]) -> None:
        for k in range(self.bins):
            squares = [loss**2 for i, loss in zip(indices, losses, strict=True) if i * self.bins // self.T == k]
            if squares:
                mean, kept = sum(squares) / len(squares), 0.98 ** len(squares) if self.seen[k] else 0.0
                self.square[k] = kept * self.square[k] + (1 - kept) * mean
                self.seen[k] += len(squares)


class Expected(NamedTuple):
    """Index and losses of each example, (b,)."""

    index: Tensor
    weighted: Tensor
    error: Tensor
    uncorrected: Tensor


def draw_index(d: DiffusionConfig, u: float, importance: Importance | None) -> tuple[int, float]:
    if d.timestep_sampling == "importance":
        assert importance is not None
        return importance.draw(u)
    if d.timestep_sampling == "logit_normal":
        z = NormalDist(d.logit_mean, d.logit_std).inv_cdf(u)
        u = 1 / (1 + math.exp(-z))
    return int(u * d.timesteps), 1.0


def weight_of(d: DiffusionConfig, snr: Tensor, sigma: Tensor) -> Tensor:
    """Return the weight of the target's error, from the papers' weights of x0's error."""
    match d.weighting:
        case "uniform":
            return torch.ones_like(snr)
        case "min_snr":
            on_x0 = snr.clamp(max=d.gamma)
        case "p2":
            on_x0 = snr / (1 + snr) ** d.p2_gamma
        case "edm":
            on_x0 = snr + 1 / d.sigma_data**2
    return on_x0 * {"eps": 1 / snr, "x0": torch.ones_like(snr), "v": 1 / (1 + snr), "flow": sigma**2}[d.target]


def bound_terms(
    d: DiffusionConfig, path: Path, index: Tensor, x0: Tensor, x_t: Tensor, made: Tensor, raw: Any
) -> Tensor:
    """Return the variational bound's term at each index in bits per dimension (Ho et al. 2020, eq. 5)."""
    alpha_bar = path.alpha**2
    below = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    beta = 1 - alpha_bar / below
    small = beta * (1 - below) / (1 - alpha_bar)
    small[0] = small[1]
    a, b, bar, low, high = (x[index].view(-1, 1, 1, 1) for x in (alpha_bar, below, beta, small, beta))

    def mean(x: Tensor) -> Tensor:
        return (b.sqrt() * bar * x + (a / b).sqrt() * (1 - b) * x_t) / (1 - a)

    variance = {"fixed_small": low, "fixed_large": high}.get(d.variance)
    if variance is None:
        share = (raw + 1) / 2
        variance = torch.exp(share * high.log() + (1 - share) * low.log())
    kl = (variance / low).log() / 2 + (low + (mean(x0) - mean(made)) ** 2) / (2 * variance) - 0.5
    likelihood = (2 * math.pi * variance).log() / 2 + (x0 - mean(made)) ** 2 / (2 * variance)
    return torch.where(index.view(-1, 1, 1, 1) > 0, kl, likelihood).flatten(1).mean(1) / math.log(2)


def losses_of(
    d: DiffusionConfig,
    unet: nn.Module,
    x0: Tensor,
    u: Sequence[float],
    noise: Tensor,
    condition: Tensor,
    importance: Importance | None = None,
) -> Expected:
    """Return the losses of a batch."""
    path = path_of(d)
    drawn = [draw_index(d, each, importance) for each in u]
    index, correction = torch.tensor([i for i, _ in drawn]), torch.tensor([w for _, w in drawn])
    alpha, sigma = (x[index].view(-1, 1, 1, 1) for x in (path.alpha, path.sigma))
    x0, noise = x0.double(), noise.double()
    x_t = alpha * x0 + sigma * noise
    output = unet(x_t.float(), path.times[index].to(torch.float32), condition).sample.double()
    output, raw = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
    target = {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0, "flow": noise - x0}[d.target]
    miss = (output - target).abs()
    error = {"l2": miss**2, "l1": miss, "huber": torch.where(miss < 1, miss**2, 2 * miss - 1)}[d.loss]
    error = error.flatten(1).mean(1)
    loss = error * weight_of(d, (path.alpha / path.sigma)[index] ** 2, path.sigma[index])
    if d.objective != "simple":
        made = {"eps": (x_t - sigma * output) / alpha, "x0": output, "v": alpha * x_t - sigma * output}[d.target]
        if d.objective == "hybrid":
            loss = loss + 0.001 * d.timesteps * bound_terms(d, path, index, x0, x_t, made.detach(), raw)
        else:
            error = bound_terms(d, path, index, x0, x_t, made, raw)
            loss = d.timesteps * error
    return Expected(index, correction * loss, error, loss)


def ldm_losses(c: LdmConfig, nets: Sequence[Any], parts: Sequence[Any], step: int) -> list[Tensor]:
    fields = ("x0", "timestep", "noise", "condition")
    x0, u, noise, condition = (torch.cat([getattr(part, name) for part in parts]) for name in fields)
    return [losses_of(c.diffusion, nets[0], x0, u.tolist(), noise, condition).weighted.mean()]
