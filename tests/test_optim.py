"""Muon against torch's own, and the properties that it has beyond that."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from support.stepping import polar_express_steps
from train.config.optimizer import NewtonSchulz, OptimizerConfig
from train.engine.optim import Muon
from train.engine.orthogonal import POLAR_EXPRESS, orthogonal, polar_express

CONFIG = OptimizerConfig(kind="muon", lr=1e-2, weight_decay=0.1, momentum=0.9)


def gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_matrices_step_as_with_torchs_muon(shape: tuple[int, int]) -> None:
    ours = nn.ModuleList(nn.Linear(*shape, bias=False) for _ in range(3))
    theirs = copy.deepcopy(ours)
    optimizer = replace(CONFIG, weight_decay=5.0).build(ours)
    reference = torch.optim.Muon(
        theirs.parameters(), lr=1e-2, weight_decay=5.0, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(4):
        for net, by in ((ours, optimizer), (theirs, reference)):
            gradients(net, step)
            by.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a - b).abs().max() < 0.02 * 4 * 1e-2  # bf16 rounds in another order


@pytest.mark.parametrize("shape", [(3, 20, 60), (2, 60, 20), (1, 32, 32)])
def test_orthogonal_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    made = orthogonal(1e3 * x)
    in_basis = u.mT @ made @ vt.mT  # the basis of the singular vectors
    values = in_basis.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert (in_basis - torch.diag_embed(values)).abs().max() < 0.05


def test_polar_express_has_the_papers_coefficients() -> None:
    for step, derived in zip(POLAR_EXPRESS, polar_express_steps(0.01, 3), strict=True):
        assert step == pytest.approx(derived, abs=1e-6)


def test_polar_express_equals_its_polynomials_of_the_singular_values() -> None:
    """Stacks of wide, tall and nearly square matrices, some of which share their smaller side."""
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 32, 96), (2, 96, 32), (1, 32, 40), (4, 32, 32), (2, 24, 48), (1, 4, 400)]
    stacks = []
    for k, rows, columns in shapes:
        side = min(rows, columns)
        left, right = (
            torch.linalg.qr(torch.randn(k, n, side, generator=g, dtype=torch.float64))[0] for n in (rows, columns)
        )
        values = torch.logspace(0, -2, side, dtype=torch.float64)
        stacks.append((left, values / values.norm(), right))
    made = polar_express([(1e4 * left * values @ right.mT).float() for left, values, right in stacks])
    for (left, values, right), x in zip(stacks, made, strict=True):
        assert x.dtype == torch.bfloat16
        s = values / (1.02 * values.pow(8).sum() ** (1 / 8))
        for a, b, c in POLAR_EXPRESS:
            s = a * s + b * s**3 + c * s**5
        assert s[values > 0.02].min() > 0.7
        assert s.max() < 1.28
        in_basis = left.mT @ x.double() @ right
        assert (in_basis - torch.diag(s)).square().mean(dim=(1, 2)).sqrt().max() * len(s) ** 0.5 < 0.2
        assert torch.linalg.matrix_norm(x.double() - left @ in_basis @ right.mT, 2).max() < 0.1  # bf16's


def test_adamw_is_torchs() -> None:
    ours = nn.Linear(8, 8)
    theirs = copy.deepcopy(ours)
    config = OptimizerConfig(lr=1e-2, betas=(0.8, 0.9), weight_decay=0.3)
    groups = [{"params": [theirs.weight], "weight_decay": 0.3}, {"params": [theirs.bias], "weight_decay": 0.0}]
    for net, by in ((ours, config.build(ours)), (theirs, torch.optim.AdamW(groups, 1e-2, (0.8, 0.9), fused=True))):
        for step in range(3):
            gradients(net, step)
            by.step()
            by.zero_grad()
            assert all(p.grad is None for p in net.parameters())
            by.load_state_dict(copy.deepcopy(by.state_dict()))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("iteration", ["jordan", "polar_express"])
def test_a_zero_gradient_moves_nothing(iteration: NewtonSchulz) -> None:
    net = nn.Linear(8, 8)
    before = copy.deepcopy(net)
    optimizer = OptimizerConfig(kind="muon", weight_decay=0, newton_schulz=iteration).build(net)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_a_step_that_is_not_finite_leaves_weights_and_momenta() -> None:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8))
    optimizer = CONFIG.build(net)
    gradients(net, 0)
    optimizer.step()
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    gradients(net, 1)
    for p in net.parameters():
        p.grad.view(-1)[0] = torch.nan
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, weights[name])
    for k, kept in state.items():
        assert all(torch.equal(value, optimizer.state_dict()["state"][k][name]) for name, value in kept.items())


def test_embeddings_biases_and_norms_are_adamws() -> None:
    net = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Unflatten(0, (1, -1)))
    optimizer = CONFIG.build(net)
    assert isinstance(optimizer, Muon)
    gradients(net, 0)
    optimizer.step()
    kinds = {name: set(optimizer.state[p]) for name, p in net.named_parameters()}
    assert kinds.pop("1.weight") == {"step", "momentum"}
    assert all(kind == {"step", "exp_avg", "exp_avg_sq"} for kind in kinds.values())
    decays = [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    assert decays == [(1, 0.1), (1, 0.1), (3, 0.0)]  # the matrix, the table, the rest


def test_wsd_is_the_same_for_more_steps_until_its_decay() -> None:
    short = OptimizerConfig(schedule="wsd", warmup=10, final=0.1)
    rates = [short.lr_share(step, 110) for step in range(110)]
    assert rates[:90] == [short.lr_share(step, 1000) for step in range(90)]
    assert rates[10:91] == [1.0] * 81
    assert rates[90:] == sorted(set(rates[90:]), reverse=True)
    assert short.lr_share(110, 110) == pytest.approx(0.1)
