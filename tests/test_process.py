"""The forward process and its reverse against Bayes' rule, against the moments' ODEs and against exact denoisers."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ldm.denoiser import Denoised
from ldm.parameterization import target_of
from ldm.process import (
    Gaussian,
    drift_and_diffusion,
    marginal,
    posterior,
    probability_flow,
    reverse_variance,
    score,
    step_variance,
    transition,
)
from ldm.schedule import BetaSchedule, RectifiedFlow, Schedule
from support.draws import draw

PATHS = {
    "linear": Schedule.build("linear", 200, 0.0005, 0.1),
    "cosine": Schedule.build("cosine", 200),
    "zero": Schedule.build("scaled_linear", 200, zero_terminal_snr=True),
    "flow": Schedule.build("flow", 200),
    "shifted": Schedule.build("flow", 200, shift=3.0),
}
BETAS = [name for name, schedule in PATHS.items() if isinstance(schedule, BetaSchedule)]
PAIRS = [(1, 0), (100, 99), (199, 198), (70, 3), (199, 0), (120.5, 33.25)]  # (t, s): neighbours, far apart, in between
MIXTURES = {
    "gaussian": ([1.0], [0.7], [0.4]),
    "mixture": ([0.3, 0.7], [-1.2, 0.8], [0.3, 0.6]),
}


def log_density(x, g):
    return Normal(g.mean, math.sqrt(g.variance)).log_prob(x)


def noised(mixture, level):
    """Return the density of x_t: each component of the data's mixture, scaled and widened."""
    weight, mean, std = torch.tensor(mixture, dtype=torch.float64)
    return MixtureSameFamily(
        Categorical(weight), Normal(level.alpha * mean, (level.alpha**2 * std**2 + level.sigma**2).sqrt())
    )


def exact(mixture):
    """Return E[x0 | x_t]: each component's conditional mean, weighted by its probability given x_t."""

    def denoise(x, level):
        weight, mean, std = torch.tensor(mixture, dtype=torch.float64)
        variance = level.alpha**2 * std**2 + level.sigma**2
        departure = x[..., None] - level.alpha * mean
        part = (weight.log() - departure**2 / (2 * variance) - variance.log() / 2).softmax(-1)
        return Denoised((part * (mean + level.alpha * std**2 / variance * departure)).sum(-1))

    return denoise


@pytest.mark.parametrize("name", PATHS)
def test_transitions_compose_to_the_marginal(name):
    schedule, x0 = PATHS[name], draw(2, 1, 2, 2)
    s, state = schedule.level(-1), Gaussian(x0, 0.0)
    for i in range(schedule.T):
        t = schedule.level(i)
        # The step is linear in x_s: the square of its mean at 1 scales the variance.
        scale, step = transition(torch.ones((), dtype=torch.float64), s, t), transition(state.mean, s, t)
        state = Gaussian(step.mean, scale.mean.item() ** 2 * state.variance + step.variance)
        expected = marginal(x0, t)
        torch.testing.assert_close(state.mean, expected.mean, rtol=1e-10, atol=1e-14)
        assert state.variance == pytest.approx(expected.variance, rel=1e-10)
        assert expected.variance == pytest.approx(schedule.sigma[i].item() ** 2, rel=1e-12)
        s = t


@pytest.mark.parametrize("name", BETAS)
def test_the_step_follows_from_the_betas(name):
    schedule, one = PATHS[name], torch.ones((), dtype=torch.float64)
    for i, beta in enumerate(schedule.betas.tolist()):
        s, t = schedule.level(i - 1), schedule.level(i)
        assert step_variance(s, t) == pytest.approx(beta, rel=1e-10)
        assert transition(one, s, t).mean.item() == pytest.approx(math.sqrt(1 - beta), rel=1e-10)
    for t, s in [(199, 0), (70, 3), (100, -1)]:  # many betas at once
        kept = (1 - schedule.betas[s + 1 : t + 1]).prod().item()
        assert step_variance(schedule.level(s), schedule.level(t)) == pytest.approx(1 - kept, rel=1e-10)


@pytest.mark.parametrize("name", PATHS)
def test_the_posterior_follows_bayes_rule(name):
    # The rule itself: q(x_s | x_t, x0) q(x_t | x0) = q(x_t | x_s) q(x_s | x0) at arbitrary points.
    schedule = PATHS[name]
    x0, first, second = draw(3, 40, 1, 1, 1)
    for i, j in PAIRS:
        t, s = schedule.level(i), schedule.level(j)
        x_s = s.alpha * x0 + 1.5 * s.sigma * first
        x_t = transition(x_s, s, t).mean + 1.5 * math.sqrt(step_variance(s, t)) * second
        left = log_density(x_s, posterior(x_t, x0, t, s)) + log_density(x_t, marginal(x0, t))
        right = log_density(x_t, transition(x_s, s, t)) + log_density(x_s, marginal(x0, s))
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BETAS)
def test_the_posterior_is_the_joint_gaussian_conditioned(name):
    # From the betas only: x_s and x_t given x0 are jointly Gaussian.
    schedule = PATHS[name]
    x_t, x0 = draw(2, 5, 1, 2, 2)
    for i, j in PAIRS[:-1]:
        kept_s, step = (1 - schedule.betas[: j + 1]).prod().item(), (1 - schedule.betas[j + 1 : i + 1]).prod().item()
        kept_t, covariance = kept_s * step, math.sqrt(step) * (1 - kept_s)
        gain = covariance / (1 - kept_t)
        got = posterior(x_t, x0, schedule.level(i), schedule.level(j))
        mean = math.sqrt(kept_s) * x0 + gain * (x_t - math.sqrt(kept_t) * x0)
        torch.testing.assert_close(got.mean, mean, rtol=1e-9, atol=1e-12)
        assert got.variance == pytest.approx(1 - kept_s - gain * covariance, rel=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_the_posterior_at_the_ends(name):
    schedule = PATHS[name]
    x_t, x0 = draw(2, 5, 1, 2, 2)
    clean = posterior(x_t, x0, schedule.level(40), schedule.level(-1))
    torch.testing.assert_close(clean.mean, x0)  # no uncertainty is left
    assert clean.variance == 0
    if schedule.zero_terminal_snr:  # pure noise contains no information, so q(x_s | x0) is left
        s = schedule.level(150)
        blind, expected = posterior(x_t, x0, schedule.level(199), s), marginal(x0, s)
        torch.testing.assert_close(blind.mean, expected.mean)
        assert blind.variance == pytest.approx(expected.variance, rel=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_each_item_of_a_batch_has_its_own_level(name):
    schedule = PATHS[name]
    x_t, x0 = draw(2, len(PAIRS), 2, 3, 3)
    levels = [(schedule.level(i), schedule.level(j)) for i, j in PAIRS]

    class Table:
        def __init__(self, which):
            self.alpha, self.sigma = (
                torch.tensor([getattr(pair[which], k) for pair in levels], dtype=torch.float64).view(-1, 1, 1, 1)
                for k in ("alpha", "sigma")
            )

    t, s = Table(0), Table(1)
    batch = posterior(x_t, x0, t, s)
    scores = score(x_t, x0, t)
    for k, (one_t, one_s) in enumerate(levels):
        single = posterior(x_t[k], x0[k], one_t, one_s)
        torch.testing.assert_close(batch.mean[k], single.mean)
        assert batch.variance[k].item() == pytest.approx(single.variance, rel=1e-12)
        torch.testing.assert_close(scores[k], score(x_t[k], x0[k], one_t))


def test_the_learned_variance_interpolates_between_logarithms():
    small, large = 0.002, 0.05
    assert reverse_variance("fixed_small", small, large) == small
    assert reverse_variance("fixed_large", small, large) == large
    fraction = torch.tensor([0.0, 0.5, 1.0, 0.25], dtype=torch.float64, requires_grad=True)
    variance = reverse_variance("learned", small, large, fraction)
    expected = [small, math.sqrt(small * large), large, small**0.75 * large**0.25]
    torch.testing.assert_close(variance.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(variance.sum(), fraction)  # d v / d fraction = v log(large / small)
    torch.testing.assert_close(slope, variance.detach() * math.log(large / small), rtol=1e-12, atol=0)
    # If s has no noise the variance is 0, whose logarithm mustn't make the step NaN.
    end = reverse_variance("learned", 0.0, large, torch.tensor([0.0, 0.5, 1.0]))
    assert end.isfinite().all()
    assert end[0] < 1e-12
    assert end[2].item() == pytest.approx(large, rel=1e-5)


@pytest.mark.parametrize("name", ["linear", "zero", "shifted"])
@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_the_score_is_the_gradient_of_the_log_density(mixture, name):
    for index in (0, 60.5, 150, 199):
        level = PATHS[name].level(index)
        x = (2 * draw(100)).requires_grad_()
        (gradient,) = torch.autograd.grad(noised(mixture, level).log_prob(x).sum(), x)
        found = score(x.detach(), exact(mixture)(x.detach(), level).x0, level)
        torch.testing.assert_close(found, gradient, rtol=1e-8, atol=1e-8)


def within_cells(T, last):
    """Return times off the grid, where the path has a derivative: three in each of the cells up to `last`."""
    return torch.tensor([(k + share) / T for k in range(last) for share in (0.1, 0.5, 0.9)], dtype=torch.float64)


def check_moments(schedule, t):
    f, g2 = drift_and_diffusion(schedule, t)
    h = 1e-4 / schedule.T
    (a_low, s_low), (a_high, s_high), (alpha, sigma) = schedule(t - h), schedule(t + h), schedule(t)
    torch.testing.assert_close(f * alpha, (a_high - a_low) / (2 * h), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(2 * f * sigma**2 + g2, (s_high**2 - s_low**2) / (2 * h), rtol=1e-6, atol=1e-7)
    assert (g2 > 0).all()
    if isinstance(schedule, BetaSchedule):  # the VP-SDE
        torch.testing.assert_close(f, -g2 / 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_the_sde_has_the_paths_moments(name):
    # d alpha / dt = f alpha and d sigma^2 / dt = 2 f sigma^2 + g^2.
    schedule = PATHS[name]
    check_moments(schedule, within_cells(schedule.T, schedule.T - 1))


@pytest.mark.parametrize("name", PATHS)
def test_the_sde_has_the_paths_moments_next_to_noise(name):
    # The last cell, which on a zero-terminal-SNR path ends at an infinite sigma / alpha.
    T = PATHS[name].T
    check_moments(PATHS[name], within_cells(T, T)[-3:])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_diffusion_coefficient_follows_from_the_betas(name):
    # Over a cell g^2 integrates to -log(1 - beta) for any path in between, because alpha falls by sqrt(1 - beta).
    schedule = PATHS[name]
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(12))
    t = (torch.arange(schedule.T)[:, None] + (points + 1) / 2) / schedule.T
    _, g2 = drift_and_diffusion(schedule, t)
    integral = (g2 * weights).sum(1) / (2 * schedule.T)
    torch.testing.assert_close(integral[:-1], -torch.log1p(-schedule.betas)[:-1], rtol=1e-9, atol=0)
    # For small betas g^2(t) is beta T: with betas below b the relative difference is of order b.
    gap = []
    for T in (500, 1000, 2000):
        fine = Schedule.build("linear", T, 0.1 / T, 20 / T)
        _, g2 = drift_and_diffusion(fine, (torch.arange(T) + 0.5) / T)
        gap.append((g2 / (fine.betas * T) - 1).abs().max().item())
        assert gap[-1] < 20 / T
    assert gap[0] > 1.8 * gap[1] > 3.2 * gap[2]


def test_the_flows_sde_in_closed_form():
    t = torch.linspace(0.001, 0.999, 101, dtype=torch.float64)
    f, g2 = drift_and_diffusion(RectifiedFlow(1000), t)
    torch.testing.assert_close(f, -1 / (1 - t), rtol=1e-12, atol=0)
    torch.testing.assert_close(g2, 2 * t / (1 - t), rtol=1e-12, atol=0)


def test_the_flows_ode_is_its_velocity():
    # On the straight path dx/dt = E[eps - x0 | x_t] (Liu et al. 2022), up to both ends.
    schedule, x = RectifiedFlow(1000), draw(50)
    for mixture in MIXTURES.values():
        velocity = probability_flow(exact(mixture), schedule)
        for t in (0.01, 0.3, 0.7, 1 - 1e-6):
            level = schedule.level(t * schedule.T - 1)
            x0 = exact(mixture)(x, level).x0
            expected = target_of("flow", x0, (x - level.alpha * x0) / level.sigma, level.alpha, level.sigma)
            # f x and the score's part nearly cancel, which magnifies an error of 1e-16 by 1 / (1 - t).
            torch.testing.assert_close(velocity(x, t), expected, rtol=1e-8, atol=1e-8)


def transported(velocity, x, start, end, steps):
    """Integrate by Heun's third-order method, which never evaluates a step's end, so no step reaches beyond a kink."""
    h = (end - start) / steps
    for t in (start + k * h for k in range(steps)):
        first = velocity(x, t)
        third = velocity(x + 2 / 3 * h * velocity(x + h / 3 * first, t + h / 3), t + 2 / 3 * h)
        x = x + h * (first + 3 * third) / 4
    return x


@pytest.mark.parametrize(("s", "t"), [(0, 1), (300, 301), (500, 900), (998, 999)])
def test_the_noise_of_one_step_is_regressed_on_all_the_noise(s, t):
    # Noise of x_t, sigma_t eps = alpha_ts sigma_s eps_s + sqrt(beta) z: E[z | x_t] = slope E[eps | x_t].
    schedule = Schedule.build("scaled_linear")
    s, t = schedule.level(s), schedule.level(t)
    earlier, step = t.alpha / t.sigma * s.sigma / s.alpha, math.sqrt(step_variance(s, t)) / t.sigma
    assert math.hypot(earlier, step) == pytest.approx(1)  # eps has variance 1, so the slope is the covariance
    eps_s, z = draw(2, 100_000, seed=7)
    eps = earlier * eps_s + step * z
    assert float((eps * z).mean()) == pytest.approx(step, abs=0.02)
    assert float((z - step * eps).var()) == pytest.approx(1 - step**2, abs=0.02)


CELLS = 32  # a power of 2, so steps start on the grid without rounding
ODES = {
    "linear": Schedule.build("linear", CELLS, 0.005, 0.3),
    "zero": Schedule.build("linear", CELLS, 0.005, 0.3, zero_terminal_snr=True),
    "flow": Schedule.build("flow", CELLS),
    "shifted": Schedule.build("flow", CELLS, shift=2.0),
}


@pytest.mark.parametrize("name", ODES)
def test_the_ode_keeps_standardised_values_of_a_gaussian(name):
    # Each point keeps its distance from the mean in standard deviations.
    schedule, (_, (mean,), (std,)) = ODES[name], MIXTURES["gaussian"]
    departures = torch.linspace(-3, 3, 7, dtype=torch.float64)

    def at(t):
        level = schedule.level(t * CELLS - 1)
        return level.alpha * mean + departures * math.hypot(level.alpha * std, level.sigma)

    velocity = probability_flow(exact(MIXTURES["gaussian"]), schedule)
    start, end = 1 / CELLS, 30 / CELLS
    errors = [(transported(velocity, at(start), start, end, n) - at(end)).abs().max() for n in (29, 29 * 4)]
    assert errors[1] < 2e-5
    assert errors[1] < errors[0] / 40  # third order would give 64: the rest is the steps' error and not the ODE's


@pytest.mark.parametrize("name", ["linear", "flow"])
def test_the_ode_keeps_a_mixtures_quantiles(name):
    # In one dimension trajectories can't cross, so the probability below each point is constant.
    schedule, mixture = ODES[name], MIXTURES["mixture"]
    start, end = 1 / CELLS, 30 / CELLS
    before, after = (noised(mixture, schedule.level(t * CELLS - 1)) for t in (start, end))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    moved = transported(probability_flow(exact(mixture), schedule), x, start, end, 29 * 4)
    torch.testing.assert_close(after.cdf(moved), before.cdf(x), rtol=0, atol=1e-5)
