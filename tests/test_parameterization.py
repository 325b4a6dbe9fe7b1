"""Conversions between predictions, guidance in each of them, and the border between state and network."""

import pytest
import torch

from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.guidance import ClassifierFree, Conditioned
from ldm.parameterization import (
    PREDICTION_TYPE,
    error_ratio,
    target_from_diffusers,
    target_of,
    to_eps,
    to_x0,
)
from ldm.schedule import Schedule

TARGETS = ("eps", "x0", "v")
SCHEDULE = Schedule.build("scaled_linear")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", TARGETS)
def test_round_trips(kind):
    x0, eps = draw(1000, 3, 2, 2, seed=1), draw(1000, 3, 2, 2, seed=2)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in SCHEDULE(t))
    x_t = alpha * x0 + sigma * eps
    output = target_of(kind, x0, eps, alpha, sigma)
    torch.testing.assert_close(to_x0(kind, output, x_t, alpha, sigma), x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(to_eps(kind, output, x_t, alpha, sigma), eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TARGETS)
def test_any_output_means_one_x0_and_one_eps(kind):
    # Of an arbitrary output (no true x0 behind it): x_t = alpha x0 + sigma eps still, and the way back is exact.
    x_t, output = draw(5, 3, 2, 2, seed=1), draw(5, 3, 2, 2, seed=2)
    for index in (0, 17, 500, 999):
        level = SCHEDULE.level(index)
        alpha, sigma = level.alpha, level.sigma
        x0, eps = (f(kind, output, x_t, alpha, sigma) for f in (to_x0, to_eps))
        torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, rtol=0, atol=1e-12)
        torch.testing.assert_close(target_of(kind, x0, eps, alpha, sigma), output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TARGETS)
def test_error_ratio(kind):
    x_t, output, nudge = draw(4, 3, 2, 2, seed=1), draw(4, 3, 2, 2, seed=2), draw(4, 3, 2, 2, seed=3)
    for index in (0, 300, 999):
        level = SCHEDULE.level(index)
        moved = [to_x0(kind, y, x_t, level.alpha, level.sigma) for y in (output, output + nudge)]
        ratio = nudge.square().sum() / (moved[1] - moved[0]).square().sum()
        torch.testing.assert_close(ratio, error_ratio(kind, SCHEDULE.snr[index]), rtol=1e-10, atol=0)


def test_names_of_diffusers():
    assert [target_from_diffusers(PREDICTION_TYPE[kind]) for kind in TARGETS] == list(TARGETS)
    with pytest.raises(UserError, match="flow_prediction"):
        target_from_diffusers("flow_prediction")


def network(x_t, index, condition):
    return torch.sin(3 * x_t + condition.view(-1, 1, 1, 1)) + index.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5, 12.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_guiding_x0_eps_or_v_is_the_same(kind, scale):
    x_t, positive, negative = draw(4, 3, 2, 2), draw(4, seed=5), draw(4, seed=6)
    for index in (0, 250, 999):
        level = SCHEDULE.level(index)
        guided = ClassifierFree(Denoiser(network, kind), positive, negative, scale)(x_t, level)
        for space in TARGETS:

            def said(condition, space=space, level=level):
                output = network(x_t, torch.full((4,), level.index), condition)
                x0, eps = (f(kind, output, x_t, level.alpha, level.sigma) for f in (to_x0, to_eps))
                return target_of(space, x0, eps, level.alpha, level.sigma)

            y_pos, y_neg = said(positive), said(negative)
            combined = y_neg + scale * (y_pos - y_neg)
            expected = to_x0(space, combined, x_t, level.alpha, level.sigma)
            torch.testing.assert_close(guided, expected, rtol=1e-11, atol=1e-11)


def test_guidance_evaluates_negative_then_condition_and_only_what_it_needs():
    seen = []

    def recording(x_t, index, condition):
        seen.append(condition.tolist())
        return network(x_t, index, condition)

    x_t, level = draw(2, 3, 2, 2), SCHEDULE.level(500)
    denoiser = Denoiser(recording, "v")
    positive, negative = torch.tensor([1.0, 2.0]).double(), torch.tensor([-1.0]).double()
    conditional = Conditioned(denoiser, positive)(x_t, level)
    assert torch.equal(ClassifierFree(denoiser, positive, negative, 1.0)(x_t, level), conditional)
    guided = ClassifierFree(denoiser, positive, negative, 2.0)(x_t, level)
    unguided = ClassifierFree(denoiser, positive, negative, 0.0)(x_t, level)
    assert seen == [[1, 2], [1, 2], [-1, -1, 1, 2], [-1, -1, 1, 2]]
    torch.testing.assert_close(unguided, Conditioned(denoiser, negative.expand(2))(x_t, level))
    torch.testing.assert_close(guided, 2 * conditional - unguided)


@pytest.mark.parametrize("kind", TARGETS)
def test_the_state_stays_exact_round_a_bf16_network(kind):
    x_t = draw(2, 3, 4, 4).float()
    given = []

    def coarse(x, index, condition):
        given.append((x.dtype, index))
        return torch.sin(3 * x)

    denoise = Denoiser(coarse, kind, torch.bfloat16)
    for index in (0, 999, 957.375):
        level = SCHEDULE.level(index)
        x0 = denoise(x_t, level, torch.zeros(2))
        # bfloat16 in the network's output only: from there on, no less than float32.
        output = torch.sin(3 * x_t.bfloat16()).double()
        expected = to_x0(kind, output, x_t.double(), level.alpha, level.sigma)
        assert x0.dtype == torch.float32
        assert (x0 - expected).abs().max() < 1e-6 * expected.abs().max()
        dtype, passed = given[-1]
        assert dtype == torch.bfloat16
        assert passed.tolist() == [index, index]
        assert passed.dtype == (torch.float32 if index == 957.375 else torch.int64)
