"""Drawn timesteps against their distributions, and the weights of their errors.

The uniform numbers are a fine grid. Frequencies are then probabilities up to one grid step, and nothing is statistical.
"""

import math

import pytest
import torch
from torch import distributed
from torch.distributions import Normal

from ldm.errors import UserError
from ldm.objective import Objective, edm, level_weight, min_snr, p2
from ldm.parameterization import target_of
from ldm.schedule import Schedule
from ldm.timesteps import Importance, LogitNormal, uniform
from support.processes import run_in_processes

N = 200_000
WEIGHTINGS = {"min_snr": min_snr(5.0), "p2": p2(0.5, 2.0), "edm": edm(0.5)}
TARGETS = ("eps", "x0", "v", "flow")
PATHS = {
    "linear": Schedule.build("linear", 50, 0.001, 0.3),
    "zero": Schedule.build("scaled_linear", 50, zero_terminal_snr=True),
    "flow": Schedule.build("flow", 50),
}


def grid(n=N):
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def tuned(bins=10, T=1000, floor=0.05, seed=0):
    """Return an Importance that has seen losses of very different sizes in every bin."""
    importance = Importance(bins, floor=floor)
    loss = torch.randn(T, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
    importance.record(torch.arange(T), loss * (0.02 + torch.arange(T) / T), T)
    importance.update()
    return importance


DRAWS = {
    "uniform": uniform,
    "logit_normal": LogitNormal(),
    "leaning": LogitNormal(0.6, 1.4),
    "fresh": Importance(10),
    "importance": tuned(),
}


@pytest.mark.parametrize("T", [1000, 77, 7])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_in_range_and_in_the_order_of_their_numbers(name, T):
    # Draws are monotone, so stratified numbers give stratified timesteps. float32 may round the greatest number to 1.
    for dtype in (torch.float64, torch.float32):
        u = torch.cat([torch.zeros(1), grid(10_000), torch.tensor([1 - torch.finfo(torch.float64).eps / 2])]).to(dtype)
        index = DRAWS[name](u, T).index
        assert index.dtype == torch.int64
        assert (index.diff() >= 0).all()
        assert (index[0], index[-1]) == (0, T - 1)


@pytest.mark.parametrize("T", [1000, 77])
def test_uniform_has_its_distribution(T):
    drawn = uniform(grid(T * 20), T)
    assert torch.bincount(drawn.index).tolist() == [20] * T
    assert drawn.weight == 1


@pytest.mark.parametrize("T", [1000, 77])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.6, 0.5), (-1.0, 1.7)])
def test_logit_normal_has_its_distribution(mean, std, T):
    drawn = LogitNormal(mean, std)(grid(), T)
    below = torch.bincount(drawn.index, minlength=T).cumsum(0)[:-1] / N  # P(t < (i + 1) / T)
    ends = torch.arange(1, T, dtype=torch.float64) / T
    expected = Normal(mean, std).cdf(ends.logit())
    assert (below - expected).abs().max() <= 1.01 / N
    assert drawn.weight == 1  # not corrected for


@pytest.mark.parametrize(("mean", "std"), [(0, 0), (0, -1), (0, math.inf), (0, math.nan), (math.nan, 1), (math.inf, 1)])
def test_a_logit_normal_without_a_spread_is_refused(mean, std):
    with pytest.raises(UserError, match="std"):
        LogitNormal(mean, std)


@pytest.mark.parametrize("T", [1000, 77])
def test_importance_is_uniform_until_every_bin_was_seen(T):
    importance, u = Importance(10), grid(T * 20)

    def is_uniform():
        drawn = importance(u, T)
        return torch.equal(drawn.index, uniform(u, T).index) and bool((drawn.weight - 1).abs().max() < 1e-12)

    assert is_uniform()
    most = torch.arange(T)[: T * 9 // 10]  # all but the last bin
    importance.record(most, 1.0 + most, T)
    importance.update()
    assert is_uniform()
    importance.record(torch.tensor([T - 1]), torch.tensor([5.0]), T)
    importance.update()
    assert not is_uniform()


@pytest.mark.parametrize("floor", [0.05, 0.3, 0.0])
def test_importance_is_in_proportion_to_the_root_mean_square(floor):
    bins, T = 8, 80
    loss = torch.randn(T, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).exp()
    loss[:10] = 0  # a bin without any loss keeps the floor
    importance = Importance(bins, floor=floor)
    for k in range(3):  # in parts, as when gradients are accumulated
        importance.record(torch.arange(T), loss[:, k], T)
    importance.update()
    root = loss.view(bins, -1).square().mean(1).sqrt()
    p = importance.probability()
    torch.testing.assert_close(p, (1 - floor) * root / root.sum() + floor / bins, rtol=1e-12, atol=1e-15)
    assert p.sum().item() == pytest.approx(1)
    assert p.min().item() == pytest.approx(floor / bins)
    counts = torch.bincount(importance(grid(), T).index // 10, minlength=bins)
    assert (counts - N * p).abs().max() <= 1.01
    assert importance(torch.zeros(1), T).index.item() == (0 if floor else 10)  # a bin without probability isn't drawn
    within = torch.bincount(importance(grid(), T).index, minlength=T).view(bins, -1)  # equal within a bin
    assert (within - within.double().mean(1, keepdim=True)).abs().max() <= 1.01


@pytest.mark.parametrize(("bins", "T"), [(10, 1000), (10, 77), (100, 128), (7, 7), (100, 250)])
def test_importance_weights_give_uniform_means(bins, T):
    # If T isn't a multiple of the bins, a timestep on a border belongs to two bins with different probabilities.
    importance = tuned(bins, T)
    drawn = importance(grid(), T)
    total = torch.zeros(T, dtype=torch.float64).index_add_(0, drawn.index, drawn.weight.expand(N)) / N
    # Each timestep has a total weight of 1 / T, up to two numbers of the grid.
    assert (total * T - 1).abs().max() <= 3 * T * drawn.weight.max() / N
    assert drawn.weight.max() <= 20.001  # 1 / floor
    f = torch.sin(torch.arange(T, dtype=torch.float64)) + 1
    mean = (drawn.weight * f[drawn.index]).mean().item()
    assert mean == pytest.approx(f.mean().item(), rel=2e-3)
    assert f[drawn.index].mean().item() != pytest.approx(f.mean().item(), rel=2e-3) or bins == T == 7


@pytest.mark.parametrize("kind", ["simple", "vlb"])
def test_the_expected_objective_is_the_same_under_importance(kind):
    # End to end: the expected loss is that of uniform timesteps.
    schedule = PATHS["linear"]
    means = []
    for timesteps in (uniform, tuned(7, 50)):
        weighting = min_snr() if kind == "simple" else None
        objective = Objective(schedule, "v", weighting, kind=kind, timesteps=timesteps)
        x0 = torch.full((N, 1, 1, 1), 0.8, dtype=torch.float64)
        losses = objective(lambda x, i, c: 0.2 * x, x0, grid(), 0.5 * x0, torch.empty(0))
        means.append(losses.weighted.mean().item())
    assert means[1] == pytest.approx(means[0], rel=2e-3)
    assert losses.unweighted.mean().item() * (50 if kind == "vlb" else 1) != pytest.approx(means[0], rel=0.05)


def test_averages_run_over_examples():
    bins, T, rate = 4, 40, 0.1
    importance = Importance(bins, rate)
    importance.record(torch.arange(T), torch.full((T,), 2.0), T)
    importance.update()
    assert importance.mean_square.tolist() == [4] * bins  # the first fold counts in full
    # One bin sees 3 examples, another 1, two none.
    importance.record(torch.tensor([0, 5, 9, 39]), torch.tensor([1.0, 3.0, 5.0, 7.0]), T)
    importance.update()
    kept = (1 - rate) ** 3
    expected = [kept * 4 + (1 - kept) * 35 / 3, 4, 4, (1 - rate) * 4 + rate * 49]
    assert importance.mean_square.tolist() == pytest.approx(expected)
    importance.update()  # without recorded losses, nothing changes
    assert importance.mean_square.tolist() == pytest.approx(expected)
    assert importance.seen.tolist() == [13, 10, 10, 11]


def test_losses_that_are_not_finite_are_left_out():
    T = 40
    good, bad = tuned(4, T), tuned(4, T)
    index, loss = torch.tensor([3, 3, 12, 25, 38]), torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5])
    good.record(index, loss, T)
    bad.record(
        torch.cat([index, torch.tensor([3, 12, 33])]),
        torch.cat([loss, torch.tensor([math.nan, math.inf, -math.inf])]),
        T,
    )
    good.update()
    bad.update()
    for name, value in good.state_dict().items():
        assert torch.equal(bad.state_dict()[name], value)
    nothing = Importance(4)
    nothing.record(torch.arange(T), torch.full((T,), math.nan), T)
    nothing.update()
    assert nothing.probability().tolist() == [0.25] * 4


def test_losses_of_zero_leave_a_distribution():
    importance = Importance(4)
    importance.record(torch.arange(8), torch.zeros(8), 8)
    importance.update()
    assert importance.probability().tolist() == [0.25] * 4
    assert importance(grid(8), 8).index.tolist() == list(range(8))


def test_forgotten_losses_have_no_effect():
    importance = tuned(4, 40)
    before = {name: value.clone() for name, value in importance.state_dict().items()}
    importance.record(torch.arange(40), torch.full((40,), 1e6), 40)
    importance.discard()
    importance.update()
    assert all(torch.equal(importance.state_dict()[name], value) for name, value in before.items())


def test_noted_losses_keep_no_graph():
    importance = Importance(4)
    importance.record(torch.arange(8), torch.ones(8, requires_grad=True) * 2, 8)
    importance.update()
    assert not importance.mean_square.requires_grad


def test_the_state_continues_exactly():
    ours, T = tuned(10, 77), 77
    theirs = Importance(10)
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        u = torch.rand(64, generator=generator)
        (index, weight), (their_index, their_weight) = ((d.index, d.weight) for d in (ours(u, T), theirs(u, T)))
        assert torch.equal(index, their_index)
        assert torch.equal(weight, their_weight)
        for each in (ours, theirs):
            each.record(index, (index + 1.0) * weight, T)
            each.update()
    assert torch.equal(ours.probability(), theirs.probability())


def fold_on(rank, ranks, folder):
    """Run one process of `ranks`, which notes its rows of three fixed batches of 64."""
    torch.set_num_threads(1)
    if ranks > 1:
        distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    importance, generator = Importance(8), torch.Generator().manual_seed(0)
    for _ in range(3):
        index = torch.randint(0, 77, (64,), generator=generator)
        loss = torch.randn(64, generator=generator, dtype=torch.float64).exp()
        mine = slice(rank * 64 // ranks, (rank + 1) * 64 // ranks)
        importance.record(index[mine], loss[mine], 77)
        importance.update()
    torch.save(importance.state_dict(), f"{folder}/{ranks}-{rank}.pt")
    if ranks > 1:
        distributed.destroy_process_group()


def test_two_processes_have_the_state_of_one(tmp_path):
    fold_on(0, 1, str(tmp_path))
    run_in_processes(fold_on, 2, str(tmp_path))
    one, *two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert (one["seen"] > 0).all()
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name])  # exactly, otherwise the processes would diverge
        torch.testing.assert_close(two[0][name], value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("name", PATHS)
def test_a_weighting_is_one_weight_on_the_error_of_x0(name, weighting, target):
    # A change of x0_hat at a fixed x_t changes the target's prediction; its weight must compensate for the factor.
    schedule = PATHS[name]
    alpha, sigma = schedule.alpha[:-1], schedule.sigma[:-1]
    x_t, x0, step = torch.randn(3, schedule.T - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, after = (target_of(target, x, (x_t - alpha * x) / sigma, alpha, sigma) for x in (x0, x0 + step))
    weighted = level_weight(weighting, target, alpha, sigma) * (after - before) ** 2
    torch.testing.assert_close(weighted, weighting((alpha / sigma) ** 2) * step**2, rtol=1e-6, atol=0)
    assert torch.equal(level_weight(None, target, alpha, sigma), torch.ones_like(alpha))


def test_weightings_equal_the_papers_formulas():
    schedule = PATHS["linear"]
    alpha, sigma, snr = schedule.alpha, schedule.sigma, schedule.snr

    def close(a, b):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)

    # Hang et al. 2023, section 3.4: for eps, x0 and v.
    five = torch.full_like(snr, 5.0)
    close(level_weight(min_snr(5.0), "eps", alpha, sigma), torch.minimum(snr, five) / snr)
    close(level_weight(min_snr(5.0), "x0", alpha, sigma), torch.minimum(snr, five))
    close(level_weight(min_snr(5.0), "v", alpha, sigma), torch.minimum(snr, five) / (snr + 1))
    # Choi et al. 2022, eq. 8, whose loss is on eps.
    close(level_weight(p2(0.5, 2.0), "eps", alpha, sigma), (2 + snr) ** -0.5)
    # Karras et al. 2022, table 1: lambda(s) = (s^2 + sigma_data^2) / (s sigma_data)^2 on x0, with s = sigma / alpha.
    noise = sigma / alpha
    close(level_weight(edm(0.5), "x0", alpha, sigma), (noise**2 + 0.25) / (noise * 0.5) ** 2)
    # With data of unit variance this is a uniform weight on v.
    close(level_weight(edm(1.0), "v", alpha, sigma), torch.ones_like(alpha))
    zero = PATHS["zero"]
    close(level_weight(edm(1.0), "v", zero.alpha, zero.sigma), torch.ones_like(alpha))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weighting", WEIGHTINGS.values(), ids=WEIGHTINGS)
@pytest.mark.parametrize("name", ["zero", "flow"])
def test_weights_are_finite_where_no_signal_is_left(name, weighting, target):
    schedule = PATHS[name]
    weight = level_weight(weighting, target, schedule.alpha, schedule.sigma)
    assert weight.float().isfinite().all()
    assert (weight >= 0).all()
    if (weighting, target) == (WEIGHTINGS["edm"], "eps"):  # x0's weight doesn't vanish, so eps' has no limit
        assert weight[-1] > weight[-2]
        return
    # Otherwise it is the limit of levels that approach pure noise.
    alpha = torch.tensor([1e-4, 1e-6], dtype=torch.float64)
    sigma = 1 - alpha if name == "flow" else (1 - alpha**2).sqrt()
    near = level_weight(weighting, target, alpha, sigma)
    torch.testing.assert_close(weight[-1], near[1], rtol=1e-5, atol=1e-11)
    assert (weight[-1] - near[1]).abs() <= (weight[-1] - near[0]).abs()


@pytest.mark.parametrize("target", ["x0", "v", "flow"])
@pytest.mark.parametrize("weighting", [None, *WEIGHTINGS.values()], ids=["none", *WEIGHTINGS])
@pytest.mark.parametrize("name", ["zero", "flow"])
def test_the_objective_is_finite_up_to_pure_noise(name, weighting, target):
    schedule = PATHS[name]
    x0, noise, output = torch.randn(3, schedule.T, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    output.requires_grad_()
    u = grid(schedule.T)
    losses = Objective(schedule, target, weighting)(lambda *_: output, x0, u, noise, torch.empty(0))
    assert losses.index.tolist() == list(range(schedule.T))
    assert losses.weighted.isfinite().all()
    losses.weighted.mean().backward()
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("weighting", [None, min_snr(), edm()])
@pytest.mark.parametrize("target", ["x0", "v"])
def test_importance_follows_the_weighted_loss(target, weighting):
    # The estimate of the mean loss then varies less than with uniform timesteps, for any weighting.
    schedule, importance = PATHS["linear"], Importance(50, floor=0.05)
    x0 = torch.full((N, 1, 1, 1), 0.8, dtype=torch.float64)

    def estimate(timesteps):
        objective = Objective(schedule, target, weighting, timesteps=timesteps)
        return objective(lambda x, i, c: 0.2 * x, x0, grid(), 0.5 * x0, torch.empty(0))

    even = estimate(uniform)
    importance.record(even.index, even.uncorrected, schedule.T)
    importance.update()
    assert estimate(importance).weighted.var() < 0.3 * even.weighted.var()


def test_logit_normal_timesteps_are_by_default_those_of_a_standard_normal_number() -> None:
    """Its quantiles at -1, 0 and 1 standard deviations are mapped by the sigmoid."""
    u = torch.special.ndtr(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    sigmoid = [1 / (1 + math.exp(-z)) for z in (-1.0, 1e-9, 1.0)]
    assert LogitNormal()(u, 1000).index.tolist() == [int(1000 * p) for p in sigmoid]
