"""Samplers against diffusers' schedulers, and against what theory says of them where the denoiser is exact."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.guidance import Conditioned
from ldm.parameterization import PREDICTION_TYPE
from ldm.samplers import DDIM, DPMpp2M, Leg, ddpm, make_step, plan, sample
from ldm.schedule import Level, Schedule

SCHEDULE = Schedule.build("scaled_linear")
SPACINGS = ("leading", "trailing", "linspace")
SAMPLERS = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0), ("euler", 0.0), ("dpmpp_2m", 0.0)]
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_noise():
    raise AssertionError("a deterministic sampler drew noise")


# -- diffusers ------------------------------------------------------------------------------------------------


def fake_network(x_t, index, condition):
    """Nonlinear in the picture and in time, mixing channels: any error of level, index or state shows."""
    mixed = torch.einsum("oc,bchw->bohw", draw(4, 4, seed=3) / 2, x_t.double())
    return torch.tanh(mixed + torch.sin(index.float().double() / 200).view(-1, 1, 1, 1)) + 0.3 * x_t.double()


def our_trajectory(schedule, kind, eta, target, spacing, n, noise, generator):
    route, states = plan(schedule, kind, n, spacing, steps_offset=1), []
    sample(
        Conditioned(Denoiser(fake_network, target), None),
        route.start(noise),
        route.legs,
        make_step(kind, eta),
        lambda: torch.randn(noise.shape, generator=generator, dtype=noise.dtype),
        callback=lambda k, leg, x: states.append(x),
    )
    return states


def their_trajectory(schedule, kind, eta, target, spacing, n, noise, generator):
    base = DDIMScheduler(
        schedule.T,
        trained_betas=schedule.betas.tolist(),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing=spacing,
        prediction_type=PREDICTION_TYPE[target],
    )
    scheduler = SCHEDULERS[kind].from_config(base.config)
    scheduler.set_timesteps(n)
    options = {"ddpm": {"generator": generator}, "ddim": {"generator": generator, "eta": eta}}.get(kind, {})
    x, states = noise * scheduler.init_noise_sigma, []
    for k, t in enumerate(scheduler.timesteps):
        output = fake_network(scheduler.scale_model_input(x, t), t.expand(len(x)), None)
        x = scheduler.step(output, t, x, **options).prev_sample
        # Euler's state there is x / alpha.
        states.append(x / (1 + scheduler.sigmas[k + 1] ** 2) ** 0.5 if kind == "euler" else x)
    return states


def greatest_difference(*arguments):
    """Over the whole trajectory, relative to the greatest element of each state."""
    noise = draw(2, 4, 4, 4)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    ours = our_trajectory(*arguments, noise, generators[0])
    theirs = their_trajectory(*arguments, noise, generators[1])
    assert len(ours) == len(theirs)
    assert torch.equal(*(g.get_state() for g in generators))  # noise was drawn as often
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("target", PREDICTION_TYPE)
@pytest.mark.parametrize(("kind", "eta"), SAMPLERS)
def test_trajectories_equal_diffusers(kind, eta, target, spacing):
    for n in (10, 25, 50):
        assert greatest_difference(SCHEDULE, kind, eta, target, spacing, n) < 1e-5


class In64Bits:
    """A module in which float32 means float64."""

    def __init__(self, module):
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name):
        return getattr(self.module, name)


@pytest.fixture
def diffusers_in_64_bits(monkeypatch):
    for scheduler in SCHEDULERS.values():
        module = sys.modules[scheduler.__module__]
        for name in ("torch", "np"):
            monkeypatch.setattr(module, name, In64Bits(getattr(module, name)))


@pytest.mark.usefixtures("diffusers_in_64_bits")
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("target", PREDICTION_TYPE)
@pytest.mark.parametrize(("kind", "eta"), SAMPLERS)
def test_trajectories_equal_diffusers_own_code_in_float64(kind, eta, target, spacing):
    # All that the other test leaves is the rounding of diffusers' float32, also where that is large: the cosine
    # schedule's ends. 7 and 30 don't divide 1000.
    for schedule in (SCHEDULE, Schedule.build("cosine")):
        for n in (7, 25, 30):
            assert greatest_difference(schedule, kind, eta, target, spacing, n) < 1e-9


@pytest.mark.parametrize("spacing", SPACINGS)
def test_legs_join_and_end_clean(spacing):
    for kind in ("ddpm", "euler", "dpmpp_2m"):
        legs = plan(SCHEDULE, kind, 30, spacing).legs
        assert all(a.next == b.now for a, b in pairwise(legs))
        assert legs[-1].next == SCHEDULE.level(-1)
    assert plan(SCHEDULE, "ddim", 30, spacing).legs[-1].next == SCHEDULE.level(0)
    assert plan(SCHEDULE, "ddim", 30, spacing, set_alpha_to_one=True).legs[-1].next == SCHEDULE.level(-1)


def test_ddim_ends_clean_only_below_index_0():
    # 7 trailing steps end at index 142, from which 1000 // 7 leads to index 0 exactly.
    theirs = DDIMScheduler(1000, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(7)
    assert theirs.timesteps[-1] == 142 == 1000 // 7
    assert plan(SCHEDULE, "ddim", 7, "trailing", set_alpha_to_one=True).legs[-1].next == SCHEDULE.level(0)


# -- Gaussian data --------------------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.4


def exact_gaussian(x_t, level, mean=MEAN, std=STD):
    """E[x0 | x_t] for data ~ N(mean, std^2)."""
    gain = level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2)
    return mean + gain * (x_t - level.alpha * mean)


def orthonormal(size=4096):
    """Samples of mean exactly 0, variance exactly 1 and no correlation with one another: rows of a cosine basis.

    Moments of what an affine sampler makes of them are then exact, not statistical.
    """
    place = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    for k in range(1, size):
        yield (2**0.5 * torch.cos(k * place)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("kind", "eta"), [*SAMPLERS, ("ddim", 0.4)])
def test_moments_of_gaussian_data_are_carried_exactly(kind, eta, spacing):
    route, draws = plan(SCHEDULE, kind, 20, spacing), orthonormal()
    x = sample(exact_gaussian, route.start(next(draws)), route.legs, make_step(kind, eta), lambda: next(draws))

    # The papers' formulas on the state's departure from alpha MEAN: its mean, and its part in each noise, which add up
    # in variance. x̂0 - MEAN is `gain` times that departure.
    mean, variance = -route.legs[0].now.alpha * MEAN, route.start_std**2
    part, last = math.sqrt(variance), None  # for the multistep sampler, which has one noise only
    for t, s in route.legs:
        gain = t.alpha * STD**2 / (t.alpha**2 * STD**2 + t.sigma**2)
        if kind == "ddpm":  # Ho et al. 2020, eq. 7
            beta = 1 - (t.alpha / s.alpha) ** 2
            factor = s.alpha * beta / t.sigma**2 * gain + (t.alpha / s.alpha) * s.sigma**2 / t.sigma**2
            added = s.sigma**2 / t.sigma**2 * beta
        elif kind in ("ddim", "euler"):  # Song et al. 2021, eq. 12 and 16
            added = eta**2 * s.sigma**2 / t.sigma**2 * (1 - (t.alpha / s.alpha) ** 2)
            factor = s.alpha * gain + math.sqrt(s.sigma**2 - added) * (1 - t.alpha * gain) / t.sigma
        else:  # Lu et al. 2022, algorithm 2
            x0, added = gain * part, 0.0
            if s.sigma == 0:
                moved = x0
            else:
                lambdas = [math.log(v.alpha / v.sigma) for v in (t, s)]
                h = lambdas[1] - lambdas[0]
                d = x0 if last is None else x0 + h / (2 * (lambdas[0] - last[1])) * (x0 - last[0])
                moved = s.sigma / t.sigma * part - s.alpha * math.expm1(-h) * d
            last = x0, math.log(t.alpha / t.sigma)
            part, factor = moved, moved / part
        mean, variance = factor * mean, factor**2 * variance + added
    alpha_end = route.legs[-1].next.alpha
    assert x.mean().item() == pytest.approx(alpha_end * MEAN + mean, abs=1e-10)
    assert x.var(correction=0).item() == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize(("kind", "eta"), SAMPLERS)
def test_many_steps_reach_the_data(kind, eta):
    route, draws = plan(SCHEDULE, kind, 1000, "trailing"), orthonormal()
    x = sample(exact_gaussian, route.start(next(draws)), route.legs, make_step(kind, eta), lambda: next(draws))
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std(correction=0).item() == pytest.approx(STD, rel=0.02)


def level_at(half_log_snr):
    alpha_bar = 1 / (1 + math.exp(-2 * half_log_snr))
    return Level(0.5, alpha_bar**0.5, (1 - alpha_bar) ** 0.5, 0)


@pytest.mark.parametrize("std", [0.1, 0.4, 1.0, 2.0])
@pytest.mark.parametrize(("make", "order"), [(DDIM, 1), (DPMpp2M, 2)])
def test_order_of_convergence(make, order, std):
    # On the ODE of a Gaussian the departure from alpha MEAN keeps its share of the standard deviation; the path ends
    # above zero noise, where no step is of lower order.
    def wide(level):
        return math.sqrt(level.alpha**2 * std**2 + level.sigma**2)

    x, errors = draw(8, 1, 1, 1), []
    for n in (320, 640):
        levels = [level_at(-3 + 4.5 * k / n) for k in range(n + 1)]
        first, last = levels[0], levels[-1]
        exact = last.alpha * MEAN + wide(last) / wide(first) * (x - first.alpha * MEAN)
        legs = [Leg(*ends) for ends in pairwise(levels)]
        end = sample(lambda x, level: exact_gaussian(x, level, std=std), x, legs, make(), no_noise)
        errors.append((end - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


# -- relations between samplers -------------------------------------------------------------------------------


def nonlinear(x_t, level):
    return torch.tanh(3 * x_t) * level.alpha + 0.1 * level.sigma


def test_ddpm_is_ddim_with_eta_1():
    x, z = draw(4, 2, 3, 3, seed=1), draw(4, 2, 3, 3, seed=2)
    for now, after in [(999, 960), (500, 499), (41, 1), (1, -1)]:
        leg = SCHEDULE.level(now), SCHEDULE.level(after)
        a, b = (step(nonlinear, x, *leg, lambda: z) for step in (ddpm, DDIM(1.0)))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_eulers_step_on_the_ode_of_karras_is_ddims():
    x = draw(4, 2, 3, 3)
    for now, after in [(999, 957.375), (500, 300), (41, -1)]:
        t, s = SCHEDULE.level(now), SCHEDULE.level(after)
        y, noise, next_noise = x / t.alpha, t.sigma / t.alpha, s.sigma / s.alpha
        slope = (y - nonlinear(x, t)) / noise  # Karras et al. 2022, algorithm 1, line 4
        torch.testing.assert_close(
            make_step("euler")(nonlinear, x, t, s, no_noise), s.alpha * (y + (next_noise - noise) * slope)
        )


def test_a_single_datum_is_reached_exactly_by_any_ode_step():
    # With x̂0 = d throughout, the solution is alpha d + sigma eps with eps at rest.
    d, eps = draw(3, 2, 2, 2, seed=1), draw(3, 2, 2, 2, seed=2)
    for kind in ("ddim", "euler", "dpmpp_2m"):
        legs = plan(SCHEDULE, kind, 4, "trailing").legs
        start, end = legs[0].now, legs[-1].next
        x = sample(lambda x, level: d, start.alpha * d + start.sigma * eps, legs, make_step(kind), no_noise)
        torch.testing.assert_close(x, end.alpha * d + end.sigma * eps, rtol=0, atol=1e-12)


def test_a_multistep_step_forgets_a_finished_trajectory():
    route, step, x = plan(SCHEDULE, "dpmpp_2m", 8, "trailing"), make_step("dpmpp_2m"), draw(2, 1, 2, 2)
    first, second = (sample(nonlinear, x, route.legs, step, no_noise) for _ in range(2))
    assert torch.equal(first, second)


# -- a finite data set ----------------------------------------------------------------------------------------

POINTS = 2 * draw(5, 3, 2, 2, seed=8)


def exact_finite(x_t, level):
    """E[x0 | x_t] for data drawn from POINTS, all alike."""
    distance = (x_t[:, None] - level.alpha * POINTS).flatten(2).square().sum(2)  # (b, points)
    return torch.einsum("bp,pchw->bchw", torch.softmax(-distance / (2 * level.sigma**2), 1), POINTS)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("kind", "eta"), SAMPLERS)
def test_samples_of_a_finite_data_set_are_data(kind, eta, spacing):
    route, generator = plan(SCHEDULE, kind, 50, spacing), torch.Generator().manual_seed(4)
    noise = lambda: torch.randn((500, 3, 2, 2), generator=generator, dtype=torch.float64)  # noqa: E731
    x = sample(exact_finite, route.start(noise()), route.legs, make_step(kind, eta), noise)
    distance = (x[:, None] - POINTS).flatten(2).square().mean(2).sqrt()  # (b, points)
    nearest, which = distance.min(1)
    end = route.legs[-1].next
    # ddim stops at index 0, with that level's noise; the others at none. A sample midway between two is possible,
    # not likely.
    assert (nearest < 1e-6 + 3 * end.sigma).double().mean() >= 0.99
    shares = torch.bincount(which, minlength=len(POINTS)) / len(x)
    assert (shares - 0.2).abs().max() < 0.08  # 4.5 standard deviations


# -- use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "eta"), SAMPLERS)
def test_the_loop_waits_for_no_device(kind, eta):
    # A meta tensor has no numbers: whatever asked for one would raise.
    route, x = plan(SCHEDULE, kind, 10, "linspace"), torch.empty(2, 4, 8, 8, device="meta")
    denoise = Conditioned(Denoiser(lambda x_t, index, c: x_t * index.view(-1, 1, 1, 1), "v", torch.bfloat16), x)
    end = sample(denoise, route.start(x), route.legs, make_step(kind, eta), lambda: torch.empty_like(x))
    assert (end.dtype, end.shape) == (x.dtype, x.shape)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(UserError, match=r"eta 0\.5 with euler"):
        make_step("euler", 0.5)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="eta"):
            make_step("ddim", eta)
    with pytest.raises(UserError, match="1000 steps with leading"):
        plan(SCHEDULE, "ddpm", 1000, "leading")
