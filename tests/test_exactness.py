"""Samplers with an exact denoiser: their samples have the properties that theory gives, without another library."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from ldm.denoiser import Denoised, Denoiser
from ldm.guidance import Conditioned
from ldm.samplers import make_sampler
from ldm.schedule import Level, RectifiedFlow, Schedule
from ldm.spacing import LevelPair, make_plan
from ldm.steps import DDPM, Heun, Multistep, PredictorCorrector, UniPC, invert, sample
from support.draws import draw

SCHEDULE = Schedule.build("scaled_linear")
FLOW = RectifiedFlow(1000, shift=2.0)
MAKE = {
    "ddpm": DDPM,
    "ddpm_large": partial(DDPM, "fixed_large"),
    "ddim": Multistep,
    "ddim_0.4": partial(Multistep, 1, 0.4),
    "euler_ancestral": partial(Multistep, 1, 1.0),
    "heun": Heun,
    "heun_flow": partial(Heun, straight=True),
    "dpmpp_2m": partial(Multistep, 2),
    "dpmpp_2m_sde": partial(Multistep, 2, 1.0),
    "unipc": UniPC,
    "unipc_b1": partial(UniPC, b="h"),
    "unipc_3": partial(UniPC, 3),
    "predictor_corrector": PredictorCorrector,
}
SAMPLER = {kind: kind for kind in MAKE} | {"ddpm_large": "ddpm", "ddim_0.4": "ddim", "heun_flow": "heun"}
"""Sampler whose plan each step uses."""
ON_PATHS = [(kind, SCHEDULE) for kind in MAKE] + [(kind, FLOW) for kind in MAKE if kind != "heun"]
"""Karras' Heun starts at a finite noise level, and a flow doesn't."""
ODE = ("ddim", "heun", "heun_flow", "dpmpp_2m", "unipc", "unipc_b1", "unipc_3")


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


# -- Gaussian data --------------------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.4


def exact_gaussian(x_t, level, mean=MEAN, std=STD):
    """E[x0 | x_t] for data ~ N(mean, std^2)."""
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    return Denoised(mean + gain * (x_t - level.alpha * mean))


CENTRE = np.array([0.7, -0.3])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])


def gain(level):
    """G with E[x0 | x_t] = CENTRE + G (x_t - alpha CENTRE), for data ~ N(CENTRE, COVARIANCE)."""
    total = level.alpha**2 * COVARIANCE + level.sigma**2 * np.eye(2)
    return level.alpha * COVARIANCE @ np.linalg.inv(total)


def exact_correlated(x_t, level):
    """The same for images (b, 2, 1, 1)."""
    centre = torch.from_numpy(CENTRE).view(1, 2, 1, 1)
    return Denoised(centre + torch.einsum("oc,bchw->bohw", torch.from_numpy(gain(level)), x_t - level.alpha * centre))


def affine_map(pairs, step, start_std, draws):
    """Return the constant (2,) and the matrix (noises, 2) of a sampler, which is affine in its noise on Gaussian data.

    They are measured with one impulse at a time, which is exact and not statistical.
    """
    rows, calls = 2 * (draws + 1), [0]

    def impulse():
        z = torch.zeros(rows + 1, 2, 1, 1, dtype=torch.float64)
        for channel in range(2):
            z[1 + 2 * calls[0] + channel, channel] = 1
        calls[0] += 1
        return z

    x = sample(exact_correlated, start_std * impulse(), pairs, step, impulse)[..., 0, 0].numpy()
    assert calls[0] <= draws + 1
    return x[0], x[1:] - x[0]


def propagate(kind, pairs, start_std, eta):
    """Return mean (2,) and covariance (2, 2) at the end by the papers' formulas, on the departure d = x - alpha CENTRE.

    d's rows: its mean, then its coefficient of each noise so far; variances are sums of their squares.
    """
    d = np.concatenate([-pairs[0].now.alpha * CENTRE[None], start_std * np.eye(2)])
    memory = []  # x̂0's departure, lambda and other values of earlier pairs that a later one needs

    def noised(d, std):
        return np.concatenate([d, std * np.eye(2)])

    def padded(a, d):
        return np.concatenate([a, np.zeros((len(d) - len(a), 2))])

    for t, s in pairs:
        x0 = d @ gain(t).T
        a_t, s_t, a_s, s_s = t.alpha, t.sigma, s.alpha, s.sigma
        k_t, k_s = s_t / a_t, s_s / a_s  # Karras' noise levels
        with np.errstate(divide="ignore"):
            lam_t, lam_s = -np.log(k_t), -np.log(k_s)
        h = lam_s - lam_t
        if kind in ("ddpm", "ddpm_large", "predictor_corrector"):  # Ho et al. 2020, eq. 7
            beta = s_t**2 - (a_t / a_s * s_s) ** 2
            d = a_s * beta / s_t**2 * x0 + a_t / a_s * s_s**2 / s_t**2 * d
            if s_s > 0:
                d = noised(d, math.sqrt(beta if kind == "ddpm_large" else beta * s_s**2 / s_t**2))
            if kind == "predictor_corrector" and s_s > 0:  # Song et al. 2021, algorithm 5
                score = (a_s * (d @ gain(s).T) - d) / s_s**2
                size = 2 * 0.16**2 * s_s**2
                d = noised(d + size * score, math.sqrt(2 * size))
        elif kind.startswith("ddim"):  # Song et al. 2021, eq. 12 and 16
            std = eta * math.sqrt(s_s**2 / s_t**2 * (s_t**2 - (a_t / a_s * s_s) ** 2))
            d = a_s * x0 + math.sqrt(s_s**2 - std**2) * (d - a_t * x0) / s_t
            d = noised(d, std) if eta else d
        elif kind == "euler_ancestral":  # on y = x / alpha, k-diffusion's split
            up = math.sqrt(k_s**2 * (k_t**2 - k_s**2) / k_t**2)
            down = math.sqrt(k_s**2 - up**2)
            y = d / a_t + (down - k_t) * (d / a_t - x0) / k_t
            d = noised(a_s * y, a_s * up)
        elif kind == "heun":  # Karras et al. 2022, algorithm 1
            y, slope = d / a_t, (d / a_t - x0) / k_t
            end = y + (k_s - k_t) * slope
            if k_s > 0:
                end = y + (k_s - k_t) / 2 * (slope + (end - a_s * end @ gain(s).T) / k_s)
            d = a_s * end
        elif kind == "heun_flow":  # on the straight path (1 - r) x0 + r eps
            r_t, r_s = s_t / (a_t + s_t), s_s / (a_s + s_s)
            y, velocity = d / (a_t + s_t), (d - a_t * x0) / s_t - x0
            end = y + (r_s - r_t) * velocity
            if r_s > 0:
                there = end * (a_s + s_s)
                x0_end = there @ gain(s).T
                end = y + (r_s - r_t) / 2 * (velocity + (there - a_s * x0_end) / s_s - x0_end)
            d = end * (a_s + s_s)
        elif kind in ("dpmpp_2m", "dpmpp_2m_sde"):  # Lu et al. 2022, algorithm 2, and its SDE form
            drift = x0
            if memory and s_s > 0:
                last_x0, last_lam = memory[-1]
                drift = x0 + h / (2 * (lam_t - last_lam)) * (x0 - padded(last_x0, d))
            memory.append((x0, lam_t))
            if kind == "dpmpp_2m":
                d = s_s / s_t * d - a_s * math.expm1(-h) * drift
            else:
                shrink = math.exp(-h)
                d = s_s / s_t * shrink * d + a_s * (1 - shrink**2) * drift
                d = noised(d, s_s * math.sqrt(1 - shrink**2))
        elif kind == "unipc":  # Zhao et al. 2023, algorithms 1 and 2, their R_p and b_p solved as a linear system
            if memory:
                m0, lam_0, x, s_0 = memory[-1]
                g = lam_t - lam_0
                phi = [math.expm1(-g)]
                phi += [phi[0] / -g - 1]
                phi += [phi[1] / -g - 0.5]
                differences, ratios = [], []
                if len(memory) > 1:
                    ratios.append((memory[-2][1] - lam_0) / g)
                    differences.append((memory[-2][0] - m0) / ratios[0])
                ratios.append(1.0)
                differences.append(x0 - m0)
                if len(ratios) == 1:
                    weights = [0.5]
                else:
                    system = np.array([[1, 1], ratios])
                    weights = np.linalg.solve(system, np.array([phi[1], 2 * phi[2]]) / phi[0])
                correction = sum(w * difference for w, difference in zip(weights, differences, strict=True))
                d = s_t / s_0 * x - a_t * phi[0] * (m0 + correction)
            drift = x0
            if memory and s_s > 0:
                drift = x0 + 0.5 * (memory[-1][0] - x0) / ((memory[-1][1] - lam_t) / h)
            memory.append((x0, lam_t, d, s_t))
            d = s_s / s_t * d - a_s * math.expm1(-h) * drift
        else:
            raise AssertionError(kind)
    return pairs[-1].next.alpha * CENTRE + d[0], d[1:].T @ d[1:]


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", [kind for kind in MAKE if kind not in ("unipc_b1", "unipc_3")])
def test_mean_and_covariance_equal_the_closed_form(kind, spacing):
    route = make_plan(SCHEDULE, make_sampler(SAMPLER[kind]).grid, 20, spacing)
    constant, matrix = affine_map(route.pairs, MAKE[kind](), route.start_std, 45)
    mean, covariance = propagate(kind, route.pairs, route.start_std, 0.4 if kind == "ddim_0.4" else 0.0)
    np.testing.assert_allclose(constant, mean, atol=1e-9)
    np.testing.assert_allclose(matrix.T @ matrix, covariance, atol=1e-9)


@pytest.mark.parametrize(("kind", "schedule"), ON_PATHS)
def test_many_steps_reach_the_data(kind, schedule):
    route = make_plan(schedule, make_sampler(SAMPLER[kind]).grid, 1000, "trailing")
    constant, matrix = affine_map(route.pairs, MAKE[kind](), route.start_std, 2005)
    np.testing.assert_allclose(constant, CENTRE, atol=0.03)
    np.testing.assert_allclose(matrix.T @ matrix, COVARIANCE, atol=0.03)


def level_at(half_log_snr):
    alpha_bar = 1 / (1 + math.exp(-2 * half_log_snr))
    return Level(alpha_bar**0.5, (1 - alpha_bar) ** 0.5, 0)


@pytest.mark.parametrize("std", [0.1, 0.4, 1.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("ddim", 1),
        ("heun", 2),
        ("heun_flow", 2),
        ("dpmpp_2m", 2),
        ("unipc", 3),
        ("unipc_b1", 3),
        ("unipc_3", 4),
    ],
)
def test_order_of_convergence(kind, order, std):
    # On the ODE of a Gaussian the departure from alpha MEAN stays proportional to the standard deviation. The path ends
    # above zero noise, where no step is of lower order.
    def wide(level):
        return math.sqrt(level.alpha**2 * std**2 + level.sigma**2)

    x, errors = draw(8, 1, 1, 1), []
    for n in (320, 640):
        levels = [level_at(-3 + 4.5 * k / n) for k in range(n + 1)]
        first, last = levels[0], levels[-1]
        exact = last.alpha * MEAN + wide(last) / wide(first) * (x - first.alpha * MEAN)
        pairs = [LevelPair(*ends) for ends in pairwise(levels)]
        end = sample(lambda x, level: exact_gaussian(x, level, std=std), x, pairs, MAKE[kind](), no_noise)
        errors.append((end - exact).abs().max().item())
    # The first steps of unipc_3 have a lower order. Their errors are small, but not yet negligible.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4 if kind == "unipc_3" else 0.1)


# -- a mixture ------------------------------------------------------------------------------------------------

MODES = torch.tensor([-2.0, 0.5, 2.5], dtype=torch.float64)
SHARES = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
WIDTH = 0.1


def exact_mixture(x_t, level):
    """E[x0 | x_t] for data ~ sum of SHARES N(MODES, WIDTH^2)."""
    variance = level.alpha**2 * WIDTH**2 + level.sigma**2
    departure = x_t[..., None] - level.alpha * MODES
    share = torch.softmax(SHARES.log() - departure**2 / (2 * variance), -1)
    return Denoised((share * (MODES + level.alpha * WIDTH**2 / variance * departure)).sum(-1))


# The greatest bias of a mode's weight after 50 steps, beyond the chance of 20,000 samples. Samplers that follow the ODE
# split the noise where its flow separates. They are deterministic, so their samples vary less than independent ones.
BIAS = 0.01


@pytest.mark.parametrize(("kind", "schedule"), ON_PATHS)
def test_the_modes_of_a_mixture_have_their_weights(kind, schedule):
    route, generator, count = (
        make_plan(schedule, make_sampler(SAMPLER[kind]).grid, 50, "trailing"),
        torch.Generator().manual_seed(4),
        20000,
    )
    noise = lambda: torch.randn((count, 1, 1, 1), generator=generator, dtype=torch.float64)  # noqa: E731
    x = sample(exact_mixture, route.start(noise()), route.pairs, MAKE[kind](), noise).flatten()
    which = (x[:, None] - MODES).abs().argmin(1)
    shares = torch.bincount(which, minlength=3) / count
    assert ((shares - SHARES).abs() < 3 * (SHARES * (1 - SHARES) / count).sqrt() + BIAS).all(), shares
    away = (x - MODES[which]).abs()
    assert (away < 6 * WIDTH).double().mean() > 0.995


# -- a finite data set ----------------------------------------------------------------------------------------

POINTS = 2 * draw(5, 3, 2, 2, seed=8)


def exact_finite(x_t, level):
    """E[x0 | x_t] for data drawn from POINTS with equal probabilities."""
    distance = (x_t[:, None] - level.alpha * POINTS).flatten(2).square().sum(2)  # (b, points)
    return Denoised(torch.einsum("bp,pchw->bchw", torch.softmax(-distance / (2 * level.sigma**2), 1), POINTS))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("kind", MAKE)
def test_samples_of_a_finite_dataset_are_its_data(kind, spacing):
    route, generator = (
        make_plan(SCHEDULE, make_sampler(SAMPLER[kind]).grid, 50, spacing),
        torch.Generator().manual_seed(4),
    )
    noise = lambda: torch.randn((500, 3, 2, 2), generator=generator, dtype=torch.float64)  # noqa: E731
    x = sample(exact_finite, route.start(noise()), route.pairs, MAKE[kind](), noise)
    distance = (x[:, None] - POINTS).flatten(2).square().mean(2).sqrt()  # (b, points)
    nearest, which = distance.min(1)
    end = route.pairs[-1].next
    # ddim stops at index 0, with that level's noise, the others without noise. A sample midway between two points is
    # possible but unlikely.
    assert (nearest < 1e-6 + 3 * end.sigma).double().mean() >= 0.98
    shares = torch.bincount(which, minlength=len(POINTS)) / len(x)
    assert (shares - 0.2).abs().max() < 0.08  # 4.5 standard deviations


# -- relations between samplers and paths ---------------------------------------------------------------------


def rescaled(level, path):
    """The same noise level on another path."""
    scale = {"vp": math.hypot(level.alpha, level.sigma), "ve": level.alpha, "flow": level.alpha + level.sigma}[path]
    return Level(level.alpha / scale, level.sigma / scale, level.model_time)


@pytest.mark.parametrize("kind", [k for k in MAKE if k != "ddpm_large"])  # its variance depends on the path's scale
def test_samples_do_not_depend_on_the_path(kind):
    # With an exact denoiser, samples depend only on the noise levels and not on alpha.
    ends = []
    for path in ("vp", "ve", "flow"):
        levels = [rescaled(SCHEDULE.level(i), path) for i in range(999, 0, -37)] + [rescaled(SCHEDULE.level(-1), path)]
        generator = torch.Generator().manual_seed(3)
        noise = lambda g=generator: torch.randn((64, 1, 1, 1), generator=g, dtype=torch.float64)  # noqa: E731
        start = levels[0].sigma * noise()
        ends.append(sample(exact_mixture, start, [LevelPair(*ends) for ends in pairwise(levels)], MAKE[kind](), noise))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-10)


def nonlinear(x_t, level):
    return Denoised(torch.tanh(3 * x_t) * level.alpha + 0.1 * level.sigma)


def test_ddpm_is_ddim_with_eta_1():
    x, z = draw(4, 2, 3, 3, seed=1), draw(4, 2, 3, 3, seed=2)
    for now, after in [(999, 960), (500, 499), (41, 1), (1, -1)]:
        pair = SCHEDULE.level(now), SCHEDULE.level(after)
        a, b = (step(nonlinear, x, *pair, lambda: z) for step in (DDPM(), Multistep(1, 1.0)))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_eulers_step_on_karras_ode_and_on_a_flow_equals_ddims():
    x = draw(4, 2, 3, 3)
    for now, after in [(999, 957.375), (500, 300), (41, -1)]:
        t, s = SCHEDULE.level(now), SCHEDULE.level(after)
        y, noise, next_noise = x / t.alpha, t.sigma / t.alpha, s.sigma / s.alpha
        slope = (y - nonlinear(x, t).x0) / noise  # Karras et al. 2022, algorithm 1, line 4
        torch.testing.assert_close(
            make_sampler("euler").step(SCHEDULE)(nonlinear, x, t, s, no_noise),
            s.alpha * (y + (next_noise - noise) * slope),
        )
        t, s = FLOW.level(now), FLOW.level(after)
        x0 = nonlinear(x, t).x0
        velocity = (x - t.alpha * x0) / t.sigma - x0
        torch.testing.assert_close(
            make_sampler("euler").step(FLOW)(nonlinear, x, t, s, no_noise), x + (s.sigma - t.sigma) * velocity
        )


def test_a_single_datum_is_reached_exactly_by_any_ode_step():
    # With x̂0 = d throughout, the solution is alpha d + sigma eps with constant eps.
    d, eps = draw(3, 2, 2, 2, seed=1), draw(3, 2, 2, 2, seed=2)
    for kind in ODE:
        pairs = make_plan(SCHEDULE, make_sampler("dpmpp_2m").grid, 4, "trailing").pairs
        start, end = pairs[0].now, pairs[-1].next
        x = sample(lambda x, level: Denoised(d), start.alpha * d + start.sigma * eps, pairs, MAKE[kind](), no_noise)
        torch.testing.assert_close(x, end.alpha * d + end.sigma * eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["dpmpp_2m", "unipc"])
def test_a_multistep_step_forgets_a_finished_trajectory(kind):
    route, step, x = (
        make_plan(SCHEDULE, make_sampler(kind).grid, 8, "trailing"),
        make_sampler(kind).step(SCHEDULE),
        draw(2, 1, 2, 2),
    )
    first, second = (sample(nonlinear, x, route.pairs, step, no_noise) for _ in range(2))
    assert torch.equal(first, second)


# -- inversion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [False, True])
def test_inversion_recovers_the_noise_of_the_data(end):
    # Refinements converge to the noise from which DDIM generates the data again, up to rounding.
    pairs = make_plan(SCHEDULE, make_sampler("ddim").grid, 50, "trailing", set_alpha_to_one=end).pairs
    x = MODES[draw(64, 1, 1, 1).argsort(0) % 3] + WIDTH * draw(64, 1, 1, 1, seed=1)
    errors = []
    for refinements in (0, 2, 60):
        noise = invert(exact_gaussian, x, pairs, refinements)
        errors.append((sample(exact_gaussian, noise, pairs, Multistep(), no_noise) - x).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9


def test_inversion_of_gaussian_data_gives_standard_noise():
    pairs = make_plan(SCHEDULE, make_sampler("ddim").grid, 500, "trailing").pairs
    x = MEAN + STD * draw(20000, 1, 1, 1)
    noise = invert(exact_gaussian, x, pairs, 3)
    assert noise.mean().item() == pytest.approx(0, abs=0.08)  # alpha there is 0.068, so a part of the mean stays
    assert noise.std().item() == pytest.approx(1, abs=0.03)


# -- use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [*ON_PATHS, *((k, Schedule.build("linear", zero_terminal_snr=True)) for k in MAKE if k != "heun")],
)
def test_the_loop_never_synchronises_with_the_device(kind, schedule):
    # A meta tensor has no values: reading one would raise.
    route, x = (
        make_plan(schedule, make_sampler("dpmpp_2m").grid, 10, "trailing"),
        torch.empty(2, 4, 8, 8, device="meta"),
    )
    denoise = Conditioned(Denoiser(lambda x_t, index, c: x_t * index.view(-1, 1, 1, 1), "v", torch.bfloat16), x)
    end = sample(denoise, route.start(x), route.pairs, MAKE[kind](), lambda: torch.empty_like(x))
    assert (end.dtype, end.shape) == (x.dtype, x.shape)


@pytest.mark.parametrize("kind", [k for k in MAKE if k != "heun"])
def test_sampling_from_pure_noise_reaches_the_data(kind):
    # At zero terminal SNR, alpha is 0 and the noise level infinite.
    schedule, generator = Schedule.build("scaled_linear", zero_terminal_snr=True), torch.Generator().manual_seed(0)
    levels = [schedule.level(i) for i in [*range(999, 0, -4), -1]]
    noise = lambda: torch.randn((4000, 1, 1, 1), generator=generator, dtype=torch.float64)  # noqa: E731
    x = sample(exact_gaussian, noise(), [LevelPair(*ends) for ends in pairwise(levels)], MAKE[kind](), noise)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.03)
