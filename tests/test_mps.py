"""Computations in float64 work for tensors of Apple's mps, which has none; elsewhere they are unchanged."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import train.engine.checkpoint
import train.engine.trainer
from autoencoder.losses import adaptive_weight
from autoencoder.model import Autoencoder
from autoencoder.normalisation import by_pixels, fold, latent_statistics, measure, sensitivity
from autoencoder.preview import fit_colours
from autoencoder.tiling import Tiles
from ldm.editing import slerp
from ldm.float64 import double, float64_device
from ldm.timesteps import Importance, LogitNormal
from support.models import PROMPTS, small_vae, tiny_pipeline
from support.mps import MpsTensor, mps
from support.runs import clip_config, ldm_config, train_stage, vae_config
from train.commands.main import best_device, use_device
from train.config.ldm import DiffusionConfig
from train.config.optimizer import OptimizerConfig
from train.engine.optim import step_unless
from train.evaluation.autoencoder import measure_reconstruction
from train.evaluation.diffusion import bits_per_dimension
from train.evaluation.frechet import FrechetSums, frechet

PIXELS = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def both(function: Any, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the results of a function on the CPU, and for tensors on the stand-in."""
    expected = function(*tensors)
    with mps():
        found = function(*(x.to("mps") for x in tensors))
        return expected, found.cpu()


def test_the_stand_in_has_no_float64() -> None:
    with mps():
        x = torch.ones(3, device="mps")
        assert x.device.type == "mps"
        for convert in (x.double, lambda: x.to("cpu", torch.float64), lambda: torch.ones(3).double().to("mps")):
            with pytest.raises(TypeError, match="float64"):
                convert()
        with pytest.raises(RuntimeError, match="on mps and on the CPU"):
            x + torch.ones(3)
        assert double(x).device.type == "cpu"
    assert float64_device("cuda:1") == torch.device("cuda:1")


def weights_of_importance(u: Tensor, loss: Tensor) -> Tensor:
    timesteps = Importance(bins=4).to(u.device)
    for _ in range(2):
        timesteps.record((torch.arange(8, device=u.device) * 125), loss, 1000)
        timesteps.update()
    sampled = timesteps(u, 1000)
    return torch.stack([sampled.index.float(), torch.as_tensor(sampled.weight).float() * torch.ones_like(u)])


@pytest.mark.parametrize(
    "function",
    [
        weights_of_importance,
        lambda u, loss: LogitNormal()(u, 1000).index,
        lambda u, loss: slerp(u[None], loss[None], 0.3),
        lambda u, loss: adaptive_weight(u, loss) * u,
    ],
    ids=("importance", "logit_normal", "slerp", "adaptive_weight"),
)
def test_results_are_those_of_the_cpu(function: Any) -> None:
    expected, found = both(function, torch.linspace(0.01, 0.99, 8), torch.linspace(1, 2, 8))
    torch.testing.assert_close(found, expected)


def test_an_autoencoder_is_normalised_and_measured(tmp_path: Path) -> None:
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def normalise(pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, float], Tensor]:
        vae = small_vae().to(pixels.device)
        statistics = latent_statistics(measure(vae, [(pixels, noise)], 4))
        fold(vae, statistics, by_pixels(statistics, sensitivity(vae, [(pixels, noise)], statistics.std)))
        autoencoder = Autoencoder(vae)
        scores = measure_reconstruction(autoencoder, [(pixels, noise)])
        return vae.quant_conv.weight.detach().cpu(), scores, fit_colours(autoencoder, [pixels]).weight

    expected = normalise(PIXELS, noise)
    with mps():
        found = normalise(PIXELS.to("mps"), noise.to("mps"))
        colours = found[2].cpu()
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(colours, expected[2], rtol=1e-3, atol=1e-4)
    assert found[1] == pytest.approx(expected[1], rel=1e-4)


def test_features_and_the_bound_are_measured() -> None:
    def distance(features: Tensor) -> float:
        a, b = FrechetSums(4, features.device), FrechetSums(4, features.device)
        a.add(features)
        b.add(features * 2 + 1)
        return frechet(a, b)

    features = torch.randn(16, 4, generator=torch.Generator().manual_seed(2))
    pipe = tiny_pipeline()
    batch = [(PIXELS[:2], PROMPTS[:2])]
    expected = distance(features), bits_per_dimension(pipe, batch, strata=2)[0]
    with mps():
        found = distance(features.to("mps")), bits_per_dimension(pipe.to("mps"), batch, strata=2)[0]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["text", "image", "inpaint", "tiles", "inverted"])
def test_images_are_those_of_the_cpu(kind: str) -> None:
    pipe = tiny_pipeline()
    inputs: dict[str, Any] = {"image": PIXELS[:1] / 2 + 0.5} if kind in ("image", "inpaint") else {}
    if kind == "inpaint":
        inputs["mask_image"] = torch.ones(1, 1, 32, 32)
        inputs["mask_image"][..., :16] = 0
    if kind == "tiles":
        pipe.enable_vae_tiling(Tiles(12, 4))

    def generated() -> Tensor:
        if kind == "inverted":
            latents = torch.linspace(-1, 1, 4 * 16 * 16).view(1, 4, 16, 16)
            return pipe.invert(latents, PROMPTS[0], num_inference_steps=2).cpu()
        sampler = "dpmpp_2m_sde" if kind == "text" else "ddim"
        how = {"num_inference_steps": 3, "sampler": sampler, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        return torch.as_tensor(pipe(PROMPTS[0], generator=generator, **inputs, **how).images.cpu())

    expected = generated()
    with mps():
        pipe.to("mps")
        torch.testing.assert_close(generated(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_is_not_finite_changes_nothing(kind: str) -> None:
    """The fused AdamW of mps ignores found_inf."""

    def weights(device: str) -> list[Tensor]:
        torch.manual_seed(0)
        network = nn.Linear(4, 4).to(device)
        optimizer = OptimizerConfig(kind=kind).build(network)
        after = []
        for value, bad in ((1.0, 0), (math.nan, 1), (2.0, 0)):
            for weight in network.parameters():
                weight.grad = torch.full_like(weight, value)
            step_unless(optimizer, torch.tensor(float(bad), device=device))
            after += [torch.cat([w.detach().cpu().clone().flatten() for w in network.parameters()])]
        return after

    expected = weights("cpu")
    with mps():
        found = weights("mps")
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("cuda", "apple", "chosen"), [(1, 1, "cuda"), (1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_the_best_device_is_chosen(cuda: int, apple: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(apple))
    assert best_device() == chosen
    if chosen == "mps":
        with mps():
            assert use_device("").type == "mps"


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let accelerate find the stand-in, and save its tensors in checkpoints."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(plain(item) for item in value)
        return value.inner if isinstance(value, MpsTensor) else value

    pack = train.engine.checkpoint.pack_tree
    for module in (train.engine.checkpoint, train.engine.trainer):
        monkeypatch.setattr(module, "pack_tree", lambda tree: pack(plain(tree)), raising=False)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *_, **__: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)
    for name in [name for name in os.environ if name.startswith("ACCELERATE")]:
        monkeypatch.delenv(name)
    with mps():
        yield


@pytest.mark.slow
def test_all_stages_train(apple: None, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how: dict[str, Any] = {"workers": 0, "validate_every": 3, "validation_examples": 8}
    train_stage(clip_config(shapes, tmp_path / "clip", steps=2, workers=0))
    train_stage(vae_config(shapes, tmp_path / "vae", steps=6, **how))
    for sampling in ("importance", "logit_normal"):
        diffusion = DiffusionConfig(timestep_sampling=sampling)
        train_stage(ldm_config(shapes, tmp_path / sampling, tmp_path, steps=3, diffusion=diffusion, **how))
    assert capsys.readouterr().out.count("device mps, 1 process") == 4
