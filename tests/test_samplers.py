"""Samplers against diffusers' schedulers, step by step over whole trajectories."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.guidance import Conditioned
from ldm.parameterization import PREDICTION_TYPE
from ldm.samplers import SamplerKind, make_sampler
from ldm.schedule import RectifiedFlow, Schedule
from ldm.spacing import make_plan
from ldm.steps import _phi, sample
from support.draws import draw

SCHEDULE = Schedule.build("scaled_linear")
SPACINGS = ("leading", "trailing", "linspace")
TARGETS = ("eps", "x0", "v")
SAMPLERS = [
    ("ddpm", 0.0),
    ("ddim", 0.0),
    ("ddim", 1.0),
    ("euler", 0.0),
    ("euler_ancestral", 0.0),
    ("heun", 0.0),
    ("dpmpp_2m", 0.0),
    ("dpmpp_2m_sde", 0.0),
    ("unipc", 0.0),
    ("unipc_b1", 0.0),
    ("unipc_3", 0.0),
    ("unipc_3_b1", 0.0),
]
SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "unipc_b1": UniPCMultistepScheduler,
    "unipc_3": UniPCMultistepScheduler,
    "unipc_3_b1": UniPCMultistepScheduler,
}
ON_KARRAS_ODE = ("euler", "euler_ancestral", "heun")  # there their state is x / alpha


def fake_network(x_t, index, condition, channels=4):
    """A network that mixes channels, nonlinear in image and time: any error of level, index or state is visible."""
    mixed = torch.einsum("oc,bchw->bohw", draw(channels, 4, seed=3) / 2, x_t.double())
    out = torch.tanh(mixed + torch.sin(index.float().double() / 200).view(-1, 1, 1, 1))
    return out + 0.3 * x_t.double().repeat(1, channels // 4, 1, 1)


def normal(generator, shape):
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def our_trajectory(schedule, kind, eta, target, spacing, n, noise, generator, variance="fixed_small"):
    route, states = make_plan(schedule, make_sampler(kind).grid, n, spacing, steps_offset=1), []
    learned = variance == "learned"

    def network(x, index, condition):
        return fake_network(x, index, condition, 8 if learned else 4)

    sample(
        Conditioned(Denoiser(network, target), None),
        route.start(noise),
        route.pairs,
        make_sampler(kind, eta).step(schedule, variance, n),
        normal(generator, noise.shape),
        callback=lambda k, pair, x: (states.append(x), x)[1],
    )
    return states


def their_scheduler(schedule, kind, target, spacing, variance="fixed_small"):
    karras = {"use_karras_sigmas": True} if spacing == "karras" else {}
    base = DDIMScheduler(
        schedule.T,
        trained_betas=schedule.betas.tolist(),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="linspace" if karras else spacing,
        prediction_type=PREDICTION_TYPE[target],
        rescale_betas_zero_snr=schedule.zero_terminal_snr,
    )
    special = {
        "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
        "unipc_b1": {"solver_type": "bh1"},
        "unipc_3": {"solver_order": 3},
        "unipc_3_b1": {"solver_order": 3, "solver_type": "bh1"},
        "ddpm": {"variance_type": "learned_range" if variance == "learned" else variance},
    }
    return SCHEDULERS[kind].from_config(base.config, **karras, **special.get(kind, {}))


def their_trajectory(schedule, kind, eta, target, spacing, n, noise, generator, variance="fixed_small"):
    scheduler = their_scheduler(schedule, kind, target, spacing, variance)
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        # Otherwise it starts with the second timestep if rounding makes the first two equal.
        scheduler.set_begin_index(0)
    x, states, channels = noise * scheduler.init_noise_sigma, [], 8 if variance == "learned" else 4
    draws = {
        "ddpm": {"generator": generator},
        "ddim": {"generator": generator, "eta": eta},
        "euler_ancestral": {"generator": generator},
    }
    for k, t in enumerate(scheduler.timesteps):
        options = draws.get(kind, {})
        if kind == "dpmpp_2m_sde":
            options = {"variance_noise": normal(generator, noise.shape)()}
        output = fake_network(scheduler.scale_model_input(x, t), t.expand(len(x)), None, channels)
        x = scheduler.step(output, t, x, **options).prev_sample
        if kind == "heun" and k % 2 == 0 and k + 1 < len(scheduler.timesteps):
            continue  # inside a pair
        states.append(x / (1 + scheduler.sigmas[k + 1] ** 2) ** 0.5 if kind in ON_KARRAS_ODE else x)
    return states


def diffusers_has(kind, target, spacing):
    """Return whether diffusers' scheduler has that prediction type and that spacing."""
    if kind in ("euler_ancestral", "heun") and target == "x0":
        return False
    return not (spacing == "karras" and kind in ("ddpm", "ddim", "euler_ancestral"))


TRAJECTORIES = [
    (kind, eta, target, spacing)
    for (kind, eta), target, spacing in itertools.product(SAMPLERS, TARGETS, [*SPACINGS, "karras"])
    if diffusers_has(kind, target, spacing)
]


def greatest_difference(*arguments, **options):
    """Return the greatest difference over the trajectory, relative to the greatest element of each state."""
    noise = draw(2, 4, 4, 4)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    ours = our_trajectory(*arguments, noise, generators[0], **options)
    theirs = their_trajectory(*arguments, noise, generators[1], **options)
    assert len(ours) == len(theirs)
    assert torch.equal(*(g.get_state() for g in generators))  # noise was drawn equally often
    if options:
        # If s has no noise, diffusers still adds noise of these variances to the finished image.
        ours, theirs = ours[:-1], theirs[:-1]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("kind", "eta", "target", "spacing"), TRAJECTORIES)
def test_trajectories_equal_diffusers(kind, eta, target, spacing):
    for n in (10, 25, 50):
        assert greatest_difference(SCHEDULE, kind, eta, target, spacing, n) < 1e-5


@pytest.mark.parametrize("target", ["x0", "v"])
@pytest.mark.parametrize(("kind", "eta"), [("ddim", 0.0), ("ddim", 0.9), ("ddpm", 0.0)])
def test_zero_terminal_snr_equals_diffusers(kind, eta, target):
    # diffusers' other schedulers replace the infinite noise level by 4096; its ddim with eta 1 gives NaN.
    schedule = Schedule.build("scaled_linear", zero_terminal_snr=True)
    for n in (10, 25, 50):
        assert greatest_difference(schedule, kind, eta, target, "trailing", n) < 1e-5


class In64Bits:
    """Stand-in for a module in which float32 is float64."""

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
@pytest.mark.parametrize(("kind", "eta", "target", "spacing"), TRAJECTORIES)
def test_trajectories_equal_diffusers_own_code_in_float64(kind, eta, target, spacing):
    # The differences of the other test are rounding of diffusers' float32, which is large at the cosine schedule's
    # ends. 7 and 30 don't divide 1000.
    for schedule in (SCHEDULE, Schedule.build("cosine")):
        for n in (7, 25, 30):
            assert greatest_difference(schedule, kind, eta, target, spacing, n) < 1e-9


@pytest.mark.usefixtures("diffusers_in_64_bits")
@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
@pytest.mark.parametrize("target", TARGETS)
def test_variances_of_ddpm_equal_diffusers(target, variance):
    for spacing in SPACINGS:
        for n in (10, 25, 50):
            assert greatest_difference(SCHEDULE, "ddpm", 0.0, target, spacing, n, variance=variance) < 1e-9


@pytest.mark.parametrize("n", [10, 25, 50])
@pytest.mark.parametrize(
    ("kind", "scheduler", "spacing", "shift"),
    [
        ("euler", FlowMatchEulerDiscreteScheduler, "trailing", 1.0),
        ("euler", FlowMatchEulerDiscreteScheduler, "trailing", 3.0),
        ("euler", FlowMatchEulerDiscreteScheduler, "linspace", 1.0),
        ("euler", FlowMatchEulerDiscreteScheduler, "linspace", 3.0),
        ("heun", FlowMatchHeunDiscreteScheduler, "linspace", 1.0),  # it accepts no levels as arguments
    ],
)
def test_flows_equal_diffusers(kind, scheduler, spacing, n, shift):
    theirs, schedule = scheduler(1000, shift), RectifiedFlow(1000, shift)
    if spacing == "linspace" and shift == 1:
        theirs.set_timesteps(n)
    else:  # By default it shifts its least level twice.
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / n if spacing == "trailing" else 1 / 1000, n).tolist())
    noise, states = draw(2, 4, 4, 4).float(), []
    route = make_plan(schedule, make_sampler(kind).grid, n, spacing)
    denoise = Conditioned(Denoiser(fake_network, "flow"), None)
    sample(
        denoise,
        route.start(noise),
        route.pairs,
        make_sampler(kind).step(schedule),
        None,
        lambda k, pair, x: (states.append(x), x)[1],
    )
    x, expected = noise, []
    for k, t in enumerate(theirs.timesteps):
        x = theirs.step(fake_network(x, t.expand(len(x)), None).float(), t, x).prev_sample
        if kind == "euler" or k % 2 == 1 or k + 1 == len(theirs.timesteps):
            expected.append(x)
    assert len(states) == len(expected) == n
    for ours, their in zip(states, expected, strict=True):
        assert (ours - their).abs().max() / their.abs().max() < 1e-5


@pytest.mark.parametrize("spacing", SPACINGS)
def test_legs_join_and_end_without_noise(spacing):
    for kind in ("ddpm", "euler", "heun", "dpmpp_2m", "unipc"):
        pairs = make_plan(SCHEDULE, make_sampler(kind).grid, 30, spacing).pairs
        assert all(a.next == b.now for a, b in pairwise(pairs))
        assert pairs[-1].next == SCHEDULE.level(-1)
    assert make_plan(SCHEDULE, make_sampler("ddim").grid, 30, spacing).pairs[-1].next == SCHEDULE.level(0)
    assert make_plan(SCHEDULE, make_sampler("ddim").grid, 30, spacing, set_alpha_to_one=True).pairs[
        -1
    ].next == SCHEDULE.level(-1)


def test_ddim_ends_without_noise_only_below_index_0():
    # 7 trailing steps end at index 142, from which 1000 // 7 leads to index 0 exactly.
    theirs = DDIMScheduler(1000, timestep_spacing="trailing", set_alpha_to_one=True)
    theirs.set_timesteps(7)
    assert theirs.timesteps[-1] == 142 == 1000 // 7
    assert make_plan(SCHEDULE, make_sampler("ddim").grid, 7, "trailing", set_alpha_to_one=True).pairs[
        -1
    ].next == SCHEDULE.level(0)


def draws(step, route):
    """Return how often a step draws noise over a trajectory."""
    asked = []
    noise = lambda: (asked.append(1), draw(1, 4, 2, 2))[1]  # noqa: E731
    sample(Conditioned(Denoiser(fake_network, "v"), None), draw(1, 4, 2, 2), route.pairs, step, noise)
    return len(asked)


@pytest.mark.parametrize("kind", get_args(SamplerKind))
def test_a_record_states_whether_its_step_draws_noise(kind):
    for eta in (0.0, 0.5) if kind == "ddim" else (0.0,):
        record = make_sampler(kind, eta)
        route = make_plan(SCHEDULE, record.grid, 5, "trailing")
        assert (draws(record.step(SCHEDULE), route) > 0) == record.draws_noise
        if record.draws_noise:
            # If the record doesn't state it, its step gets no source of noise.
            with pytest.raises(RuntimeError, match="its sampler has draws_noise=False"):
                draws(replace(record, draws_noise=False).step(SCHEDULE), route)


def test_names_of_samplers_are_imported_without_torch():
    code = "import sys, ldm.samplers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_invalid_combinations_are_refused():
    zero = Schedule.build("scaled_linear", zero_terminal_snr=True)
    with pytest.raises(UserError, match=r"eta 0\.5: can't be used with sampler euler"):
        make_sampler("euler", 0.5)
    for eta in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="eta"):
            make_sampler("ddim", eta).step(SCHEDULE)
    for schedule, kind, n, spacing, message in [
        (SCHEDULE, "ddpm", 1000, "leading", "1000 steps with leading"),
        (SCHEDULE, "euler", 0, "trailing", "0 sampling steps"),
        (RectifiedFlow(), "euler", 0, "trailing", "0 sampling steps"),
        (RectifiedFlow(50), "heun", 51, "trailing", "51 sampling steps"),
        (RectifiedFlow(), "euler", 10, "karras", "karras spacing: .* a flow's is infinite"),
        (zero, "euler", 10, "karras", "zero terminal SNR.; choose trailing"),
        (SCHEDULE, "ddim", 1, "leading", "choose trailing"),
        (SCHEDULE, "ddim", 10, "karras", "karras spacing: can't be used with a sampler that needs whole timesteps"),
    ]:
        with pytest.raises(UserError, match=message):
            make_plan(schedule, make_sampler(kind).grid, n, spacing)


@pytest.mark.parametrize("h", [1e-6, -1e-3, 0.3, -0.99, 1.0, -5.0])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_phi_functions_have_the_digits_of_exact_arithmetic(k: int, h: float) -> None:
    exact = sum(Fraction(h) ** j / math.factorial(j + k) for j in range(60))
    assert _phi(k, h) == pytest.approx(float(exact), rel=1e-15 if abs(h) < 1 else 1e-12)
