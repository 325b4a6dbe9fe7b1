"""Conversions between predictions, and the border between state and network."""

import pytest
import torch

from ldm.denoiser import Denoiser
from ldm.errors import UserError
from ldm.parameterization import (
    PREDICTION_TYPE,
    check_target,
    error_ratio,
    target_from_diffusers,
    target_of,
    to_eps,
    to_x0,
)
from ldm.schedule import RectifiedFlow, Schedule
from support.draws import draw

TARGETS = ("eps", "x0", "v", "flow")
SCHEDULE = Schedule.build("scaled_linear")
PATHS = {
    "vp": SCHEDULE,
    "flow": RectifiedFlow(),
    "shifted flow": RectifiedFlow(shift=3.0),
    "zero snr": Schedule.build("scaled_linear", zero_terminal_snr=True),
}
on_every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def levels(kind, path, *indices):
    """Return the levels at which the target has information about the image: eps has none at pure noise."""
    return [level for level in map(path.level, indices) if kind != "eps" or level.alpha > 0]


@on_every_path
@pytest.mark.parametrize("kind", TARGETS)
def test_round_trips(kind, path):
    last = 999 if kind == "eps" and path.zero_terminal_snr else 1000
    x0, eps = draw(last, 3, 2, 2, seed=1), draw(last, 3, 2, 2, seed=2)
    t = torch.arange(1, last + 1, dtype=torch.float64) / 1000
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path(t))
    x_t = alpha * x0 + sigma * eps
    output = target_of(kind, x0, eps, alpha, sigma)
    # The rounding of x_t, divided by an alpha or sigma down to 1e-4, leaves no more digits.
    torch.testing.assert_close(to_x0(kind, output, x_t, alpha, sigma), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(to_eps(kind, output, x_t, alpha, sigma), eps, rtol=0, atol=1e-11)


def test_each_target_follows_its_definition():
    # The papers' definitions, on a path that is neither variance-preserving nor straight.
    x0, eps, alpha, sigma = draw(2, 3, 2, 2, seed=1), draw(2, 3, 2, 2, seed=2), 0.6, 0.7
    predicted = {kind: target_of(kind, x0, eps, alpha, sigma) for kind in TARGETS}
    expected = {"eps": eps, "x0": x0, "v": 0.6 * eps - 0.7 * x0, "flow": eps - x0}
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-15)
    for kind in TARGETS:
        made = [f(kind, predicted[kind], alpha * x0 + sigma * eps, alpha, sigma) for f in (to_x0, to_eps)]
        torch.testing.assert_close(made, [x0, eps], rtol=0, atol=1e-14)


@on_every_path
@pytest.mark.parametrize("kind", TARGETS)
def test_any_output_has_exactly_one_x0_and_eps(kind, path):
    # For an arbitrary output, without a true x0, x_t = alpha x0 + sigma eps still holds, and the way back is exact.
    x_t, output = draw(5, 3, 2, 2, seed=1), draw(5, 3, 2, 2, seed=2)
    for level in levels(kind, path, 0, 17, 500, 900, 999):
        alpha, sigma = level.alpha, level.sigma
        x0, eps = (f(kind, output, x_t, alpha, sigma) for f in (to_x0, to_eps))
        torch.testing.assert_close(alpha * x0 + sigma * eps, x_t, rtol=0, atol=1e-12)
        torch.testing.assert_close(target_of(kind, x0, eps, alpha, sigma), output, rtol=0, atol=1e-12)


@on_every_path
@pytest.mark.parametrize("kind", TARGETS)
def test_error_ratio(kind, path):
    x_t, output, nudge = draw(4, 3, 2, 2, seed=1), draw(4, 3, 2, 2, seed=2), draw(4, 3, 2, 2, seed=3)
    for level in levels(kind, path, 0, 300, 900, 999):
        moved = [to_x0(kind, y, x_t, level.alpha, level.sigma) for y in (output, output + nudge)]
        ratio = nudge.square().sum() / (moved[1] - moved[0]).square().sum()
        alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in (level.alpha, level.sigma))
        torch.testing.assert_close(error_ratio(kind, alpha, sigma), ratio, rtol=1e-10, atol=0)


def test_names_of_diffusers():
    assert [target_from_diffusers(PREDICTION_TYPE[kind]) for kind in TARGETS] == list(TARGETS)
    assert list(PREDICTION_TYPE) == list(TARGETS)
    with pytest.raises(UserError, match="'velocity': choose epsilon, sample, v_prediction, flow_prediction"):
        target_from_diffusers("velocity")


@on_every_path
@pytest.mark.parametrize("kind", TARGETS)
def test_a_target_without_information_about_the_image_is_refused(kind, path):
    if kind == "eps" and path is not SCHEDULE:
        with pytest.raises(UserError, match="target eps: can't be used with a schedule that ends in pure noise"):
            check_target(kind, path)
    else:
        check_target(kind, path)
        alpha, sigma = path.alpha[-1].item(), path.sigma[-1].item()
        assert to_x0(kind, draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1), alpha, sigma).isfinite().all()


@pytest.mark.parametrize("kind", TARGETS)
def test_the_state_stays_exact_around_a_bf16_network(kind):
    x_t = draw(2, 3, 4, 4).float()
    given = []

    def coarse(x, index, condition):
        given.append((x.dtype, index))
        return torch.sin(3 * x)

    denoise = Denoiser(coarse, kind, torch.bfloat16)
    for index in (0, 999, 957.375):
        level = SCHEDULE.level(index)
        x0 = denoise(x_t, level, torch.zeros(2)).x0
        # Only the network's output is bfloat16; everything after it is at least float32.
        output = torch.sin(3 * x_t.bfloat16()).double()
        expected = to_x0(kind, output, x_t.double(), level.alpha, level.sigma)
        assert x0.dtype == torch.float32
        assert (x0 - expected).abs().max() < 1e-6 * expected.abs().max()
        dtype, passed = given[-1]
        assert dtype == torch.bfloat16
        assert passed.tolist() == [index, index]
        assert passed.dtype == (torch.float32 if index == 957.375 else torch.int64)
