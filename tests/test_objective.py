"""The training objective on Gaussian data, whose best denoiser is known and linear.

Expectations over data and noise are computed by Gauss-Hermite quadrature, which is exact for quadratics. The batch is
the quadrature's nodes, so nothing here is statistical.
"""

import numpy as np
import pytest
import torch

from ldm.networks.unet import build_unet
from ldm.objective import Objective, edm, min_snr, p2, pointwise
from ldm.parameterization import error_ratio, target_of, to_x0
from ldm.schedule import Schedule
from ldm.steps import PredictorCorrector

TARGETS = ("eps", "x0", "v")
SCHEDULE = Schedule.build("scaled_linear")
MEAN, STD = 0.7, 0.4
INDICES = (0, 5, 130, 500, 999)


def nodes():
    """Data ~ N(MEAN, STD^2) and noise ~ N(0, 1) as nodes (b, 1, 1, 1), with weights (b,) that sum to 1."""
    z, w = np.polynomial.hermite_e.hermegauss(4)
    first, second = (torch.from_numpy(g).reshape(-1, 1, 1, 1) for g in np.meshgrid(z, z))
    return MEAN + STD * first, second, torch.from_numpy(np.outer(w, w) / w.sum() ** 2).flatten()


def best(kind):
    """Return the exact network: E[x0 | x_t] of the Gaussian, converted to the target."""

    def network(x_t, index, condition):
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in SCHEDULE((index + 1).double() / SCHEDULE.T))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (x_t - alpha * MEAN)
        return target_of(kind, x0, (x_t - alpha * x0) / sigma, alpha, sigma)

    return network


def expected_loss(objective, network, index):
    x0, noise, weights = nodes()
    u = torch.full((len(x0),), (index + 0.5) / SCHEDULE.T, dtype=torch.float64)
    losses = objective(network, x0, u, noise, torch.empty(0))
    assert (losses.index == index).all()
    return (weights * losses.unweighted).sum().item()


@pytest.mark.parametrize("kind", TARGETS)
def test_the_exact_denoiser_has_the_least_loss(kind):
    objective, exact = Objective(SCHEDULE, kind), best(kind)
    for index in INDICES:
        snr = SCHEDULE.snr[index]
        # The variance of x0 given x_t is 1 / (1 / STD^2 + SNR).
        floor = (error_ratio(kind, SCHEDULE.alpha[index], SCHEDULE.sigma[index]) / (STD**-2 + snr)).item()
        assert expected_loss(objective, exact, index) == pytest.approx(floor, rel=1e-9)
        # Any other output has this loss plus the mean square of its departure.
        shifted = expected_loss(objective, lambda *a: exact(*a) + 0.1, index)
        assert shifted == pytest.approx(floor + 0.01, rel=1e-9)
        for slope in (-0.2, 0.2):
            assert expected_loss(objective, lambda x, i, c, s=slope: exact(x, i, c) + s * x, index) > floor * 1.001


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("kind", TARGETS)
def test_min_snr_is_one_weight_on_the_error_of_x0(kind, gamma):
    x0, noise, _ = nodes()

    def network(x_t, index, condition):
        return torch.sin(3 * x_t)

    for index in INDICES:
        u = torch.full((len(x0),), (index + 0.5) / SCHEDULE.T, dtype=torch.float64)
        losses = Objective(SCHEDULE, kind, min_snr(gamma))(network, x0, u, noise, torch.empty(0))
        level, snr = SCHEDULE.level(index), SCHEDULE.snr[index].item()
        x_t = level.alpha * x0 + level.sigma * noise
        error = to_x0(kind, network(x_t, None, None), x_t, level.alpha, level.sigma) - x0
        torch.testing.assert_close(losses.weighted, min(snr, gamma) * error.square().flatten(), rtol=1e-9, atol=1e-12)


def test_uniform_numbers_reach_every_timestep_equally():
    schedule = Schedule.build("cosine", 77)
    for dtype in (torch.float32, torch.float64):
        greatest = 1 - torch.finfo(torch.float64).eps / 2  # 1 in float32
        u = torch.tensor([*(k / 770 + 1e-4 for k in range(770)), greatest], dtype=torch.float64).to(dtype)
        x = torch.zeros(len(u), 1, 1, 1)
        losses = Objective(schedule)(lambda x_t, index, c: x_t, x, u, x, torch.empty(0))
        counts = torch.bincount(losses.index, minlength=77)
        assert counts.tolist() == [10] * 76 + [11]


def test_the_noised_image_follows_the_schedule():
    x0, noise, _ = nodes()
    u = torch.linspace(0, 0.999, len(x0), dtype=torch.float64)
    seen = {}

    def network(x_t, index, condition):
        seen.update(x_t=x_t, index=index, condition=condition)
        return x_t

    condition = torch.arange(3)
    Objective(SCHEDULE)(network, x0, u, noise, condition)
    for x_t, i, x, eps in zip(seen["x_t"], seen["index"].tolist(), x0, noise, strict=True):
        alpha_bar = SCHEDULE.alpha_bar[i]
        torch.testing.assert_close(x_t, alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps)
    assert seen["condition"] is condition


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize("kind", TARGETS)
def test_losses_are_float32_around_a_bf16_network(kind, loss):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2))
    u = torch.linspace(0, 0.999, 8)

    def network(x_t, index, condition):
        # Nearly right: bfloat16 arithmetic would lose the small difference that is left.
        alpha, sigma = (c.view(-1, 1, 1, 1) for c in SCHEDULE((index + 1).double() / SCHEDULE.T))
        return target_of(kind, x0, noise, alpha, sigma).to(torch.bfloat16).requires_grad_()

    losses = Objective(SCHEDULE, kind, loss=loss)(network, x0.bfloat16().float(), u, noise, torch.empty(0))
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in SCHEDULE((losses.index + 1).double() / SCHEDULE.T))
    target = target_of(kind, x0.bfloat16().double(), noise.double(), alpha, sigma)
    expected = pointwise(loss, network(None, losses.index, None).double(), target).flatten(1).mean(1)
    assert losses.unweighted.dtype == torch.float32
    torch.testing.assert_close(losses.unweighted.double(), expected, rtol=1e-4, atol=1e-12)
    losses.weighted.mean().backward()  # through the cast


def test_pointwise_losses():
    errors = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 2.0])
    zero = torch.zeros_like(errors)
    assert pointwise("l2", errors, zero).tolist() == [9, 1, 0.25, 0, 0.0625, 4]
    assert pointwise("l1", errors, zero).tolist() == [3, 1, 0.5, 0, 0.25, 2]
    assert pointwise("huber", errors, zero).tolist() == [5, 1, 0.25, 0, 0.0625, 3]  # 2|e| - 1 beyond 1


def test_default_numbers_are_the_papers():
    snr = torch.tensor([0.1, 4.9, 5.1, 100.0])
    assert min_snr()(snr).tolist() == snr.clamp(max=5).tolist()  # Hang et al. 2023
    assert p2()(snr).tolist() == (snr / (1 + snr)).tolist()  # Choi et al. 2022
    assert edm()(snr).tolist() == (snr + 1).tolist()
    assert PredictorCorrector().snr == 0.16  # Song et al. 2021


def test_the_objective_never_synchronises_with_the_device():
    # A meta tensor has no values: reading one would raise.
    x = torch.empty(2, 4, 8, 8, device="meta")
    u = torch.empty(2, device="meta")
    for kind in TARGETS:
        losses = Objective(SCHEDULE, kind, min_snr())(lambda x_t, index, c: x_t, x, u, x, x)
        assert losses.weighted.shape == (2,)


def test_the_loss_descends_to_the_exact_network():
    # The gradient at the exact network is zero, through the conversion as well as at the output.
    x0, noise, weights = nodes()
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    for kind in TARGETS:
        u = torch.full((len(x0),), 0.4, dtype=torch.float64)
        losses = Objective(SCHEDULE, kind)(lambda *a, k=kind: gain * best(k)(*a), x0, u, noise, torch.empty(0))
        (slope,) = torch.autograd.grad((weights * losses.unweighted).sum(), gain)
        assert abs(slope.item()) < 1e-10


@pytest.mark.parametrize("kind", TARGETS)
def test_training_approaches_the_floor_from_above(kind):
    """Least squares over new noise at every step: the loss falls to that of the exact denoiser and not below."""
    objective, index = Objective(SCHEDULE, kind), 500
    floor = expected_loss(objective, best(kind), index)
    slope, offset = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([slope, offset], 0.02)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 1500)
    generator = torch.Generator().manual_seed(0)

    def network(x, i, c):
        return slope * x + offset

    for _ in range(1500):
        x0, noise = torch.randn(2, 256, 1, 1, 1, generator=generator, dtype=torch.float64)
        u = torch.full((256,), (index + 0.5) / SCHEDULE.T, dtype=torch.float64)
        optimizer.zero_grad()
        objective(network, MEAN + STD * x0, u, noise, torch.empty(0)).weighted.mean().backward()
        optimizer.step()
        fall.step()
    assert floor <= expected_loss(objective, network, index) < 1.005 * floor


@pytest.mark.parametrize("kind", TARGETS)
def test_each_target_can_overfit_one_batch(kind):
    """The real network is trained on four latents, each with its own timestep, noise and caption."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=generator)
    condition = torch.randn(4, 5, 16, generator=generator)
    u = torch.tensor([0.2, 0.4, 0.6, 0.8])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build_unet(
            channels=(32, 64),
            layers=1,
            attention=(False, True),
            heads=(4, 4),
            groups=16,
            latent_channels=4,
            latent_size=8,
            text_width=16,
        )
    objective, losses = Objective(SCHEDULE, kind), []
    optimizer = torch.optim.AdamW(unet.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = objective(lambda x, i, c: unet(x, i, c).sample, x0, u, noise, condition).weighted.mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
