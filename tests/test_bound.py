"""The variational bound in closed form: Gaussian data with the exact denoiser.

Its terms are quadratic in data and noise, so three Gauss-Hermite nodes of each give exact expectations.
"""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.bound import gaussian_kl, negative_log_likelihood, prior_term, variances
from ldm.denoiser import split_output
from ldm.errors import UserError
from ldm.objective import Objective
from ldm.parameterization import target_of
from ldm.process import Gaussian
from ldm.schedule import RectifiedFlow, Schedule

MEAN, STD = 0.7, 0.4
ENTROPY = math.log2(2 * math.pi * math.e * STD**2) / 2  # of the data, in bits
FRACTION = 0.3
PATHS = {
    "linear": Schedule.build("linear", 100, 0.001, 0.2),
    "cosine": Schedule.build("cosine", 60),
    "zero": Schedule.build("scaled_linear", 80, zero_terminal_snr=True),
    "flow": Schedule.build("flow", 70),
    "shifted": Schedule.build("flow", 70, shift=2.5),
}
CASES = [
    *(("linear", target) for target in ("eps", "x0", "v", "flow")),
    ("cosine", "eps"),
    ("zero", "v"),
    ("zero", "x0"),
    ("flow", "flow"),
    ("flow", "v"),
    ("shifted", "flow"),
]
VARIANCES = ("fixed_small", "fixed_large", "learned")


def nodes(schedule):
    """Return x0, noise (T n, 1, 1, 1) and index (T n,) of each index and node, and a function to expectations (T,)."""
    z, w = np.polynomial.hermite_e.hermegauss(3)
    first, second = (torch.from_numpy(g).flatten().repeat(schedule.T).view(-1, 1, 1, 1) for g in np.meshgrid(z, z))
    weights = torch.from_numpy(np.outer(w, w).flatten() / w.sum() ** 2)
    index = torch.arange(schedule.T).repeat_interleave(len(weights))
    return MEAN + STD * first, second, index, lambda terms: terms.double().view(schedule.T, -1) @ weights


def best(schedule, target, fraction=None):
    """Return the exact network, E[x0 | x_t] as the target; `fraction` (T,), if given, is its variance output."""

    def network(x_t, given, condition):
        t = given.double() / schedule.T if isinstance(schedule, RectifiedFlow) else (given + 1).double() / schedule.T
        # A flow's network receives sigma T, from which its unshifted schedule gives alpha and sigma.
        path = RectifiedFlow(schedule.T) if isinstance(schedule, RectifiedFlow) else schedule
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x_t - alpha * MEAN)
        output = target_of(target, x0, (x_t - alpha * x0) / sigma, alpha, sigma)
        if fraction is None:
            return output
        return torch.cat([output, (2 * fraction.repeat_interleave(len(x_t) // schedule.T) - 1).view(-1, 1, 1, 1)], 1)

    return network


def terms(schedule, target, variance, network, dtype=torch.float64):
    x0, noise, index, expected = nodes(schedule)
    objective = Objective(schedule, target, kind="vlb", variance=variance)
    prior = expected(prior_term(x0.to(dtype), schedule.level(schedule.T - 1)))[0]
    return expected(objective.bound(network, x0.to(dtype), index, noise.to(dtype), torch.empty(0))), prior.item()


def levels(schedule):
    """Return (alpha_s, sigma_s, alpha_t, sigma_t) of each step, the first one from clean data."""
    alpha, sigma = schedule.alpha.tolist(), schedule.sigma.tolist()
    return list(zip([1.0, *alpha[:-1]], [0.0, *sigma[:-1]], alpha, sigma, strict=True))


def left(alpha, sigma):
    """Return the variance of x0 given x_t."""
    return 1 / (STD**-2 + (alpha / sigma) ** 2)


def closed_form(schedule, variance):
    """Return the terms (T,) in bits by conditioning the joint Gaussian of x_s and x_t given x0."""
    small, large, gain = [], [], []
    for alpha_s, sigma_s, alpha_t, sigma_t in levels(schedule):
        covariance = alpha_t / alpha_s * sigma_s**2
        small.append(sigma_s**2 - covariance**2 / sigma_t**2)
        large.append(sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2)
        gain.append(alpha_s - covariance / sigma_t**2 * alpha_t)  # of x0 in the posterior's mean
    small[0] = small[1]  # at index 0 the posterior is a point, and the variance of index 1 replaces it
    result = []
    for i, (_, _, alpha, sigma) in enumerate(levels(schedule)):
        share = {"fixed_small": 0.0, "fixed_large": 1.0, "learned": FRACTION}[variance]
        p = small[i] ** (1 - share) * large[i] ** share
        error = left(alpha, sigma)
        if i == 0:
            result.append((math.log(2 * math.pi * p) + error / p) / 2)
        else:
            result.append((math.log(p / small[i]) + (small[i] + gain[i] ** 2 * error) / p - 1) / 2)
    return torch.tensor(result, dtype=torch.float64) / math.log(2)


def closed_prior(schedule):
    alpha, sigma = schedule.alpha[-1].item(), schedule.sigma[-1].item()
    return (alpha**2 * (MEAN**2 + STD**2) + sigma**2 - 1 - 2 * math.log(sigma)) / 2 / math.log(2)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("name", "target"), CASES)
def test_the_bound_of_a_gaussian(name, target, variance):
    schedule = PATHS[name]
    fraction = torch.full((schedule.T,), FRACTION, dtype=torch.float64) if variance == "learned" else None
    each, prior = terms(schedule, target, variance, best(schedule, target, fraction))
    expected = closed_form(schedule, variance)
    torch.testing.assert_close(each, expected, rtol=1e-8, atol=1e-9)
    assert prior == pytest.approx(closed_prior(schedule), rel=1e-9, abs=1e-12)
    assert each.sum().item() + prior == pytest.approx(expected.sum().item() + closed_prior(schedule), abs=1e-7)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("target", ["eps", "v"])
def test_the_bound_in_float32(target, variance):
    # The precision of training: a thousand terms, some of them differences of nearly equal numbers.
    schedule = Schedule.build("scaled_linear")
    fraction = torch.full((schedule.T,), FRACTION) if variance == "learned" else None
    each, prior = terms(schedule, target, variance, best(schedule, target, fraction), torch.float32)
    expected = closed_form(schedule, variance).sum().item() + closed_prior(schedule)
    assert each.sum().item() + prior == pytest.approx(expected, abs=1e-3)


def test_the_bound_of_half_precision_latents_is_float32():
    schedule = Schedule.build("scaled_linear")
    x0, noise, index, _ = nodes(schedule)
    objective, x0, noise = Objective(schedule, "v"), x0.bfloat16(), noise.bfloat16()

    def network(x_t, given, condition):
        return torch.zeros_like(x_t)

    got = objective.bound(network, x0, index, noise, torch.empty(0))
    assert got.dtype == torch.float32
    exact = objective.bound(network, x0.double(), index, noise.double(), torch.empty(0))
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)


def exact_reverse(schedule):
    """Return each step's true variance as a fraction, (T,): x_s given x_t of Gaussian data is Gaussian."""
    result = []
    small, large = (v.tolist() for v in variances(schedule))
    for (alpha_s, sigma_s, alpha_t, sigma_t), low, high in zip(levels(schedule), small, large, strict=True):
        before, after = ((a * STD) ** 2 + s**2 for a, s in ((alpha_s, sigma_s), (alpha_t, sigma_t)))
        true = before - (alpha_t / alpha_s * before) ** 2 / after
        result.append(math.log(true / low) / math.log(high / low))
    return torch.tensor(result, dtype=torch.float64)


def mismatch(schedule):
    """Return the part that no reverse process can remove: KL(q(x_{T-1}) || N(0, 1)) in bits."""
    alpha, sigma = schedule.alpha[-1].item(), schedule.sigma[-1].item()
    last = Normal(alpha * MEAN, math.hypot(alpha * STD, sigma))
    return kl_divergence(last, Normal(0.0, 1.0)).item() / math.log(2)


@pytest.mark.parametrize(("name", "target"), CASES)
def test_with_the_true_variance_the_bound_is_the_entropy(name, target):
    # The model is then the reversed chain of the data: the bound is -log p(x0), and its mean is the entropy at any T.
    schedule = PATHS[name]
    fraction = exact_reverse(schedule).requires_grad_()
    if not isinstance(schedule, RectifiedFlow):  # a flow's steps may have a variance above the largest
        assert fraction.min() >= 0
        assert fraction.max() <= 1
    each, prior = terms(schedule, target, "learned", best(schedule, target, fraction))
    assert each.sum().item() + prior == pytest.approx(ENTROPY + mismatch(schedule), abs=1e-6)
    # Each step's term is least at the true variance.
    (slope,) = torch.autograd.grad(each.sum(), fraction)
    assert slope.abs().max() < 1e-6


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("name", "target"), CASES)
def test_no_network_is_below_the_entropy(name, target, variance):
    schedule = PATHS[name]
    for share in (0.0, 0.5, 1.0) if variance == "learned" else (None,):
        fraction = None if share is None else torch.full((schedule.T,), share, dtype=torch.float64)
        for gain, shift in ((1.0, 0.0), (0.9, 0.02), (1.05, -0.01)):
            network = best(schedule, target, fraction)

            def wrong(x_t, given, condition, network=network, gain=gain, shift=shift):
                output = network(x_t, given, condition)
                return torch.cat([gain * output[:, :1] + shift, output[:, 1:]], 1)

            each, prior = terms(schedule, target, variance, wrong)
            assert each.sum().item() + prior > ENTROPY + mismatch(schedule)


def gaps(family, variance, sizes):
    """Return the bound minus the entropy and the mismatch of the last level, for each T."""
    result = []
    for T in sizes:
        schedule = Schedule.build("linear", T, 5 / T, 15 / T) if family == "linear" else Schedule.build("flow", T)
        target = "v" if family == "linear" else "flow"
        each, prior = terms(schedule, target, variance, best(schedule, target))
        result.append(each.sum().item() + prior - ENTROPY - mismatch(schedule))
    return result


@pytest.mark.parametrize("family", ["linear", "flow"])
def test_the_gap_to_the_entropy_falls_with_the_number_of_steps(family):
    # A step of large variance costs the square of its relative change of the marginal variance, of order 1 / T^2.
    # The sum is of order 1 / T, including the last decoder, whose variance is also large's, sigma_0^2.
    gap = gaps(family, "fixed_large", (500, 1000, 2000))
    assert gap[0] > gap[1] > gap[2] > 0
    assert gap[2] < 0.02
    assert gap[0] / gap[1] == pytest.approx(2, rel=0.03)
    assert gap[1] / gap[2] == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("family", ["linear", "flow"])
def test_small_variances_cost_the_same_at_any_number_of_steps(family):
    # At low noise sigma_i^2 grows as r_i = i + 1 (equal betas) or its square (flow), and the data are wide. A step's
    # term is (r_i / r_{i-1} - 1) / 2 nats, and the true variance would give log(r_i / r_{i-1}) / 2. The last decoder
    # has the uncertainty r_0 at a variance of (r_1 - r_0) r_0 / r_1. None of these falls with T.
    euler, bit = 0.5772156649015329, math.log(2)
    if family == "linear":  # sum of 1/i - log(1 + 1/i) is Euler's constant
        steps, decoder = euler / 2, 1 / 2
    else:  # sum of 2/i + 1/i^2 - 2 log(1 + 1/i)
        steps, decoder = euler + math.pi**2 / 12, 3 / 4
    expected = (steps + (math.log(decoder) + 1 / decoder - 1) / 2) / bit
    gap = gaps(family, "fixed_small", (1000, 4000))
    assert gap[1] == pytest.approx(expected, rel=0.06)
    assert abs(gap[1] - expected) < 0.4 * abs(gap[0] - expected)  # the rest is of order log(T) / T


def test_kl_and_likelihood_equal_torchs():
    generator = torch.Generator().manual_seed(0)
    mean_q, mean_p, x = torch.randn(3, 4, 2, 3, 3, generator=generator, dtype=torch.float64)
    var_q, var_p = torch.rand(2, 4, 1, 1, 1, generator=generator, dtype=torch.float64) + 0.1
    q, p = Gaussian(mean_q, var_q), Gaussian(mean_p, var_p)
    theirs = kl_divergence(Normal(mean_q, var_q.sqrt()), Normal(mean_p, var_p.sqrt()))
    torch.testing.assert_close(gaussian_kl(q, p), theirs.flatten(1).mean(1) / math.log(2))
    likelihood = Normal(mean_p, var_p.sqrt()).log_prob(x)
    torch.testing.assert_close(negative_log_likelihood(x, p), -likelihood.flatten(1).mean(1) / math.log(2))
    torch.testing.assert_close(gaussian_kl(q, Gaussian(mean_q, var_q)), torch.zeros(4, dtype=torch.float64))
    # A variance that differs between elements, as that of a network does.
    wide = torch.rand(4, 2, 3, 3, generator=generator, dtype=torch.float64) + 0.1
    theirs = kl_divergence(Normal(mean_q, var_q.sqrt()), Normal(mean_p, wide.sqrt()))
    torch.testing.assert_close(gaussian_kl(q, Gaussian(mean_p, wide)), theirs.flatten(1).mean(1) / math.log(2))


def training(kind, variance, schedule, output, target="v"):
    """Return the objective's losses at all indices of arbitrary images, for a network that returns `output` (T, …)."""
    x0, noise = torch.randn(2, schedule.T, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = (torch.arange(schedule.T, dtype=torch.float64) + 0.5) / schedule.T
    return Objective(schedule, target, kind=kind, variance=variance)(lambda *_: output, x0, u, noise, torch.empty(0))


@pytest.mark.parametrize(("name", "target"), [("linear", "eps"), ("zero", "v"), ("flow", "flow")])
def test_hybrid_trains_the_variance_and_keeps_the_gradient_of_the_mean(name, target):
    schedule = PATHS[name]
    output = torch.rand(schedule.T, 4, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1

    def gradient(kind, variance, output):
        output = output.clone().requires_grad_()
        losses = training(kind, variance, schedule, output, target)
        losses.weighted.mean().backward()
        return losses, output.grad

    simple, of_simple = gradient("simple", "fixed_small", output[:, :2])
    vlb, of_vlb = gradient("vlb", "learned", output)
    hybrid, of_hybrid = gradient("hybrid", "learned", output)
    # The mean's half has exactly the gradient of the simple loss, the variance's half a thousandth of the bound's.
    assert torch.equal(of_hybrid[:, :2], of_simple)
    torch.testing.assert_close(of_hybrid[:, 2:], of_vlb[:, 2:] / 1000, rtol=1e-9, atol=0)
    assert (of_vlb != 0).all()
    # The terms are summed over indices, so one of them represents T.
    torch.testing.assert_close(vlb.weighted, schedule.T * vlb.unweighted)
    torch.testing.assert_close(hybrid.weighted, simple.weighted + vlb.weighted / 1000)
    torch.testing.assert_close(hybrid.unweighted, simple.unweighted)


def test_the_variance_is_the_second_half_of_the_output():
    output = torch.linspace(-1, 1, 16).view(1, 4, 2, 2)
    prediction, fraction = split_output(output, 3)
    assert torch.equal(prediction, output[:, :3])
    assert fraction is not None
    torch.testing.assert_close(fraction, (output[:, 3:] + 1) / 2)
    prediction, fraction = split_output(output, 4)
    assert torch.equal(prediction, output)
    assert fraction is None


def test_a_network_must_have_the_channels_of_its_variance():
    schedule = PATHS["linear"]
    for variance, channels, needed in (("learned", 2, 4), ("learned", 3, 4), ("fixed_small", 4, 2)):
        output = torch.zeros(schedule.T, channels, 3, 3)
        with pytest.raises(UserError, match=rf"{channels} output channels: .* {variance} need {needed}"):
            training("vlb", variance, schedule, output)


@pytest.mark.parametrize(
    ("path", "parts", "names"),
    [
        ("linear", {"variance": "learned"}, "learned"),  # with simple
        ("linear", {"variance": "fixed_small", "kind": "hybrid"}, "fixed_small"),
        ("linear", {"variance": "fixed_large", "kind": "hybrid"}, "fixed_large"),
        ("zero", {"target": "eps"}, "eps"),
        ("flow", {"target": "eps"}, "eps"),
        ("shifted", {"target": "eps", "kind": "vlb"}, "eps"),
    ],
)
def test_incompatible_settings_are_refused(path, parts, names):
    with pytest.raises(UserError, match=names):
        Objective(PATHS[path], **parts)
