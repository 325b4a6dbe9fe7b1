"""Stage 1's step: the loss is the sum of its terms, and no split of a batch changes it."""

import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train.engine.loop
import train.stages.clip
import train.stages.vae
import train.stages.vae_step
from autoencoder.discriminator import PatchDiscriminator, generator_loss
from autoencoder.equivariance import Transform
from autoencoder.losses import LARGEST_WEIGHT, kl_loss
from autoencoder.model import Autoencoder
from ldm.errors import RunError, UserError
from support.batches import vae_batch
from support.gradients import gradient, relative_distance
from support.models import small_vae
from support.runs import Crash, final_state, logged, losses, train_in_processes, vae_config
from train.config.optimizer import OptimizerConfig
from train.config.vae import AdversarialConfig, AutoencoderConfig, EquivarianceConfig, PerceptualConfig, VaeConfig
from train.stages.vae_step import AutoencoderLoss, DiscriminatorLoss

ADAPTIVE = AdversarialConfig(kind="hinge", start=0, channels=8, layers=2)


class Contrast(nn.Module):
    """A perceptual distance that needs no download."""

    def forward(self, made: Tensor, pixels: Tensor) -> Tensor:
        return (made.diff(dim=-1) - pixels.diff(dim=-1)).square().mean()


# -- one step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [None, Transform(8, 12, 1)])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("learn_logvar", [False, True])
def test_the_loss_is_the_sum_of_its_terms(learn_logvar: bool, adaptive: bool, transform: Transform | None) -> None:
    """The gradient equals that of plain autograd through all terms: computing some gradients first changes nothing."""
    vae, discriminator, b = small_vae(), PatchDiscriminator(8, 2, spectral=True), vae_batch()
    config = VaeConfig(
        reconstruction="l2",
        kl_weight=1e-3,
        learn_logvar=learn_logvar,
        perceptual=PerceptualConfig(weight=0.7),
        adversarial=AdversarialConfig(kind="non_saturating", weight=0.3, adaptive=adaptive),
    )
    step = AutoencoderLoss(vae, config, Contrast(), discriminator)
    b = replace(b, transform=transform)
    s = torch.tensor(-2.0)
    if step.logvar is not None:
        step.logvar.data.fill_(s)
    out = step(b)
    out.loss.backward()
    ours = gradient(step)
    step.zero_grad()
    q = vae.encode(b.pixels).latent_dist
    z, target = q.mean + q.std * b.posterior_noise, b.pixels
    if transform is not None:
        z, target = transform(z), transform(target, 2)
    made = vae.decode(z).sample
    compared = (made - target).square().mean() + 0.7 * Contrast()(made, target)
    if step.logvar is not None:
        compared = compared / step.logvar.exp() + step.logvar
    generator = generator_loss("non_saturating", discriminator(made))
    weight = torch.tensor(0.3)
    if adaptive:
        last = vae.decoder.conv_out.weight
        norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (compared, generator)]
        weight = 0.3 * norms[0] / norms[1]
    loss = compared + 1e-3 * kl_loss(q.mean, q.logvar, 3072) + weight.detach() * generator
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    assert relative_distance(ours, gradient(step)) < 1e-5
    assert float(out.metrics["adversarial_weight"]) == pytest.approx(float(weight), rel=1e-4)


def test_a_perceptual_distance_of_weight_0_is_measured_but_not_trained_on(
    shapes: Path, tmp_path: Path, small_clip: Path
) -> None:
    measured = PerceptualConfig(kind="clip", model=str(small_clip), weight=0)
    for name, perceptual in (("measured", measured), ("none", PerceptualConfig())):
        train.stages.vae.train(config(shapes, tmp_path / name, steps=2, perceptual=perceptual))
    with_distance, without = (logged(tmp_path / name) for name in ("measured", "none"))
    assert any(line.get("val_perceptual", 0) > 0 for line in with_distance)
    assert not any("perceptual" in line for line in with_distance)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (with_distance, without)]
    assert losses[0] == losses[1]


def test_the_loss_weights_of_rombach_et_al_apply() -> None:
    """Their loss, a sum over an image, is ours times 3·H·W, and so is the gradient, adaptive weight included."""
    vae, discriminator, b = small_vae(), PatchDiscriminator(8, 2), vae_batch()
    step = AutoencoderLoss(
        vae, VaeConfig(adversarial=ADAPTIVE, perceptual=PerceptualConfig()), Contrast(), discriminator
    )
    step(b).loss.backward()
    ours = gradient(vae)
    vae.zero_grad()
    q = vae.encode(b.pixels).latent_dist
    made = vae.decode(q.mean + q.std * b.posterior_noise).sample
    n = len(made)
    nll = ((made - b.pixels).abs() + Contrast()(made, b.pixels)).sum() / n
    kl = 0.5 * (q.mean**2 + q.var - 1 - q.logvar).sum() / n
    generator, last = -discriminator(made).mean(), vae.decoder.conv_out.weight
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (nll, generator)]
    (nll + 1e-6 * kl + 0.5 * (norms[0] / norms[1]).detach() * generator).backward()
    assert relative_distance(ours * 3 * 32 * 32, gradient(vae)) < 1e-4


@pytest.mark.parametrize("r1", [0.0, 1.0])
@pytest.mark.parametrize("spectral", [False, True])
def test_a_networks_step_changes_no_other_network(spectral: bool, r1: float) -> None:
    vae, discriminator, b = small_vae(), PatchDiscriminator(8, 2, spectral=spectral), vae_batch()
    settings = AdversarialConfig(kind="hinge", spectral_norm=spectral, r1=r1)
    step = AutoencoderLoss(vae, VaeConfig(adversarial=settings), None, discriminator)
    state = {k: v.clone() for k, v in discriminator.state_dict().items()}
    out = step(b)
    out.loss.backward()
    assert gradient(vae).norm() > 0
    assert all(p.grad is None for p in discriminator.parameters())
    assert all(torch.equal(v, state[k]) for k, v in discriminator.state_dict().items())
    vae.zero_grad()
    state = {k: v.clone() for k, v in vae.state_dict().items()}
    DiscriminatorLoss(discriminator, settings)(out.batch).loss.backward()
    assert gradient(discriminator).norm() > 0
    assert all(p.grad is None for p in vae.parameters())
    assert all(torch.equal(v, state[k]) for k, v in vae.state_dict().items())


def test_the_discriminator_sees_the_target_images() -> None:
    vae, discriminator, b = small_vae(), PatchDiscriminator(8, 2), vae_batch()
    step = AutoencoderLoss(vae, VaeConfig(adversarial=ADAPTIVE), None, discriminator)
    t = Transform(8, 8, 3)
    given = step(replace(b, transform=t)).batch
    torch.testing.assert_close(given.real, t(b.pixels, 2))
    assert given.fake.shape == given.real.shape
    assert not given.fake.requires_grad


# -- splits of a batch ----------------------------------------------------------------------------------------


def config(shapes: Path, out: Path, **change: Any) -> VaeConfig:
    return vae_config(shapes, out, **{"adversarial": ADAPTIVE} | change)


EVERYTHING: dict[str, Any] = {
    "learn_logvar": True,
    "reconstruction": "huber",
    "adversarial": AdversarialConfig(kind="hinge", start=2, channels=8, spectral_norm=True, r1=0.5),
    "equivariance": EquivarianceConfig(share=0.5, smallest=0.5),
}


def distances(a: Path, b: Path, step: int) -> dict[str, float]:
    """Return the relative L2 distance of each network's weights at a step of two runs."""
    states = [load_file(run / f"checkpoints/step-{step:08d}/state.safetensors") for run in (a, b)]
    found = {}
    for name in ("vae", "discriminator"):
        mine = [k for k in states[0] if k.startswith(f"state/phases/{name}/module/")]
        one, two = (torch.cat([s[k].flatten().double() for k in mine]) for s in states)
        found[name] = relative_distance(one, two)
    return found


def test_accumulation_changes_nothing(shapes: Path, tmp_path: Path) -> None:
    steady = {"optimizer": OptimizerConfig(lr=1e-4, warmup=0), "steps": 5, "checkpoint_every": 5}
    train.stages.vae.train(config(shapes, tmp_path / "a", **EVERYTHING | steady))
    train.stages.vae.train(config(shapes, tmp_path / "b", accumulation=4, **EVERYTHING | steady))
    assert max(distances(tmp_path / "a", tmp_path / "b", 5).values()) < 1e-5


def test_two_processes_train_as_one(shapes: Path, tmp_path: Path) -> None:
    """2 Gloo processes with 4 images each and 1 with 8 reach the same weights in five steps of both networks."""
    change = EVERYTHING | {
        "adversarial": AdversarialConfig(kind="hinge", start=0, channels=8, spectral_norm=True, r1=0.5),
        "optimizer": OptimizerConfig(lr=1e-4, warmup=0),
        "steps": 5,
        "checkpoint_every": 5,
        "log_every": 1,
    }
    for count, name in ((1, "one"), (2, "two")):
        train_in_processes(config(shapes, tmp_path / name, **change), count)
    assert max(distances(tmp_path / "one", tmp_path / "two", 5).values()) < 1e-5
    for (_, a), (_, b) in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    # Validation is split between the processes and gives the same result.
    one, two = ([line for line in logged(tmp_path / name) if "val_psnr" in line] for name in ("one", "two"))
    for name, value in one[0].items():
        if name.startswith("val_"):
            assert value == pytest.approx(two[0][name], rel=1e-3, abs=1e-3), name


def test_all_options_together_are_resumed_exactly(shapes: Path, tmp_path: Path) -> None:
    train.stages.vae.train(config(shapes, tmp_path / "uninterrupted", **EVERYTHING))
    state = load_file(tmp_path / "uninterrupted/checkpoints/step-00000008/state.safetensors")
    assert state["state/phases/vae/module/logvar"] != 0
    for at in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            train.stages.vae.train(config(shapes, tmp_path / f"interrupted-{at}", **EVERYTHING), hooks=Crash(at))
        train.stages.vae.train(config(shapes, tmp_path / f"interrupted-{at}", **EVERYTHING))
        assert final_state(tmp_path / f"interrupted-{at}") == final_state(tmp_path / "uninterrupted"), at


def test_the_estimate_before_a_run_changes_nothing(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The estimate of memory and time runs every phase once; the run is the same without it."""
    adversarial = {"adversarial": AdversarialConfig(kind="hinge", start=0, channels=8, spectral_norm=True)}
    train.stages.vae.train(config(shapes, tmp_path / "a", **EVERYTHING | adversarial))
    monkeypatch.setattr(train.engine.loop, "estimate", lambda *_: 1.0)
    train.stages.vae.train(config(shapes, tmp_path / "b", **EVERYTHING | adversarial))
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_gradient_checkpointing_gives_the_same_run(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, forward = [0], ResnetBlock2D.forward

    def counted(block: ResnetBlock2D, *args: Any, **kwargs: Any) -> Tensor:
        calls[0] += block.training  # without those of validation and of the final model
        return forward(block, *args, **kwargs)

    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    train.stages.vae.train(config(shapes, tmp_path / "a"))
    once = calls[0]
    train.stages.vae.train(config(shapes, tmp_path / "b", gradient_checkpointing=True))
    assert calls[0] > 2.3 * once
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


# -- when gradients vanish and explode ------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e25, math.inf])
def test_the_adaptive_weight_is_finite_or_the_step_is_skipped(
    factor: float, precision: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The generator's loss is multiplied by a factor: vanishing, ordinary, exploding, infinite."""
    monkeypatch.setattr(train.stages.vae_step, "generator_loss", lambda kind, fake: factor * generator_loss(kind, fake))
    never = factor == math.inf or (precision == "fp16" and factor > 1)  # no step is finite
    with pytest.raises(RunError, match="finite") if never else nullcontext():
        train.stages.vae.train(config(shapes, tmp_path / "run", precision=precision, steps=4, log_every=1))
    lines = logged(tmp_path / "run")
    weights = [line["adversarial_weight"] for line in lines if "adversarial_weight" in line]
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    assert checkpoint.exists() != never
    state = {} if never else load_file(checkpoint / "state.safetensors")
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())
    skipped = max(line["skipped"] for line in lines if "skipped" in line)
    assert all(0 <= w <= 0.5 * LARGEST_WEIGHT for w in weights)
    if factor == math.inf:
        assert not weights  # NaN, which isn't logged
        assert skipped == 4
    elif factor < 1:
        assert weights[-1] == pytest.approx(0.5 * LARGEST_WEIGHT)
        assert skipped <= (precision == "fp16")  # fp16's loss scale starts too high
    elif factor == 1:
        assert 0 < weights[-1] < 100
        assert skipped < 3
    else:  # the gradient is too large for half precision, not for float32
        assert skipped == (4 if precision == "fp16" else 0)
        assert precision == "fp16" or weights[-1] < 1e-20


# -- initialised from another autoencoder -----------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with an autoencoder that has its own scaling factor."""
    vae = small_vae()
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "given")
    return tmp_path / "given"


def test_training_only_the_decoder_keeps_the_latents(shapes: Path, trained: Path, tmp_path: Path) -> None:
    train.stages.vae.train(
        config(shapes, tmp_path / "run", init=str(trained), decoder_only=True, model=AutoencoderConfig())
    )
    before, after = Autoencoder.load(trained), Autoencoder.load(tmp_path / "run/model")
    assert after.scale == 0.5
    x = vae_batch().pixels
    assert torch.equal(before.encode(x).mean, after.encode(x).mean)
    assert torch.equal(before.encode(x).std, after.encode(x).std)
    z = before.encode(x).mean
    assert not torch.equal(before.decode(z), after.decode(z))
    for name, value in before.vae.state_dict().items():
        moved = not torch.equal(value, after.vae.state_dict()[name])
        assert moved == name.startswith(("decoder", "post_quant_conv")), name


def test_training_starts_from_a_given_autoencoder(shapes: Path, trained: Path, tmp_path: Path) -> None:
    train.stages.vae.train(config(shapes, tmp_path / "run", init=str(trained), steps=1, model=AutoencoderConfig()))
    after = Autoencoder.load(tmp_path / "run/model")
    assert after.scale == 0.18215
    assert after.vae.config.block_out_channels == [8, 16]
    raw = load_file(tmp_path / "run/checkpoints/step-00000001/state.safetensors")
    weight = small_vae().encoder.conv_in.weight
    assert relative_distance(raw["state/phases/vae/module/vae.encoder.conv_in.weight"], weight.detach()) < 0.05
    # A run refuses another initialisation, and none.
    with pytest.raises(UserError, match="--init"):
        train.stages.vae.train(config(shapes, tmp_path / "run", steps=2, model=AutoencoderConfig()))
    other = small_vae()
    with torch.no_grad():
        other.decoder.conv_out.bias += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="--init"):
        train.stages.vae.train(
            config(shapes, tmp_path / "run", init=str(tmp_path / "other"), steps=2, model=AutoencoderConfig())
        )


def test_an_error_in_a_run_keeps_its_checkpoints(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> dict[str, float]:
        raise UserError("of no use")

    monkeypatch.setattr(train.stages.vae, "measure_reconstruction", fail)
    with pytest.raises(UserError):
        train.stages.vae.train(config(shapes, tmp_path / "run", validate_every=5))
    assert (tmp_path / "run/checkpoints/step-00000003").is_dir()


def test_unsuitable_autoencoders_are_refused(shapes: Path, trained: Path, tmp_path: Path) -> None:
    wider = AutoencoderConfig(channels=(16, 32), layers=1, groups=2, attention=False)
    with pytest.raises(UserError, match="another shape"):
        train.stages.vae.train(config(shapes, tmp_path / "run", init=str(trained), model=wider))
    bare = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=2,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    bare.save_pretrained(tmp_path / "bare")
    plain = {"init": str(tmp_path / "bare"), "model": AutoencoderConfig(), "steps": 1}
    with pytest.raises(UserError, match="quant"):
        train.stages.vae.train(config(shapes, tmp_path / "run", **plain))
    train.stages.vae.train(config(shapes, tmp_path / "run", decoder_only=True, **plain))


def test_a_run_refuses_another_perceptual_network(shapes: Path, tmp_path: Path, small_clip: Path) -> None:
    perceptual = PerceptualConfig(kind="clip", model=str(small_clip))
    train.stages.vae.train(
        config(shapes, tmp_path / "run", steps=1, perceptual=perceptual, validation_features=str(small_clip))
    )
    lines = logged(tmp_path / "run")
    measured = next(line for line in lines if "val_psnr" in line)
    assert measured["val_perceptual"] > 0
    assert measured["val_frechet"] > 0
    moved = tmp_path / "moved"
    shutil.copytree(small_clip, moved)
    elsewhere = PerceptualConfig(kind="clip", model=str(moved))
    train.stages.vae.train(
        config(shapes, tmp_path / "run", steps=1, perceptual=elsewhere)
    )  # the same network at another path
    weights = moved / "model.safetensors"
    state = {k: v + 0.01 for k, v in load_file(weights).items() if v.is_floating_point()}
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"perceptual\.model"):
        train.stages.vae.train(config(shapes, tmp_path / "run", steps=2, perceptual=elsewhere))
