"""The model's parts at work: how many images the autoencoder gets at once, and which sizes are accepted."""

from typing import Any

import pytest
import torch
from torch import Tensor

from autoencoder.model import Posterior
from ldm.model import Model
from support.models import tiny_pipeline


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_pipeline().model


@pytest.mark.parametrize(("side", "calls"), [(32, [32, 1]), (1024, [8, 8, 8, 8, 1]), (2048, [2] * 16 + [1])])
def test_the_autoencoder_gets_eight_megapixels_or_32_images_at_once(
    model: Model, side: int, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def one_value_each(x: Tensor) -> Any:
        seen.append(len(x))
        return x[:, :3, :1, :1]

    monkeypatch.setattr(model.autoencoder, "factor", 4)
    monkeypatch.setattr(model.autoencoder, "decode", one_value_each)
    monkeypatch.setattr(model.autoencoder, "encode", lambda x: Posterior(one_value_each(x), x[:, :3, :1, :1]))
    z = torch.arange(33.0).view(33, 1, 1, 1) / 33
    decoded = model.decode(z.expand(33, 4, side // 4, side // 4))
    assert seen == calls
    torch.testing.assert_close(decoded[:, 0, 0, 0], z.flatten() / 2 + 0.5)
    seen.clear()
    assert torch.equal(model.posterior(z.expand(33, 3, side, side)).mean[:, 0, 0, 0], z.flatten())
    assert seen == calls


def test_a_network_is_on_the_device_only_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved = tiny_pipeline().model, []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: moved.append((module, torch.device(device).type)))
    network = model.text_encoder.model
    with model.on_device(network):
        assert not moved  # without an offload, it stays where it is
    model.offload = torch.device("cuda")
    with model.on_device(network):
        assert moved == [(network, "cuda")]
    assert moved == [(network, "cuda"), (network, "cpu")]


def test_networks_that_are_moved_to_a_device_stay_there() -> None:
    model = tiny_pipeline().model
    model.offload = torch.device("meta")  # where networks would run
    model.to(None, torch.float64)
    assert (model.device, model.backbone.dtype) == (torch.device("meta"), torch.float64)
    model.to("cpu", torch.float16)
    assert (model.offload, model.device.type, model.backbone.dtype) == (None, "cpu", torch.float16)
    assert model.autoencoder.vae.dtype == torch.float32  # it overflows in fp16
