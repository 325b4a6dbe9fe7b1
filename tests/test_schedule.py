"""Schedules against their definition (the Markov chain of the betas) and against diffusers' tables."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from ldm.errors import UserError
from ldm.samplers import make_sampler
from ldm.schedule import Schedule
from ldm.spacing import make_plan

KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
SPACINGS = ("leading", "trailing", "linspace")


@pytest.mark.parametrize("T", [1000, 77])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_equal_diffusers(kind, T):
    theirs = DDPMScheduler(T, beta_start=0.00085, beta_end=0.012, beta_schedule=KINDS[kind])
    ours = Schedule.build(kind, T, 0.00085, 0.012)
    assert (ours.alpha_bar - theirs.alphas_cumprod.double()).abs().max() < 1e-6
    read = Schedule.from_diffusers(theirs.config)
    assert torch.equal(read.alpha_bar, ours.alpha_bar)


def test_closed_form_equals_the_chain():
    # q(x_i | x_{i-1}) = N(sqrt(1 - beta_i) x_{i-1}, beta_i), from a known x_0: mean and variance step by step.
    for kind in KINDS:
        schedule = Schedule.build(kind)
        alpha, sigma = schedule(torch.arange(1, schedule.T + 1, dtype=torch.float64) / schedule.T)
        mean, variance = 1.0, 0.0
        for i, beta in enumerate(schedule.betas.tolist()):
            mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
            assert alpha[i].item() == pytest.approx(mean, rel=1e-12)
            assert sigma[i].item() ** 2 == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_function_of_time(kind):
    schedule = Schedule.build(kind, 50)
    grid = torch.arange(1, 51, dtype=torch.float64) / 50
    alpha, sigma = schedule(grid)
    torch.testing.assert_close(alpha**2, schedule.alpha_bar, rtol=1e-14, atol=0)
    torch.testing.assert_close((alpha / sigma) ** 2, schedule.snr, rtol=1e-13, atol=0)
    # Between grid points (and down to 0 at t = 0) sigma / alpha is linear; everywhere alpha^2 + sigma^2 = 1.
    t = torch.linspace(0, 1, 997, dtype=torch.float64)
    alpha, sigma = schedule(t)
    ratio = np.interp(t * 50, np.arange(51), [0.0, *schedule.snr.rsqrt().tolist()])
    np.testing.assert_allclose(sigma / alpha, ratio, rtol=1e-12)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-15)
    assert (sigma.diff() > 0).all()
    assert (alpha[0], sigma[0]) == (1, 0)


def test_levels_match_their_index():
    schedule = Schedule.build("scaled_linear")
    for i in (0, 1, 13, 500, 998, 999):
        level = schedule.level(i)
        assert level.model_time == i
        assert isinstance(level.model_time, int)
        assert level.alpha**2 == pytest.approx(schedule.alpha_bar[i].item(), rel=1e-14)
    assert isinstance(schedule.level(3.0).model_time, int)
    assert schedule.level(957.375).model_time == 957.375
    clean = schedule.level(-1)
    assert (clean.alpha, clean.sigma, clean.is_last) == (1, 0, True)
    assert not schedule.level(0).is_last
    for outside in (-1.5, 999.5, float("nan")):
        with pytest.raises(ValueError, match="index"):
            schedule.level(outside)


def test_trained_betas_survive_json_bit_for_bit():
    ours = Schedule.build("cosine", 300)
    theirs = DDIMScheduler(300, trained_betas=ours.betas.tolist())
    read = Schedule.from_diffusers(json.loads(theirs.to_json_string()))
    assert torch.equal(read.betas, ours.betas)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, "beta_schedule None"),
        ({"beta_schedule": "exp"}, "exp"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1}, "shift -1"),
        ({"beta_schedule": "linear", "beta_start": 0.1}, "beta_end None"),
        ({"beta_schedule": "linear", "beta_start": -0.1, "beta_end": 0.1}, "-0.1"),
        ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": "many"}, "many"),
        ({"beta_schedule": "linear", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"trained_betas": [0.1, 0.2], "num_train_timesteps": 3}, "trained_betas has 2 values"),
        ({"trained_betas": [1.0, 0.1], "num_train_timesteps": 2}, "beta 1.0"),
        ({"trained_betas": [0.0, 0.1], "num_train_timesteps": 2}, "beta 0.0"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, "beta nan"),
        ({"trained_betas": [0.1, None], "num_train_timesteps": 2}, "numbers"),
        ({"trained_betas": 0.1}, "list"),
        *(
            (
                {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": T},
                "whole number from 1 to 1,000,000",
            )
            for T in (0, -1, True, 1.5, 1_000_001)
        ),
    ],
)
def test_unknown_names_are_refused(config, names):
    with pytest.raises(UserError, match=names):
        Schedule.from_diffusers(config)


def test_options_that_a_kind_does_not_have_are_refused():
    with pytest.raises(UserError, match="zero_terminal_snr: can't be set with schedule flow"):
        Schedule.build("flow", zero_terminal_snr=True)
    with pytest.raises(UserError, match=r"shift 2\.0: can't be used with schedule cosine"):
        Schedule.build("cosine", shift=2.0)
    assert Schedule.from_diffusers({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1}).T == 1


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("cls", "kind"),
    [
        (DDIMScheduler, "ddim"),
        (DDPMScheduler, "ddpm"),
        (EulerDiscreteScheduler, "euler"),
        (DPMSolverMultistepScheduler, "dpmpp_2m"),
    ],
)
def test_timesteps_equal_diffusers(cls, kind, spacing):
    schedule, grid = Schedule.build("scaled_linear"), make_sampler(kind).grid
    base = DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=1)
    theirs = cls.from_config(base.config)
    for n in [*range(2, 64), 103, 129, 333, 500, 998]:
        theirs.set_timesteps(n)
        # At 61, 103, … trailing steps rounding gives diffusers one timestep too many, at index -1.
        expected = theirs.timesteps.double().numpy()[:n]
        ours = [pair.now.model_time for pair in make_plan(schedule, grid, n, spacing).pairs]
        np.testing.assert_allclose(ours, expected, rtol=1e-7)  # Euler's are float32
        assert len(ours) == n
        assert min(ours) >= 0
        assert kind == "euler" or ours == expected.tolist()


@pytest.mark.parametrize(
    ("n", "spacing", "kind"),
    [
        (0, "leading", "ddpm"),
        (-3, "trailing", "ddpm"),
        (1001, "trailing", "ddpm"),
        (1000, "leading", "ddpm"),  # the offset takes the first one to index 1000
        (1000, "leading", "dpmpp_2m"),  # 1000 // 1001 = 0
        (1000, "linspace", "dpmpp_2m"),  # two equal timesteps
    ],
)
def test_steps_that_do_not_fit_are_refused(n, spacing, kind):
    schedule, grid = Schedule.build("scaled_linear"), make_sampler(kind).grid
    with pytest.raises(UserError, match=str(n)):
        make_plan(schedule, grid, n, spacing)


def test_the_offset_of_leading_steps_must_fit():
    schedule, grid = Schedule.build("scaled_linear"), make_sampler("ddpm").grid
    assert len(make_plan(schedule, grid, 999, "leading", steps_offset=1).pairs) == 999
    with pytest.raises(UserError, match="steps_offset -1"):
        make_plan(schedule, grid, 10, "leading", steps_offset=-1)
