"""Images encoded once: stage 1's statistics and stage 2's latents come from the same rows of the cache."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoencoder.model import Autoencoder, Posterior
from autoencoder.normalisation import by_channels, fold, latent_statistics, latent_sums, measure
from support.models import small_vae
from support.runs import ldm_config, vae_config
from support.stepping import record
from train.data.batches.draws import PosteriorNoise


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of images that encoders of autoencoders have received."""
    counts: list[int] = []
    hidden, encode = Autoencoder.hidden, Autoencoder.encode

    def counted(function: Any) -> Any:
        def call(autoencoder: Autoencoder, pixels: Tensor) -> Any:
            counts.append(len(pixels))
            return function(autoencoder, pixels)

        return call

    monkeypatch.setattr(Autoencoder, "hidden", counted(hidden))
    monkeypatch.setattr(Autoencoder, "encode", counted(encode))
    return counts


def stage_1(shapes: Path, out: Path, **settings: Any) -> Any:
    """Export the model of stage 1 without training, and return the stage."""
    return record(vae_config(shapes, out, **settings), 0, lambda stage: stage.export(out / "model", final=True)).stage


def posteriors(shapes: Path, runs: Path, parts: Path, **settings: Any) -> tuple[Tensor, Tensor, Autoencoder]:
    """Return mean and standard deviation of the training latents of stage 2 in image order, and its autoencoder."""
    seen: dict[str, Any] = {}

    def read(stage: Any) -> None:
        seen["mean"], seen["std"] = stage.training.latents.gather(np.arange(64)).unbind(1)

    config = replace(ldm_config(shapes, runs / "ldm", parts, cache="", **settings), vae=str(runs / "vae/model"))
    record(config, 0, read)
    return seen["mean"], seen["std"], Autoencoder.load(runs / "vae/model")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_2_takes_what_stage_1_encoded(
    precision: Any, shapes: Path, parts: Path, tmp_path: Path, encoded: list[int]
) -> None:
    """Its latents are those of the autoencoder, up to the rounding of 16 bits, and have mean 0 and variance 1."""
    change = {"encode_once": True, "precision": precision}
    stage = stage_1(shapes, tmp_path / "vae", **change)
    assert sum(encoded) == 2 * 64  # the second time for the preview's colours
    encoded.clear()
    mean, std, autoencoder = posteriors(shapes, tmp_path, parts, **change)
    assert sum(encoded) == 24  # the held-out images
    expected = autoencoder.encode(stage.unshuffled.__getitems__(range(64)).pixels)
    tolerance = 1e-5 if precision == "fp32" else 0.03
    assert (mean - expected.mean).square().mean().sqrt() < tolerance
    assert (std / expected.std - 1).abs().mean() < tolerance
    noise = PosteriorNoise(4, 2)(0, np.arange(64), (32, 32))
    latents = latent_statistics(latent_sums(Posterior(mean, std), noise))
    torch.testing.assert_close(latents.mean, torch.zeros(4, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std, torch.ones(4, dtype=torch.float64), atol=1e-4, rtol=0)

    encoded.clear()
    shutil.rmtree(tmp_path / "ldm")
    posteriors(shapes, tmp_path, parts, precision=precision)
    assert sum(encoded) == 64 + 24  # without the setting


def test_without_the_setting_stage_1_stores_nothing(shapes: Path, tmp_path: Path) -> None:
    stage_1(shapes, tmp_path / "vae")
    assert not list(tmp_path.rglob("latents-*"))


@torch.no_grad()
def test_the_last_layer_completes_the_encoder() -> None:
    """Exactly, with and without a last layer; folding changes only this layer."""
    vae = small_vae()
    pixels = torch.rand(2, 3, 32, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = Autoencoder(copy.deepcopy(vae))
    statistics = latent_statistics(measure(vae, [(pixels, torch.randn(2, 4, 16, 15))], 4))
    fold(vae, statistics, by_channels(statistics))
    without = copy.deepcopy(vae)
    without.quant_conv = None
    without.register_to_config(use_quant_conv=False)
    for autoencoder in (before, Autoencoder(vae), Autoencoder(without)):
        last = autoencoder.last_layer()
        for made, expected in zip(last(autoencoder.hidden(pixels)), autoencoder.encode(pixels), strict=True):
            assert torch.equal(made, expected)
    assert before.encoder_digest == Autoencoder(vae).encoder_digest
    assert before.digest != Autoencoder(vae).digest
    assert isinstance(Autoencoder(without).last_layer().layer, nn.Identity)


@pytest.mark.parametrize("config", [vae_config, ldm_config])
def test_a_cache_is_needed(config: Any, tmp_path: Path) -> None:
    folders = (tmp_path,) * (3 if config is ldm_config else 2)
    with pytest.raises(ValueError, match="encode_once with cache off"):
        config(*folders, encode_once=True, cache="off")
