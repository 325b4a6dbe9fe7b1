"""Draw the figures of mathematics.md with the package's own functions: python docs/figures.py (needs matplotlib)."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from ldm.bound import variances
from ldm.denoiser import Denoised
from ldm.objective import edm, level_weight, min_snr, p2
from ldm.parameterization import error_ratio
from ldm.process import probability_flow, transition
from ldm.schedule import Level, Schedule
from ldm.spacing import LevelPair
from ldm.steps import Heun, Multistep, Step, UniPC, sample

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent / "figures"
SCHEDULES = {
    "linear": Schedule.build("linear", beta_start=1e-4, beta_end=0.02),
    "scaled linear": Schedule.build("scaled_linear"),
    "scaled linear, zero terminal SNR": Schedule.build("scaled_linear", zero_terminal_snr=True),
    "cosine": Schedule.build("cosine"),
    "sigmoid": Schedule.build("sigmoid", beta_start=1e-4, beta_end=0.02),
    "flow": Schedule.build("flow"),
    "flow, shift 3": Schedule.build("flow", shift=3.0),
}


def schedules() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, schedule in SCHEDULES.items():
        t = (torch.arange(schedule.T) + 1) / schedule.T
        left.plot(t, schedule.alpha, label=name)
        right.plot(t[:-1], 2 * (schedule.alpha / schedule.sigma).log()[:-1])
    left.set(xlabel="t", ylabel="alpha_t, factor of the data in x_t", title="Signal")
    right.set(xlabel="t", ylabel="log SNR", ylim=(-12, 14), title="Signal-to-noise ratio")
    left.legend(fontsize=7)
    save(figure, "schedules")


def posterior_variances() -> None:
    figure, axes = plt.subplots(figsize=(5, 3.6))
    for name in ("linear", "scaled linear", "cosine"):
        small, large = variances(SCHEDULES[name])
        axes.semilogy(small, label=f"{name}: small")
        axes.semilogy(large, "--", color=axes.lines[-1].get_color(), label="large")
    axes.set(xlabel="index i", ylabel="variance of p(x_{i-1} | x_i)", title="Two bounds on a reverse step's variance")
    axes.legend(fontsize=7)
    save(figure, "variances")


def weightings() -> None:
    schedule = SCHEDULES["scaled linear"]
    alpha, sigma = schedule.alpha, schedule.sigma
    log_snr = schedule.snr.log()
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name, weight in (
        ("eps, uniform", error_ratio("eps", alpha, sigma)),
        ("x0, uniform", error_ratio("x0", alpha, sigma)),
        ("v, uniform (edm with sigma_data 1)", error_ratio("v", alpha, sigma)),
        ("flow, uniform", error_ratio("flow", alpha, sigma)),
        ("min-SNR-5", level_weight(min_snr(5), "x0", alpha, sigma)),
        ("P2", level_weight(p2(), "x0", alpha, sigma)),
        ("edm, sigma_data 0.5", level_weight(edm(0.5), "x0", alpha, sigma)),
    ):
        axes.semilogy(log_snr, weight, label=name)
    axes.set(
        xlabel="log SNR",
        ylabel="weight of the squared error of x0",
        ylim=(1e-3, 1e3),
        title="Weight of the error in each loss",
    )
    axes.legend(fontsize=7)
    save(figure, "weightings")


def two_points(x_t: Tensor, level: Level) -> Denoised:
    """Return E[x0 | x_t] for data that are -1 or 1 with equal probability."""
    return Denoised(torch.tanh(level.alpha / level.sigma**2 * x_t))


def both_ways() -> None:
    """Plot paths of the Markov chain from two points to noise, and of the probability flow from noise to them."""
    schedule, generator = SCHEDULES["scaled linear"], torch.Generator().manual_seed(0)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    walks = [torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(6)]
    for s, t in pairwise(schedule.level(i) for i in range(-1, schedule.T)):
        mean, variance = transition(walks[-1], s, t)
        walks.append(mean + variance**0.5 * torch.randn(mean.shape, generator=generator, dtype=mean.dtype))
    left.plot(torch.arange(schedule.T + 1) / schedule.T, torch.stack(walks), linewidth=0.6)
    velocity, times = probability_flow(two_points, schedule), torch.linspace(0.999, 0.001, 500).tolist()
    flow = [torch.linspace(-2.2, 2.2, 12, dtype=torch.float64)]
    for t, s in pairwise(times):
        flow.append(flow[-1] + (s - t) * velocity(flow[-1], t))
    right.plot(times, torch.stack(flow), linewidth=0.9)
    left.set(xlabel="t", ylabel="x_t", title="q(x_t | x_s), from data to noise")
    right.set(xlabel="t", title="The probability flow, from noise to data", xlim=(1.05, -0.05))
    save(figure, "both_ways")


MEAN, STD = 0.7, 0.4


def exact(x_t: Tensor, level: Level) -> Denoised:
    """Return E[x0 | x_t] for data ~ N(MEAN, STD^2)."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    return Denoised(MEAN + gain * (x_t - level.alpha * MEAN))


def no_noise() -> Tensor:
    raise AssertionError("solvers of the ODE draw none")


def convergence() -> None:
    """Plot the solvers' errors on the probability-flow ODE of a Gaussian, from half-log-SNR -3 to 1.5."""
    figure, axes = plt.subplots(figsize=(5, 3.6))
    steps = [5, 10, 20, 40, 80, 160, 320]
    kinds: dict[str, tuple[Callable[[], Step], int]] = {
        "DDIM": (partial(Multistep, 1), 1),
        "DPM++ 2M": (partial(Multistep, 2), 1),
        "UniPC": (UniPC, 1),
        "Heun": (Heun, 2),
    }
    for name, (make, evaluations) in kinds.items():
        errors = []
        for n in steps:
            levels = []
            for k in range(n + 1):
                ratio = math.exp(3 - 4.5 * k / n)
                levels.append(Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio), 0))
            first, last = levels[0], levels[-1]
            x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
            wide = [math.hypot(level.alpha * STD, level.sigma) for level in (first, last)]
            truth = last.alpha * MEAN + wide[1] / wide[0] * (x - first.alpha * MEAN)
            made = sample(exact, x, [LevelPair(*ends) for ends in pairwise(levels)], make(), no_noise)
            errors.append((made - truth).abs().max().item())
        slope = math.log2(errors[-2] / errors[-1])
        axes.loglog([n * evaluations for n in steps], errors, "o-", label=f"{name}: order {slope:.2f}")
        print(f"{name}: order {slope:.3f}")
    axes.set(xlabel="evaluations of the network", ylabel="greatest error", title="Error on a Gaussian's ODE")
    axes.legend(fontsize=8)
    save(figure, "convergence")


def save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.png", dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()  # refuses arguments, and prints --help
    schedules()
    posterior_variances()
    weightings()
    both_ways()
    convergence()
