"""AdamW with 8-bit moments: rounding keeps the mean; steps are nearly AdamW's in a quarter of the memory."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train.config.optimizer import OptimizerConfig
from train.engine.eight_bit import BLOCK, AdamW8bit, decode, empty_state, encode
from train.engine.optim import load_moments

CONFIG = OptimizerConfig(kind="adamw_8bit", lr=1e-3, weight_decay=0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(32, 64, 3), nn.Linear(64, 64), nn.Linear(10, 10), nn.Embedding(512, 16))


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Make steps with noisy gradients whose elements have scales from 0.001 to 1."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            scale = torch.logspace(-3, 0, p.shape[0]).view(-1, *[1] * (p.ndim - 1))
            p.grad = scale * (0.3 + torch.randn(p.shape, generator=generator))
        optimizer.step()


@pytest.mark.parametrize(("name", "levels"), [("exp_avg", 127), ("exp_avg_sq", 255)])
def test_rounding_keeps_the_mean_and_errs_by_less_than_one_level(name: str, levels: int) -> None:
    x = torch.randn(4, BLOCK, generator=torch.Generator().manual_seed(0))
    x = (x**3 if name == "exp_avg" else x**4) * torch.logspace(-9, 9, 4)[:, None]
    stored = [decode(name, *encode(name, x, position)) for position in range(2048)]
    scale = x.abs().amax(1, keepdim=True)
    c = ((x.abs() / scale) ** 0.25 * levels).floor().clamp(max=levels - 1)
    distance = scale * (((c + 1) / levels) ** 4 - (c / levels) ** 4)
    assert all(((y - x).abs() <= 1.001 * distance).all() for y in stored)
    above = x.abs() >= scale / 255**4 if name == "exp_avg_sq" else torch.ones_like(x, dtype=torch.bool)
    assert ((torch.stack(stored).double().mean(0) - x).abs() <= 4e-3 * distance)[above].all()
    if name == "exp_avg_sq":
        assert (torch.stack(stored) > 0).all()
    assert all(torch.equal(y.abs().amax(1, keepdim=True), scale) for y in stored[:8])


def test_a_second_moment_follows_a_change_that_is_smaller_than_a_level() -> None:
    """Its share of a step is .1 %, a level's 2 to 16 %. Rounding to the nearest level would never leave the first."""
    v = torch.linspace(1e-3, 1, BLOCK)[None]
    target = v.clone()
    target[:, : BLOCK // 2] /= 4
    codes, scale = encode("exp_avg_sq", v, 0)
    for step in range(1, 5001):
        v = decode("exp_avg_sq", codes, scale).lerp_(target, 1e-3)
        codes, scale = encode("exp_avg_sq", v, step)
    expected = target + (torch.linspace(1e-3, 1, BLOCK) - target) * 0.999**5000
    assert (v / expected - 1).abs().mean() < 0.03


def test_steps_are_nearly_those_of_adamw_in_a_quarter_of_the_memory() -> None:
    ours, theirs = network(), network()
    first = copy.deepcopy(ours)
    optimizer, reference = CONFIG.build(ours), OptimizerConfig(lr=1e-3, weight_decay=0.1).build(theirs)
    assert isinstance(optimizer, AdamW8bit)
    for net, by in ((ours, optimizer), (theirs, reference)):
        train(net, by, range(100))
    for (name, a), b, start in zip(ours.named_parameters(), theirs.parameters(), first.parameters(), strict=True):
        if name in ("0.weight", "1.weight"):
            assert 0 < (a - b).norm() < 0.03 * (b - start).norm()
        else:  # small ones, and embeddings, whose gradients are sparse in training
            assert torch.equal(a, b)

    def memory(by: torch.optim.Optimizer, weight: Tensor) -> int:
        return sum(v.nbytes for v in by.state[weight].values())

    for a, b in zip(list(ours.parameters())[0:3:2], list(theirs.parameters())[0:3:2], strict=True):
        assert memory(optimizer, a) < 0.255 * memory(reference, b)


def test_a_continued_run_is_the_same_bit_for_bit() -> None:
    nets = [network(), network()]
    optimizers = [CONFIG.build(net) for net in nets]
    train(nets[0], optimizers[0], range(8))
    train(nets[1], optimizers[1], range(5))
    state = copy.deepcopy(optimizers[1].state_dict())
    optimizers[1] = CONFIG.build(nets[1])
    load_moments(optimizers[1], state)
    train(nets[1], optimizers[1], range(5, 8))
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
        ours, theirs = (by.state[p] for by, p in zip(optimizers, (a, b), strict=True))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_step_that_is_not_finite_leaves_weights_and_moments() -> None:
    net = network()
    optimizer = CONFIG.build(net)
    train(net, optimizer, range(2))
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for p in net.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(weight, weights[name]) for name, weight in net.state_dict().items())
    for k, kept in state.items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][k][name]) for name, value in kept.items())


@pytest.mark.parametrize(
    "damage",
    [
        {"exp_avg": torch.zeros(3, BLOCK)},
        {"exp_avg_scale": torch.zeros(72, 2)},
        {"exp_avg_sq": None},
        {"momentum": torch.zeros(64, 32, 3, 3)},
    ],
    ids=lambda d: next(iter(d)),
)
def test_moments_that_do_not_fit_are_refused(damage: dict[str, Any]) -> None:
    net = network()
    optimizer = CONFIG.build(net)
    train(net, optimizer, range(1))
    state = optimizer.state_dict()
    entry = state["state"][0]
    assert entry.keys() == empty_state(net[0].weight).keys()  # type: ignore[index]
    entry |= damage
    entry = {name: value for name, value in entry.items() if value is not None}
    state["state"][0] = entry
    with pytest.raises(ValueError, match="the optimizer's moments don't fit a weight of shape"):
        load_moments(CONFIG.build(net), state)
