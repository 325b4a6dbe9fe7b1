"""Each loss against its formula or another implementation, and which parameters have gradients."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision.models import alexnet, vgg16
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionModel

from autoencoder.discriminator import PatchDiscriminator, discriminator_loss, frozen, generator_loss, r1_penalty
from autoencoder.equivariance import Transform, draw
from autoencoder.losses import (
    LARGEST_WEIGHT,
    adaptive_weight,
    kl_loss,
    known,
    likelihood_loss,
    reconstruction_loss,
    underflow_scale,
)
from autoencoder.perceptual import ClipPerceptual, Lpips, _unit
from ldm.errors import UserError
from support.images import smooth_pixels


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))


# -- of images and latents ----------------------------------------------------------------------------------


def test_kl_against_torch_distributions() -> None:
    mean, logvar = noise(5, 4, 2, 2), noise(5, 4, 2, 2, seed=1)
    q = torch.distributions.Normal(mean, (logvar / 2).exp())
    p = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(q, p).sum((1, 2, 3)).mean() / 48
    torch.testing.assert_close(kl_loss(mean, logvar, 48), expected)


def test_reconstruction_errors() -> None:
    made, pixels = torch.tensor([0.0, 0.05, 0.5]), torch.zeros(3)
    assert reconstruction_loss("l1", made, pixels) == pytest.approx(0.55 / 3)
    assert reconstruction_loss("l2", made, pixels) == pytest.approx((0.0025 + 0.25) / 3)
    assert reconstruction_loss("huber", made, pixels) == pytest.approx((0.0125 + 0.45) / 3)


@pytest.mark.parametrize("kind", ["l1", "l2", "huber"])
def test_a_batch_is_the_mean_of_its_parts(kind: str) -> None:
    a, b = noise(6, 3, 8, 8), noise(6, 3, 8, 8, seed=1)
    parts = [reconstruction_loss(kind, x, y) for x, y in zip(a.split(2), b.split(2), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), reconstruction_loss(kind, a, b))


def test_the_best_learned_scale_equals_the_distance() -> None:
    """d / exp(s) + s has its minimum over s at exp(s) = d."""
    distance, s = torch.tensor(0.03), torch.tensor(math.log(0.03), requires_grad=True)
    likelihood_loss(distance, s).backward()
    assert s.grad == pytest.approx(0, abs=1e-6)
    laplace = torch.distributions.Laplace(0.0, 0.5)
    error = torch.tensor([0.1, -0.7])
    torch.testing.assert_close(
        likelihood_loss(error.abs(), torch.tensor(0.5).log()), -laplace.log_prob(error) - math.log(2)
    )


def test_a_known_gradient_equals_autograds() -> None:
    made, target = noise(2, 3, 8, 8).requires_grad_(), noise(2, 3, 8, 8, seed=1)

    def loss(x: Tensor) -> Tensor:
        return ((x - target) ** 4).mean()

    (expected,) = torch.autograd.grad(loss(made * 2), made)
    repeated = made * 2
    value = known(loss, repeated).attach(repeated)
    (gradient,) = torch.autograd.grad(value, made)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(value.detach(), loss(repeated).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_scale_against_underflow_changes_no_digit(dtype: torch.dtype) -> None:
    conv, made, target = nn.Conv2d(3, 8, 3), noise(3, 3, 10, 10).requires_grad_(), noise(3, 3, 10, 10, seed=1)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return (conv(x) - conv(target)).float().square().mean()

    (plain,) = torch.autograd.grad(loss(made), made)
    assert torch.equal(known(loss, made).gradient, plain)


def test_small_gradients_survive_fp16() -> None:
    """The gradients of each element and of a weight over all of them are far below fp16's least number."""
    torch.manual_seed(0)
    made, conv = noise(16, 3, 128, 128), nn.Conv2d(3, 3, 1)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            return 1e-2 * conv(x).float().mean()

    (exact,) = torch.autograd.grad(1e-2 * conv(leaf := made.clone().requires_grad_()).mean(), leaf)
    assert exact.abs().max() < 2**-25  # half of fp16's least number: rounded to 0
    torch.testing.assert_close(known(loss, made).gradient, exact, rtol=0.02, atol=0)
    with torch.autocast("cpu", torch.float16):
        half = conv(made)
    scale = underflow_scale(made)
    error = torch.full(made.shape, 1 / made.numel())  # all of one sign, so a weight's gradient is their sum
    (ours,) = torch.autograd.grad(half.float(), conv.weight, error * scale)
    (theirs,) = torch.autograd.grad(conv(made), conv.weight, error)
    torch.testing.assert_close(ours / scale, theirs, rtol=0.02, atol=1e-4)


# -- perceptual -----------------------------------------------------------------------------------------------


class TinyLinear(nn.Linear):
    """A linear layer of one weight, whatever its arguments are."""

    def __init__(self, *_: object, **__: object) -> None:
        super().__init__(1, 1)


@pytest.mark.parametrize(("backbone", "build"), [("vgg", vgg16), ("alex", alexnet)])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_lpips_equals_torchmetrics(backbone: str, build, suffix: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nn, "Linear", TinyLinear)  # the classifier, which LPIPS doesn't have, is most of the network
    torch.manual_seed(0)
    network = build()
    path = tmp_path / f"weights.{suffix}"
    state = network.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    ours, reference = Lpips(backbone, str(path)), _LPIPS(net=backbone, pnet_rand=True)
    features = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    for name, value in reference.net.state_dict().items():
        value.copy_(features[name.split(".", 1)[1]])  # slice1.0.weight is features.0.weight
    a, b = noise(3, 3, 64, 80).clamp(-1, 1), noise(3, 3, 64, 80, seed=1).clamp(-1, 1)
    torch.testing.assert_close(ours(a, b), reference(a, b).mean(), rtol=1e-4, atol=1e-7)
    assert ours(a, a) == 0


@pytest.fixture(scope="module")
def lpips(tmp_path_factory) -> Lpips:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alex") / "alex.safetensors"
    save_file({f"features.{k}": v for k, v in alexnet().features.state_dict().items()}, path)
    return Lpips("alex", str(path))


@pytest.fixture(scope="module")
def tower(small_clip) -> ClipPerceptual:
    return ClipPerceptual(str(small_clip))


@pytest.mark.parametrize("fixture", ["lpips", "tower"])
def test_perceptual_losses_have_gradients_only_for_the_image(fixture: str, request) -> None:
    perceptual = request.getfixturevalue(fixture)
    x = smooth_pixels(4)
    made = (x + 0.1 * noise(*x.shape)).requires_grad_()
    loss = perceptual(made, x)
    loss.backward()
    assert loss > 0
    assert (made.grad.flatten(1).norm(dim=1) > 0).all()
    assert gradients(perceptual) == 0
    assert not any(p.requires_grad for p in perceptual.parameters())
    # A step along the gradient makes the images more similar.
    assert perceptual(made.detach() - 0.1 * made.grad / made.grad.abs().max(), x) < loss
    assert perceptual(x, x) == pytest.approx(0, abs=1e-6)
    parts = [perceptual(a, b) for a, b in zip(made.detach().split(1), x.split(1), strict=True)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fixture", ["lpips", "tower"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_perceptual_gradients_are_finite_in_half_precision(fixture: str, dtype: torch.dtype, request) -> None:
    perceptual, x = request.getfixturevalue(fixture), smooth_pixels(4)
    grey = torch.zeros_like(x)  # here some features of LPIPS are all zero
    for made in (x + 0.1 * noise(*x.shape), grey):
        exact = known(lambda y: perceptual(y, x), made)
        with torch.autocast("cpu", dtype):
            half = known(lambda y: perceptual(y, x), made)
        assert torch.isfinite(half.gradient).all()
        assert F.cosine_similarity(half.gradient.flatten(), exact.gradient.flatten(), dim=0) > 0.9
        assert float(half.gradient.norm() / exact.gradient.norm()) == pytest.approx(1, abs=0.1)
        assert half.value.dtype == torch.float32
        assert float(half.value) == pytest.approx(float(exact.value), rel=0.05)


def test_features_of_unit_length_and_their_gradient_are_finite_at_zero() -> None:
    x = torch.cat([torch.zeros(1, 5), noise(3, 5)]).requires_grad_()
    unit = _unit(x, dim=-1)
    torch.testing.assert_close(unit.norm(dim=-1), torch.tensor([0.0, 1, 1, 1]))
    unit[0].sum().backward()
    torch.testing.assert_close(x.grad[0], torch.full((5,), 1e4))  # 1 / √(1e-8)


def test_small_images_are_enlarged_for_lpips(lpips: Lpips) -> None:
    x, y = smooth_pixels(4, 16), smooth_pixels(4, 16, seed=1)
    larger = [F.interpolate(p, scale_factor=4, mode="bilinear") for p in (x, y)]
    torch.testing.assert_close(lpips(x, y), lpips(*larger))


@torch.no_grad()
@pytest.mark.parametrize("side", [16, 24])
def test_the_distance_of_clip_is_that_of_the_angles_between_its_features(small_clip, tower, side: int) -> None:
    """Features of unit length at the angle φ have the squared distance 2 - 2 cos φ. This tower reads [-1, 1]."""
    vision = CLIPVisionModel.from_pretrained(small_clip)
    assert vision.config.image_size == 16
    x, y = smooth_pixels(3, side), smooth_pixels(3, side, seed=1)

    def states(pixels: Tensor) -> tuple[Tensor, ...]:
        if side != 16:
            pixels = F.interpolate(pixels, (16, 16), mode="bicubic", antialias=True)
        return vision(pixels, output_hidden_states=True).hidden_states

    cosines = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(states(x), states(y), strict=True)]
    torch.testing.assert_close(tower(x, y), 2 - 2 * torch.stack(cosines).mean(), rtol=1e-4, atol=1e-5)


def test_unavailable_perceptual_networks_are_refused(small_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"perceptual\.model"):
        ClipPerceptual(str(tmp_path / "nothing"))
    # Only a text tower: the missing weights would be random.
    text = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(text).save_pretrained(tmp_path / "text")
    with pytest.raises(UserError, match=r"perceptual\.model .* can't be read"):
        ClipPerceptual(str(tmp_path / "text"))
    vision = CLIPVisionModel.from_pretrained(small_clip)
    weights = {name: value for name, value in vision.state_dict().items() if "post_layernorm.bias" not in name}
    vision.save_pretrained(tmp_path / "incomplete", state_dict=weights)
    with pytest.raises(UserError, match=r"perceptual\.model .* has no weight .*post_layernorm\.bias"):
        ClipPerceptual(str(tmp_path / "incomplete"))
    with pytest.raises(UserError, match=r"nothing\.pth"):
        Lpips("vgg", str(tmp_path / "nothing.pth"))
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"wrong\.pth"):
        Lpips("alex", str(tmp_path / "wrong.pth"))
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth.*more than tensors"):
        Lpips("alex", str(tmp_path / "evil.pth"))
    assert not canary.exists()


# -- adversarial ----------------------------------------------------------------------------------------------


def test_adversarial_losses_against_their_definitions() -> None:
    real, fake = noise(4, 1, 3, 3), noise(4, 1, 3, 3, seed=1)
    one, zero = torch.ones_like(real), torch.zeros_like(real)
    entropy = F.binary_cross_entropy_with_logits
    both = 0.5 * (entropy(real, one) + entropy(fake, zero))
    for kind in ("non_saturating", "saturating"):
        torch.testing.assert_close(discriminator_loss(kind, real, fake), both)
    torch.testing.assert_close(generator_loss("non_saturating", fake), entropy(fake, one))
    torch.testing.assert_close(generator_loss("saturating", fake), -entropy(fake, zero))
    torch.testing.assert_close(generator_loss("hinge", fake), -fake.mean())
    sure = torch.full_like(real, 2.0)
    assert discriminator_loss("hinge", sure, -sure) == 0
    assert discriminator_loss("hinge", -sure, sure) == 3


@pytest.mark.parametrize("kind", ["hinge", "non_saturating", "saturating"])
def test_the_generator_is_rewarded_for_fooling(kind: str) -> None:
    fake = noise(4, 1, 3, 3).requires_grad_()
    generator_loss(kind, fake).backward()
    assert (fake.grad < 0).all()


def test_a_frozen_critic_passes_gradients_on() -> None:
    critic, made = PatchDiscriminator(8, 2), smooth_pixels(4).requires_grad_()
    with frozen(critic):
        generator_loss("hinge", critic(made)).backward()
    assert made.grad.abs().sum() > 0
    assert gradients(critic) == 0
    assert all(p.requires_grad for p in critic.parameters())


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_a_logit_depends_only_on_its_own_image(layers: int) -> None:
    """There are no statistics over the batch: an image has the same logits with and without others."""
    torch.manual_seed(0)
    critic = PatchDiscriminator(12, layers)
    x = smooth_pixels(4, critic.smallest)
    assert critic(x).shape == (4, 1, 1, 1)
    with pytest.raises(RuntimeError):
        critic(x[..., : critic.smallest - 2**layers])
    torch.testing.assert_close(torch.cat([critic(p) for p in x.split(1)]), critic(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_patches_are_those_of_isola_et_al(layers: int, side: int) -> None:
    """A logit in the middle has a gradient for 16, 34 or 70 rows of the image."""
    critic, x = PatchDiscriminator(4, layers).double(), smooth_pixels(1, 128).double().requires_grad_()
    for part in critic.body:
        if isinstance(part, nn.GroupNorm):
            part.forward = lambda y: y  # group normalisation depends on the whole image
    logits = critic(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert int((x.grad.abs().sum((0, 1, 3)) > 0).sum()) == side


def test_r1_of_a_linear_critic_is_its_weight() -> None:
    critic = nn.Conv2d(3, 1, 8)  # one patch: D(x) = w·x + b
    penalty = r1_penalty(critic, smooth_pixels(4, 8))
    torch.testing.assert_close(penalty, 0.5 * critic.weight.square().sum())
    penalty.backward()
    torch.testing.assert_close(critic.weight.grad, critic.weight.detach())


def test_spectral_norm_follows_the_weights_when_refreshed_and_only_then() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(8, 3, spectral=True)
    x, before = smooth_pixels(4, 64), {k: v.clone() for k, v in critic.state_dict().items()}
    first = critic(x)
    assert torch.equal(critic(x), first)
    with frozen(critic):
        critic(x)
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())
    with torch.no_grad():
        for p in critic.parameters():
            if p.ndim > 1:
                p *= 3
    for _ in range(100):
        critic.refresh()
    for layer in critic.body:
        if isinstance(layer, nn.Conv2d):
            assert float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) == pytest.approx(1, abs=1e-3)
    assert not critic.training


# -- the adaptive weight --------------------------------------------------------------------------------------


def test_the_adaptive_weight_makes_gradient_norms_equal() -> None:
    distance, generator = noise(3, 16, 3, 3), 40 * noise(3, 16, 3, 3, seed=1)
    weight = adaptive_weight(distance, generator)
    assert float((weight * generator).norm()) == pytest.approx(float(distance.norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_adaptive_weight_is_clamped_or_nan(dtype: torch.dtype) -> None:
    one = torch.ones(8, dtype=dtype)
    tiny, huge = one * torch.finfo(dtype).smallest_normal, one * torch.finfo(dtype).max
    assert adaptive_weight(one, tiny) == LARGEST_WEIGHT  # vanishing adversarial gradients
    assert adaptive_weight(one, 0 * one) == LARGEST_WEIGHT
    assert adaptive_weight(0 * one, 0 * one) == 0
    assert adaptive_weight(tiny, one) >= 0
    assert 0 <= adaptive_weight(one, huge) < 1  # exploding ones
    assert adaptive_weight(huge, huge) == 1
    for bad in (torch.inf, torch.nan):
        assert adaptive_weight(one, bad * one).isnan()
        assert adaptive_weight(bad * one, one).isnan()


# -- equivariance ---------------------------------------------------------------------------------------------


def test_a_transform_does_the_same_to_latents_and_images() -> None:
    """Pooling commutes with rotation exactly, and with shrinking up to the filter."""
    x = smooth_pixels(2, 64)
    for turns in range(4):
        t = Transform(16, 16, turns)
        torch.testing.assert_close(F.avg_pool2d(t(x, 4), 4), t(F.avg_pool2d(x, 4)))
    t = Transform(8, 12, 1)
    assert t(x, 4).shape == (2, 3, 48, 32)
    assert (F.avg_pool2d(t(x, 4), 4) - t(F.avg_pool2d(x, 4))).abs().mean() < 0.02
    assert torch.equal(Transform(16, 16, 0)(x, 4), x)


def test_a_smaller_latent_has_no_noise_of_the_finest_detail() -> None:
    """A chequerboard of ±1 is above the highest frequency of half the size, so that nearly nothing of it remains."""
    place = torch.arange(16)
    board = ((place[:, None] + place) % 2 * 2.0 - 1).view(1, 1, 16, 16)
    assert Transform(6, 6, 1)(board)[..., 2:-2, 2:-2].abs().max() < 0.02


def test_transforms_are_drawn_over_their_whole_range() -> None:
    u = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [draw(tuple(row), 16, 0.25) for row in u]
    assert {t.turns for t in drawn} == {0, 1, 2, 3}
    assert {t.height for t in drawn} == {t.width for t in drawn} == set(range(4, 17))
    assert draw((0.999, 0.999, 0.0), 16, 1.0) == Transform(16, 16, 0)
    assert draw((0.0, 0.0, 0.5), 2, 0.1) == Transform(1, 1, 2)  # a latent has at least one pixel
