"""A network of which a part is trained: small checkpoints that continue exactly, and a whole result."""

import pytest
import torch
from torch import nn

from ldm.errors import UserError
from train.engine.ema import Ema
from train.engine.subset import Subset, frozen_names


def network(seed: int = 0) -> nn.Module:
    """Three layers, of which the last one is trained and the middle one has buffers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    net[:2].requires_grad_(False)
    return net


def test_frozen_parameters_are_not_in_the_state_but_buffers_are() -> None:
    subset = Subset(network(), frozen_names(network()))
    assert set(subset.state_dict()) == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked", "2.weight", "2.bias",
    }  # fmt: skip


def test_a_state_goes_into_a_network_with_the_same_frozen_weights_alone() -> None:
    one, same, other = network(), network(), network(1)
    subsets = [Subset(net, frozen_names(net)) for net in (one, same, other)]
    with torch.no_grad():
        one[2].weight += 1
    for state in (subsets[0].state_dict(), one.state_dict()):  # also one that holds all weights, as older ones do
        subsets[1].load_state_dict(state)
        assert torch.equal(same[2].weight, one[2].weight)
    subsets[1].require(subsets[0].digest)
    with pytest.raises(UserError, match="the 4 frozen weights aren't those"):
        subsets[2].require(subsets[0].digest)
    with pytest.raises(UserError, match=r"frozen weight \S+ isn't the one that this run was trained with"):
        subsets[2].load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        subsets[2].load_state_dict({})
    whole = nn.Linear(2, 2)
    assert Subset(whole, frozen_names(whole)).digest == ""


def test_the_average_is_whole_and_shares_what_is_frozen() -> None:
    net = network()
    ema = Ema(net, 0.5)
    with torch.no_grad():
        net[2].weight += 1
    ema.update(10**6)
    torch.testing.assert_close(ema.module[2].weight, net[2].weight - 0.5)
    assert ema.module[0].weight is net[0].weight
    assert ema.module[2].weight is not net[2].weight
    assert "0.weight" not in ema.state_dict()
    assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 2
