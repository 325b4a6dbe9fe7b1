"""A network with frozen weights: small checkpoints from which a run is resumed exactly, and a complete model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import train.stages.ldm
from ldm.errors import UserError
from ldm.networks.unet import UNet
from ldm.pipeline import LatentDiffusionPipeline
from support.models import small_unet
from support.runs import Crash, final_state, ldm_config
from train.engine.checkpoint import Checkpoints
from train.engine.ema import Ema
from train.engine.subset import Subset, frozen_names


def partly_frozen() -> UNet:
    """Return a UNet of which 1 % is trained: queries and output of the attention in its middle."""
    torch.manual_seed(0)
    unet = small_unet(channels=(16, 32), heads=(2, 2), groups=8)
    unet.requires_grad_(False)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q.requires_grad_(True)
    attention.to_out.requires_grad_(True)
    return UNet.wrap(unet, 4)


def start(shapes: Path, parts: Path, out: Path, backbone: UNet | None = None, hooks: Any = None, **change: Any) -> None:
    train.stages.ldm.train(ldm_config(shapes, out, parts, **change), hooks, backbone=backbone or partly_frozen())


def size(out: Path) -> int:
    return sum(file.stat().st_size for file in (out / "checkpoints/step-00000008").iterdir())


def test_checkpoints_contain_only_trained_weights_and_the_model_is_complete(
    shapes: Path, parts: Path, tmp_path: Path
) -> None:
    given = partly_frozen().module
    start(shapes, parts, tmp_path / "part")
    train.stages.ldm.train(ldm_config(shapes, tmp_path / "all", parts))
    trained, total = (sum(p.numel() for p in given.parameters() if p.requires_grad or every) for every in (False, True))
    assert 0.005 < trained / total < 0.015
    assert size(tmp_path / "part") < 0.02 * size(tmp_path / "all")
    made = UNet2DConditionModel.from_pretrained(tmp_path / "part/model/unet").state_dict()
    for name, weight in given.named_parameters():
        assert torch.equal(made[name], weight) != weight.requires_grad, name
    made_images = LatentDiffusionPipeline.from_pretrained(tmp_path / "part/model")(
        "a red star", num_inference_steps=1, output_type="np"
    ).images
    assert made_images.shape == (1, 32, 32, 3)


def test_a_run_is_continued_exactly_if_its_frozen_weights_are_unchanged(
    shapes: Path, parts: Path, tmp_path: Path
) -> None:
    start(shapes, parts, tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        start(shapes, parts, tmp_path / "interrupted", hooks=Crash(5))
    changed = partly_frozen()
    with torch.no_grad():
        changed.module.conv_in.bias[0] += 1e-3
    with pytest.raises(UserError, match=r"^the \d+ frozen weights differ from those that this run was trained with"):
        start(shapes, parts, tmp_path / "interrupted", changed)
    start(shapes, parts, tmp_path / "interrupted")
    assert final_state(tmp_path / "interrupted") == final_state(tmp_path / "uninterrupted")


def test_checkpoints_that_also_contain_frozen_weights_are_read(shapes: Path, parts: Path, tmp_path: Path) -> None:
    start(shapes, parts, tmp_path / "uninterrupted")
    with pytest.raises(KeyboardInterrupt):
        start(shapes, parts, tmp_path / "old", hooks=Crash(5))
    checkpoints, weights = Checkpoints(tmp_path / "old/checkpoints"), partly_frozen().module.state_dict()
    found = checkpoints.latest()
    assert found is not None
    state = checkpoints.load(found)
    phase = state["phases"]["unet"]
    del phase["frozen"]
    phase["module"] = {f"unet.{name}": weight for name, weight in weights.items()} | phase["module"]
    state["ema"] = weights | state["ema"]
    checkpoints.save(found.step, state)
    start(shapes, parts, tmp_path / "old")
    assert final_state(tmp_path / "old") == final_state(tmp_path / "uninterrupted")
    phase["module"]["unet.conv_in.bias"] = phase["module"]["unet.conv_in.bias"] + 1
    checkpoints.save(9, state)
    with pytest.raises(UserError, match=r"the frozen weight unet\.conv_in\.bias differs from the one"):
        start(shapes, parts, tmp_path / "old", steps=10)


def network(seed: int = 0) -> nn.Module:
    """Return three layers, of which the last one is trained and the middle one has buffers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    net[:2].requires_grad_(False)
    return net


def test_frozen_parameters_are_not_in_the_state_but_buffers_are() -> None:
    subset = Subset(network(), frozen_names(network()))
    assert set(subset.state_dict()) == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
        "2.weight",
        "2.bias",
    }


def test_a_state_loads_only_into_a_network_with_the_same_frozen_weights() -> None:
    one, same, other = network(), network(), network(1)
    subsets = [Subset(net, frozen_names(net)) for net in (one, same, other)]
    with torch.no_grad():
        one[2].weight += 1
    for state in (subsets[0].state_dict(), one.state_dict()):  # the second has all weights, as older states do
        subsets[1].load_state_dict(state)
        assert torch.equal(same[2].weight, one[2].weight)
    subsets[1].require(subsets[0].digest)
    with pytest.raises(UserError, match="the 4 frozen weights differ from those"):
        subsets[2].require(subsets[0].digest)
    with pytest.raises(UserError, match=r"frozen weight \S+ differs from the one that this run was trained with"):
        subsets[2].load_state_dict(one.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        subsets[2].load_state_dict({})
    layer = nn.Linear(2, 2)
    assert Subset(layer, frozen_names(layer)).digest == ""


def test_the_average_is_complete_and_shares_frozen_weights() -> None:
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
