"""The running average of weights against its closed forms."""

import math

import pytest
import torch
from torch import nn

from train.engine.ema import Ema


def random_weights(net, seed):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))


def block():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    random_weights(net, 1000)
    return net


def single(value, dtype=torch.float64):
    """Return a module with one weight."""
    net = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(net.weight, value)
    return net


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_average_is_the_weighted_sum_of_all_weights(decay):
    """a_n = Σ_k (1 − d_k) Π_{j>k} d_j w_k + Π_j d_j w_init, in float64."""
    net, steps = block(), 40
    ema = Ema(net, decay)
    seen = [weights(net)]
    for step in range(steps):
        random_weights(net, step)
        seen.append(weights(net))
        ema.update(step)
    d = [min(decay, (1 + t) / (10 + t)) for t in range(steps)]
    shares = [math.prod(d)] + [(1 - d[k]) * math.prod(d[k + 1 :]) for k in range(steps)]
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    for i, average in enumerate(ema.module.parameters()):
        expected = sum(share * w[i].double() for share, w in zip(shares, seen, strict=True))
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)


def test_average_without_decay_is_the_weights_exactly():
    net = block()
    ema = Ema(net, 0.0)
    for step in range(3):
        random_weights(net, step)
        ema.update(step)
        assert all(map(torch.equal, ema.module.parameters(), net.parameters()))


def test_warm_up_forgets_the_start_as_the_binomial_says():
    """If w is constant from the first update, the weight of the start after n updates is 1 / C(n + 9, 9)."""
    net = single(1.0)
    ema = Ema(net, 0.9999)
    nn.init.zeros_(net.weight)
    for n in range(1, 30):
        ema.update(n - 1)
        assert ema.module.weight.item() == pytest.approx(1 / math.comb(n + 9, 9), rel=1e-5)


def test_warm_up_averages_the_last_tenth_of_a_ramp():
    """For w_t = t from a start of −1 the recurrence has the exact solution a_n = 0.9 n − 1: the lag grows with n."""
    net = single(-1.0)
    ema = Ema(net, 0.99999)
    for n in range(1, 500):
        nn.init.constant_(net.weight, n - 1)
        ema.update(n - 1)
        assert ema.module.weight.item() == pytest.approx(0.9 * n - 1, abs=1e-3)


def test_warm_up_ends_at_the_decay():
    ema = Ema(single(0.0), 0.99)
    assert [ema.decay_at(0), ema.decay_at(8), ema.decay_at(890), ema.decay_at(10**6)] == [0.1, 0.5, 0.99, 0.99]
    assert ema.decay_at(889) < 0.99


def test_average_of_half_precision_weights_is_fp32():
    """In bf16, a step of 1e-3 of the difference would be lost."""
    net = single(1.0, torch.bfloat16)
    ema = Ema(net, 0.999)
    nn.init.constant_(net.weight, 2.0)
    for _ in range(100):
        ema.update(10**6)
    assert ema.module.weight.dtype == torch.float32
    assert ema.module.weight.item() == pytest.approx(2 - 0.999**100, rel=1e-5)


def test_buffers_are_the_current_ones():
    net = block()
    ema = Ema(net, 0.999)
    for step in range(4):
        net(torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step)))
        ema.update(step)
    assert ema.module[1].num_batches_tracked == 4
    assert all(map(torch.equal, ema.module.buffers(), net.buffers()))


def test_average_is_a_separate_module_for_evaluation():
    net = block().train()
    ema = Ema(net, 0.9)
    assert not any(m.training for m in ema.module.modules())
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    before = weights(net)
    random_weights(ema.module, 7)
    assert all(map(torch.equal, before, net.parameters()))


def test_average_follows_tied_weights_and_other_memory_formats():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    net[1].weight = net[0].weight
    ema = Ema(net, 0.0)
    net.to(memory_format=torch.channels_last)
    random_weights(net, 3)
    ema.update(0)
    assert ema.module[1].weight is ema.module[0].weight
    assert all(map(torch.equal, ema.module.parameters(), net.parameters()))


def test_average_is_continued_bit_for_bit():
    def go(net, ema, steps):
        for step in steps:
            random_weights(net, step)
            ema.update(step)

    uncut, cut = block(), block()
    one, two = Ema(uncut, 0.99), Ema(cut, 0.99)
    go(uncut, one, range(20))
    go(cut, two, range(7))
    net = block()
    three = Ema(net, 0.99)
    three.load_state_dict({name: tensor.clone() for name, tensor in two.state_dict().items()})
    go(net, three, range(7, 20))
    state = one.state_dict()
    assert list(state) == list(uncut.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in three.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        three.load_state_dict({})


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_an_invalid_decay_is_refused(decay):
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        Ema(single(0.0), decay)
