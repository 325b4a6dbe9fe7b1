"""Settings of stage 1: each has its effect on a step of the stage, computed by other means."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, Encoder
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import alexnet
from transformers import CLIPVisionModel

from autoencoder.model import Autoencoder
from autoencoder.normalisation import sensitivity
from ldm.errors import UserError
from support.models import small_vae
from support.reference_losses import vae_terms
from support.runs import vae_config
from support.stepping import Recorded, change, record, uniforms
from train.config.vae import AdversarialConfig, AutoencoderConfig, EquivarianceConfig, PerceptualConfig, VaeConfig

PLAIN: dict[str, Any] = {"adversarial": AdversarialConfig(), "steps": 20}


def run(
    shapes: Path, out: Path, count: int = 1, then: Any = lambda stage: None, **settings: Any
) -> tuple[VaeConfig, Recorded]:
    config = vae_config(shapes, out, **PLAIN | settings)
    return config, record(config, count, then)


def critic(**settings: Any) -> AdversarialConfig:
    return AdversarialConfig(**{"kind": "hinge", "start": 0, "channels": 8, "layers": 2} | settings)


# -- the terms of the loss --------------------------------------------------------------------------------------

TERMS: dict[str, dict[str, Any]] = {
    "l1": {"reconstruction": "l1"},
    "l2": {"reconstruction": "l2", "kl_weight": 0.7},
    "huber": {"reconstruction": "huber", "kl_weight": 0.0},
    "learned scale": {"learn_logvar": True, "kl_weight": 1.5},
    "hinge": {"adversarial": critic(weight=0.3, adaptive=False)},
    "non-saturating": {"adversarial": critic(kind="non_saturating", weight=2.0, adaptive=False, r1=3.0)},
    "saturating": {"adversarial": critic(kind="saturating", weight=0.2)},
    "penalty": {"adversarial": critic(r1=50.0, weight=0.8), "learn_logvar": True},
    "equivariance": {"equivariance": EquivarianceConfig(share=1.0, smallest=0.4), "adversarial": critic(r1=1.0)},
}


@pytest.mark.parametrize("name", TERMS)
def test_losses_equal_the_papers_formulas(name: str, shapes: Path, tmp_path: Path) -> None:
    config, recorded = run(shapes, tmp_path / "run", **TERMS[name])
    _compare(config, recorded, vae_terms(config, recorded.initial, recorded.parts[0], 0))


def _compare(config: VaeConfig, recorded: Recorded, terms: dict[str, Tensor]) -> None:
    metrics, names = recorded.metrics[0], {"loss": "loss", "critic": "discriminator_loss"}
    for name, value in terms.items():
        assert metrics[names.get(name, name)] == pytest.approx(value.item(), rel=1e-4, abs=1e-7), name
    assert ("adversarial" in metrics) == (config.adversarial.kind != "none")
    for net, name, prefix in zip(recorded.initial, ("loss", "critic"), ("", "discriminator_"), strict=False):
        weights = [p for p in net.parameters() if p.requires_grad]
        found = torch.autograd.grad(terms[name], weights, retain_graph=True, allow_unused=True)
        norm = torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt().item()
        assert metrics[f"{prefix}grad_norm"] == pytest.approx(norm, rel=2e-3), name


@pytest.mark.parametrize("weight", [0.0, 0.6])
def test_a_clip_measures_the_perceptual_distance(weight: float, shapes: Path, small_clip: Path, tmp_path: Path) -> None:
    config, recorded = run(
        shapes, tmp_path / "run", perceptual=PerceptualConfig(kind="clip", model=str(small_clip), weight=weight)
    )
    tower = CLIPVisionModel.from_pretrained(small_clip).requires_grad_(False)

    def distance(decoded: Tensor, target: Tensor) -> Tensor:
        states = []
        for x in (decoded, target):  # this CLIP's images are in [-1, 1]
            small = F.interpolate(x, (16, 16), mode="bicubic", antialias=True)
            states.append(torch.stack(tower(small, output_hidden_states=True).hidden_states))
        a, b = (F.normalize(x, dim=-1) for x in states)
        return (a - b).square().sum(-1).mean()

    terms = vae_terms(config, recorded.initial, recorded.parts[0], 0, distance if weight else None)
    _compare(config, recorded, terms)


def test_kinds_of_lpips_have_their_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = alexnet().state_dict()
    save_file({k: v for k, v in state.items() if k.startswith("features")}, tmp_path / "alex.safetensors")
    built = PerceptualConfig(kind="lpips_alex", model=str(tmp_path / "alex.safetensors")).build()
    assert built is not None
    assert torch.equal(built.parts[0][0].weight, state["features.0.weight"])
    made = []
    monkeypatch.setattr("autoencoder.perceptual.Lpips", lambda *given: made.append(given))
    for kind in ("lpips_vgg", "lpips_alex"):
        PerceptualConfig(kind=kind, model="file").build()
    assert made == [("vgg", "file"), ("alex", "file")]
    assert PerceptualConfig().build() is None


# -- the discriminator ------------------------------------------------------------------------------------------


def test_the_discriminator_starts_at_its_step(shapes: Path, tmp_path: Path) -> None:
    """Before, neither network has an adversarial loss, and the discriminator's weights don't change."""
    for accumulation in (1, 2):
        out = tmp_path / str(accumulation)
        _, recorded = run(shapes, out, 4, adversarial=critic(start=2), accumulation=accumulation)
        assert [{"adversarial", "discriminator_loss"} & m.keys() for m in recorded.metrics[:2]] == [set(), set()]
        assert all({"adversarial", "discriminator_loss"} <= m.keys() for m in recorded.metrics[2:])
        first = recorded.initial[1].state_dict()
        assert [bool(change(step[1], first).any()) for step in recorded.weights] == [False, False, True, True]


@pytest.mark.parametrize(("channels", "layers"), [(8, 2), (12, 1), (4, 3)])
def test_the_discriminator_has_its_shape(channels: int, layers: int, shapes: Path, tmp_path: Path) -> None:
    """Isola et al. 2017: `layers` strided convolutions and two more, each twice as wide as the last, 4 × 4."""
    _, recorded = run(shapes, tmp_path / "run", 0, adversarial=critic(channels=channels, layers=layers))
    convolutions = [m for m in recorded.initial[1].modules() if isinstance(m, nn.Conv2d)]
    widths = [3, *(channels * 2**k for k in range(layers + 1)), 1]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == list(pairwise(widths))
    assert [m.stride[0] for m in convolutions] == [2] * layers + [1, 1]
    assert {m.kernel_size for m in convolutions} == {(4, 4)}


@pytest.mark.parametrize("spectral", [False, True])
def test_spectral_normalisation_keeps_the_largest_singular_value_at_1(
    spectral: bool, shapes: Path, tmp_path: Path
) -> None:
    _, recorded = run(shapes, tmp_path / "run", 7, adversarial=critic(spectral_norm=spectral, lr=1e-3))
    layers = [m for m in recorded.stage.discriminator.modules() if isinstance(m, nn.Conv2d)]
    values = [torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2).item() for m in layers]
    assert (max(abs(value - 1) for value in values) < 0.15) == spectral, values
    if spectral:  # the estimate follows the weights: without it, it stays the first step's
        vectors = [{k: v for k, v in step[1].items() if k.endswith("_u")} for step in recorded.weights[-2:]]
        assert all(not torch.equal(vectors[0][k], v) for k, v in vectors[1].items() if v.numel() > 1)


# -- equivariance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "smallest", "seed"), [(0.0, 0.25, 0), (0.3, 0.25, 1), (1.0, 0.5, 2), (0.5, 1.0, 3)])
def test_latents_are_transformed_in_their_share_of_steps(
    share: float, smallest: float, seed: int, shapes: Path, tmp_path: Path
) -> None:
    found: list[Any] = []

    def draw(stage: Any) -> None:
        parts = next(stage.batches(0))
        found.extend(stage.prepare(step, parts)[0].transform for step in range(400))

    run(shapes, tmp_path / "run", 0, draw, seed=seed, equivariance=EquivarianceConfig(share=share, smallest=smallest))
    u = uniforms(seed, 12, range(400), 4)
    expected = [
        (round(16 * (smallest + (1 - smallest) * b)), round(16 * (smallest + (1 - smallest) * c)), int(4 * d))
        if a < share
        else None
        for a, b, c, d in u
    ]
    assert [None if t is None else (t.height, t.width, t.turns) for t in found] == expected
    count = sum(t is not None for t in found)
    assert abs(count - 400 * share) <= 4 * (400 * share * (1 - share)) ** 0.5


# -- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        AutoencoderConfig(channels=(8, 16), layers=1, latent_channels=3, groups=4, attention=False),
        AutoencoderConfig(channels=(6, 12, 12), layers=2, latent_channels=5, groups=3, attention=True),
    ],
)
def test_the_autoencoder_has_its_shape(shape: AutoencoderConfig, shapes: Path, tmp_path: Path) -> None:
    """Its parts have the weights of diffusers' encoder and decoder of this shape."""
    _, recorded = run(shapes, tmp_path / "run", model=shape)
    levels = len(shape.channels)
    common = {
        "block_out_channels": shape.channels,
        "layers_per_block": shape.layers,
        "norm_num_groups": shape.groups,
        "mid_block_add_attention": shape.attention,
    }
    encoder = Encoder(3, shape.latent_channels, ("DownEncoderBlock2D",) * levels, **common)
    decoder = Decoder(shape.latent_channels, 3, ("UpDecoderBlock2D",) * levels, **common)
    vae = recorded.stage.reconstruct.vae
    for ours, theirs in ((vae.encoder, encoder), (vae.decoder, decoder)):
        assert [(n, tuple(p.shape)) for n, p in ours.named_parameters()] == [
            (n, tuple(p.shape)) for n, p in theirs.named_parameters()
        ]
    norms = {m.num_groups for m in vae.modules() if isinstance(m, nn.GroupNorm)}
    assert norms == {shape.groups}
    side = 32 // 2 ** (levels - 1)
    noise = recorded.parts[0][0].posterior_noise
    assert noise.shape == (8, shape.latent_channels, side, side)
    positions = recorded.read[0][0].position.tolist()
    numbers = np.random.Generator(np.random.Philox(key=[0, 8], counter=[0, 0, positions[3], 0]))
    assert torch.equal(noise[3], torch.from_numpy(numbers.standard_normal(noise[3].shape, np.float32)))


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing_computes_activations_twice(
    on: bool, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once in the forward pass, once more in the backward pass."""
    calls: list[bool] = []
    forward = ResnetBlock2D.forward
    monkeypatch.setattr(
        ResnetBlock2D, "forward", lambda block, *a, **k: (calls.append(block.training), forward(block, *a, **k))[1]
    )
    _, recorded = run(shapes, tmp_path / "run", gradient_checkpointing=on)
    blocks = sum(isinstance(m, ResnetBlock2D) for m in recorded.initial[0].modules())
    assert sum(calls) == blocks * (1 + on)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an autoencoder of random weights."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("given")
    AutoencoderConfig(channels=(8, 16), groups=2, attention=False).build(32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("decoder_only", [False, True])
def test_training_starts_from_init_and_moves_what_it_should(
    decoder_only: bool, given: Path, shapes: Path, tmp_path: Path
) -> None:
    _, recorded = run(shapes, tmp_path / "run", init=str(given), decoder_only=decoder_only, model=AutoencoderConfig())
    stored = Autoencoder.load(given).vae.state_dict()
    first, after = recorded.initial[0].vae.state_dict(), recorded.weights[0][0]
    assert all(torch.equal(first[name], value) for name, value in stored.items())
    for part, moves in (("encoder", not decoder_only), ("quant_conv", not decoder_only), ("decoder", True)):
        moved = [n for n in stored if n.startswith(part) and not torch.equal(after[f"vae.{n}"], stored[n])]
        assert bool(moved) == moves, part


@pytest.mark.parametrize("encode_once", [False, True])
@pytest.mark.parametrize("normalisation", ["channels", "pixels"])
def test_latents_are_normalised_as_configured(
    normalisation: Any, encode_once: bool, shapes: Path, tmp_path: Path
) -> None:
    """Each channel has variance 1, or the decoder is as sensitive in each direction, with a mean variance of 1."""
    small_vae().save_pretrained(tmp_path / "given")
    config = vae_config(shapes, tmp_path / "run", init=str(tmp_path / "given"), model=AutoencoderConfig())
    seen: dict[str, Tensor] = {}

    def export(stage: Any) -> None:
        stage.export(tmp_path / "model", final=True)
        batch = stage.unshuffled.__getitems__(range(64))
        seen.update(pixels=batch.pixels, noise=batch.drawn)

    record(replace(config, normalisation=normalisation, encode_once=encode_once, cache=""), 0, export)
    made = Autoencoder.load(tmp_path / "model")
    latents = made.encode(seen["pixels"])
    variance = latents.sample(seen["noise"]).var((0, 2, 3))
    values = torch.linalg.eigvalsh(sensitivity(made.vae, [tuple(seen.values())], torch.full((4,), 1 / made.scale)))
    assert float(variance.mean()) == pytest.approx(1, abs=1e-3)
    assert bool((variance - 1).abs().max() < 2e-3) == (normalisation == "channels")
    assert bool(values[-1] / values[0] < 1.1) == (normalisation == "pixels")
    given = Autoencoder.load(tmp_path / "given")
    expected = given.decode(given.encode(seen["pixels"]).mean)
    torch.testing.assert_close(made.decode(latents.mean), expected, rtol=1e-3, atol=1e-3)


def test_an_encoder_without_quant_convolutions_is_not_trained(shapes: Path, tmp_path: Path) -> None:
    """Its latents couldn't be normalised by folding."""
    bare = AutoencoderKL.from_config(
        {**AutoencoderConfig(channels=(8, 16), groups=2, attention=False).build(32).config, "use_quant_conv": False}
        | {"use_post_quant_conv": False, "_use_default_values": []}
    )
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no quant convolutions"):
        run(shapes, tmp_path / "run", init=str(tmp_path / "bare"), model=AutoencoderConfig())


# -- validation ---------------------------------------------------------------------------------------------------


def test_validation_measures_the_averaged_weights_on_so_many_images(
    small_clip: Path, shapes: Path, tmp_path: Path
) -> None:
    """PSNR of the averaged network's reconstructions of 5 held-out images, at the end of a short training."""
    found: dict[str, Any] = {}
    perceptual = PerceptualConfig(kind="clip", model=str(small_clip), weight=0.0)
    settings = {"validation_examples": 5, "ema_decay": 0.5, "validation_features": str(small_clip)}

    def measure(stage: Any) -> None:
        found.update(stage.validate(3).metrics)
        pixels = stage.held_out.__getitems__(list(range(5))).pixels
        vae = stage.ema.module
        with torch.no_grad():
            mean = vae.quant_conv(vae.encoder(pixels)).chunk(2, 1)[0]
            decoded = vae.decoder(vae.post_quant_conv(mean)).clamp(-1, 1)
        errors = ((decoded - pixels) / 2).square().flatten(1).mean(1)
        found["expected"] = (-10 * errors.log10()).mean().item()

    run(shapes, tmp_path / "run", 6, measure, perceptual=perceptual, **settings)
    assert found["val_psnr"] == pytest.approx(found["expected"], abs=0.02)
    assert found["val_perceptual"] > 0
    assert found["val_frechet"] > 0
